"""Dagster's private names as they are, and plain forms of its errors and events."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from dagster import DagsterEvent
from dagster._config import process_config, resolve_to_config_type
from dagster._core.definitions.executor_definition import multiple_process_executor_requirements
from dagster._core.definitions.reconstruct import ReconstructableJob
from dagster._core.definitions.repository_definition import RepositoryLoadData
from dagster._core.errors import DagsterExecutionInterruptedError, DagsterSubprocessError
from dagster._core.events import DagsterEventType, EngineEventData
from dagster._core.events.log import EventLogEntry
from dagster._core.execution.api import (
    create_execution_plan,
    execute_plan_iterator,
)
from dagster._core.execution.context.system import IStepContext, PlanOrchestrationContext
from dagster._core.execution.plan.active import ActiveExecution
from dagster._core.execution.plan.handle import ResolvedFromDynamicStepHandle, StepHandle
from dagster._core.execution.plan.instance_concurrency_context import InstanceConcurrencyContext
from dagster._core.execution.plan.objects import StepFailureData
from dagster._core.execution.plan.plan import ExecutionPlan
from dagster._core.execution.plan.state import KnownExecutionState
from dagster._core.execution.plan.step import (
    ExecutionStep,
    IExecutionStep,
    UnresolvedCollectExecutionStep,
)
from dagster._core.execution.retries import RetryMode
from dagster._core.execution.tags import get_tag_concurrency_limits_config
from dagster._core.instance import InstanceRef
from dagster._core.launcher import (
    CheckRunHealthResult,
    LaunchRunContext,
    ResumeRunContext,
    RunLauncher,
    WorkerStatus,
)
from dagster._core.origin import JobPythonOrigin
from dagster._core.secrets.env_file import get_env_var_dict
from dagster._core.storage.dagster_run import DagsterRunStatus
from dagster._grpc.types import ExecuteRunArgs, ExecuteStepArgs
from dagster._serdes import (
    ConfigurableClass,
    ConfigurableClassData,
    deserialize_value,
    pack_value,
    serialize_value,
    unpack_value,
)
from dagster._utils.error import serializable_error_info_from_exc_info
from dagster._utils.hosted_user_process import recon_job_from_origin
from dagster._utils.interrupts import (
    capture_interrupts,
)
from dagster_shared.error import SerializableErrorInfo

from dagster_taskiq.errors import MalformedResultError

__all__ = [
    "ActiveExecution",
    "CheckRunHealthResult",
    "ConfigurableClass",
    "ConfigurableClassData",
    "DagsterEventType",
    "DagsterExecutionInterruptedError",
    "DagsterRunStatus",
    "DagsterSubprocessError",
    "EngineEventData",
    "EventLogEntry",
    "ExecuteRunArgs",
    "ExecuteStepArgs",
    "ExecutionPlan",
    "ExecutionStep",
    "IExecutionStep",
    "InstanceConcurrencyContext",
    "InstanceRef",
    "JobPythonOrigin",
    "KnownExecutionState",
    "LaunchRunContext",
    "PlanOrchestrationContext",
    "ReconstructableJob",
    "RepositoryLoadData",
    "ResolvedFromDynamicStepHandle",
    "ResumeRunContext",
    "RetryMode",
    "RunLauncher",
    "SerializableErrorInfo",
    "StepHandle",
    "UnresolvedCollectExecutionStep",
    "WorkerStatus",
    "capture_interrupts",
    "create_execution_plan",
    "deserialize_events",
    "error_info",
    "execute_plan_iterator",
    "fail_step",
    "multiple_process_executor_requirements",
    "pack_value",
    "plain_error",
    "process_schema",
    "read_env_file",
    "recon_job_from_origin",
    "retry_or_fail_step",
    "serialize_value",
    "tag_concurrency_limits_field",
    "unpack_error",
    "unpack_value",
]

tag_concurrency_limits_field = get_tag_concurrency_limits_config

#: The variables in the file ``.env`` of a directory.
read_env_file = get_env_var_dict


def process_schema(schema: Mapping[str, Any], value: object) -> tuple[Any, list[str]]:
    """Check a value against a Dagster config schema and resolve its ``env:`` parts.

    Returns:
        the resolved value, or None, and what is wrong with it, a sentence each.
    """
    result = process_config(resolve_to_config_type(dict(schema)), value)  # type: ignore[arg-type]
    return result.value, [_first_paragraph(error.message) for error in result.errors or []]


def _first_paragraph(message: str) -> str:
    """In one line, without Dagster's wrapping of a value that cannot be resolved."""
    sentence = " ".join(message.partition("\n\nStack Trace:")[0].split())
    return re.sub(r"Post processing at path \S+ of .*PostProcessingError: ", "", sentence)


def error_info() -> SerializableErrorInfo:
    """The exception that is being handled, as Dagster stores it."""
    return serializable_error_info_from_exc_info(sys.exc_info())


def deserialize_events(texts: Iterable[str]) -> list[DagsterEvent]:
    """Events of one step from their serialized form; they share what is the same in all of them.

    Raises:
        MalformedResultError: a text is no event, or one of another version of Dagster.
    """
    events = []
    tags: Mapping[str, str] | None = None
    for text in texts:
        try:
            event = deserialize_value(text, DagsterEvent)
        except Exception as error:
            raise MalformedResultError(f"it has an event that is none: {error!r}") from error
        # whoever keeps the events of a run keeps little else but these
        tags = event.logging_tags if event.logging_tags != tags else tags
        events.append(event._replace(logging_tags=tags))
    return events


def unpack_error(packed: Mapping[str, Any]) -> SerializableErrorInfo:
    """An error from its packed form.

    Raises:
        MalformedResultError: it is none, or one of another version of Dagster.
    """
    try:
        return unpack_value(dict(packed), as_type=SerializableErrorInfo)
    except Exception as error:
        raise MalformedResultError(f"it has an error that is none: {error!r}") from error


def fail_step(step_context: IStepContext, error: SerializableErrorInfo) -> DagsterEvent:
    """Log that a step failed, without asking its retry policy."""
    return DagsterEvent.step_failure_event(
        step_context,
        StepFailureData(error=error, user_failure_data=None),
    )


def retry_or_fail_step(
    context: PlanOrchestrationContext,
    step_context: IStepContext,
    error: SerializableErrorInfo,
    active: ActiveExecution,
) -> DagsterEvent:
    """Log that an attempt failed; whether it is retried is what the step's retry policy says."""
    executor: Any = context.executor
    # the same method, renamed during Dagster 1.13
    decide = getattr(executor, "log_failure_or_retry_event_after_error", None)
    decide = decide or executor.get_failure_or_retry_event_after_crash
    event: DagsterEvent = decide(step_context, error, active.get_known_state())
    return event


def plain_error(
    message: str, error_class: str, cause: SerializableErrorInfo | None = None
) -> SerializableErrorInfo:
    """An error without a traceback of its own, for where a sentence serves."""
    return SerializableErrorInfo(message=message, stack=[], cls_name=error_class, cause=cause)
