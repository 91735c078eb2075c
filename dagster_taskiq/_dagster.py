"""Every private name of Dagster that this package uses, in one place.

A release of Dagster that moves or changes one of them breaks this file and no other. Names are
re-exported as they are where that serves; where Dagster offers an awkward shape, a function here
gives it a plain one.
"""

from __future__ import annotations

import inspect
import os
import re
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from dagster import DagsterEvent, DagsterInstance, DagsterRun, RetryRequested
from dagster._cli.api import _execute_run_command_body, _resume_run_command_body
from dagster._config import process_config, resolve_to_config_type
from dagster._core import errors
from dagster._core.definitions.executor_definition import multiple_process_executor_requirements
from dagster._core.definitions.reconstruct import ReconstructableJob, ReconstructableRepository
from dagster._core.errors import DagsterExecutionInterruptedError, DagsterSubprocessError
from dagster._core.events import DagsterEventType, EngineEventData
from dagster._core.events.log import EventLogEntry
from dagster._core.execution import compute_logs
from dagster._core.execution.api import (
    create_execution_plan,
    execute_plan_iterator,
    execute_run_iterator,
)
from dagster._core.execution.context.system import IStepContext, PlanOrchestrationContext
from dagster._core.execution.plan import execute_plan
from dagster._core.execution.plan.active import ActiveExecution
from dagster._core.execution.plan.handle import ResolvedFromDynamicStepHandle, StepHandle
from dagster._core.execution.plan.inputs import FromMultipleSources
from dagster._core.execution.plan.instance_concurrency_context import InstanceConcurrencyContext
from dagster._core.execution.plan.objects import StepFailureData
from dagster._core.execution.plan.outputs import StepOutputHandle
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
from dagster._core.storage.dagster_run import DagsterRunStatus
from dagster._core.storage.event_log import SqlEventLogStorage, SqlEventLogStorageTable
from dagster._core.storage.tags import GLOBAL_CONCURRENCY_TAG
from dagster._core.system_config.objects import ResolvedRunConfig
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
from dagster._utils.interrupts import (
    capture_interrupts,
    check_captured_interrupt,
    raise_interrupts_as,
)
from dagster_shared.error import SerializableErrorInfo
from sqlalchemy import select
from sqlalchemy.engine import Engine

from dagster_taskiq.errors import ConfigError, MalformedResultError
from dagster_taskiq.forked_copies import ending_copies

__all__ = [
    "STORAGE_MODULES",
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
    "KnownExecutionState",
    "LaunchRunContext",
    "PlanOrchestrationContext",
    "ReconstructableJob",
    "Replayed",
    "ResolvedFromDynamicStepHandle",
    "ResumeRunContext",
    "RetryMode",
    "RunLauncher",
    "SerializableErrorInfo",
    "SqlEventLog",
    "StepHandle",
    "UnresolvedCollectExecutionStep",
    "WorkerStatus",
    "capture_interrupts",
    "copy_logs_by",
    "create_execution_plan",
    "cut_known_state",
    "deserialize_events",
    "end_copies_of_steps",
    "error_info",
    "execute_or_resume_run",
    "execute_plan_iterator",
    "fail_step",
    "has_database_server",
    "has_server",
    "hold_pool_slot",
    "interrupts_end_no_attempt",
    "is_end_of_attempt",
    "is_in_flight",
    "is_interrupt_captured",
    "is_own_instance",
    "keep_definitions",
    "multiple_process_executor_requirements",
    "pack_value",
    "plain_error",
    "pool_of",
    "process_schema",
    "read_step_log",
    "replay_log",
    "retry_or_fail_step",
    "runs_user_code",
    "seconds_to_next_ready",
    "serialize_value",
    "sql_event_log",
    "storage_engines",
    "tag_concurrency_limits_field",
    "unpack_error",
    "unpack_value",
]

#: What Dagster imports when an instance with its usual storages is first opened, in a fifth of a
#: second; those on PostgreSQL and MySQL share nearly all of it.
STORAGE_MODULES = ("dagster._core.storage.sqlite_storage", "alembic.command", "sqlalchemy")

#: Code locations, and jobs of them, that a process keeps.
_KEPT_LOCATIONS = 4
_KEPT_JOBS = 64

tag_concurrency_limits_field = get_tag_concurrency_limits_config


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


def is_in_flight(active: ActiveExecution, step_key: str) -> bool:
    """Whether the step was handed out for execution and has not reached an end."""
    return step_key in active._in_flight


def seconds_to_next_ready(active: ActiveExecution) -> float | None:
    """Time until a delayed retry is due or a pool may be asked again; None when none waits.

    ``ActiveExecution.sleep_interval`` is not used: for pools it can say 0 during a long wait.
    """
    now = time.time()
    times = list(active._waiting_to_retry.values())
    concurrency = active._instance_concurrency_context
    if concurrency is not None and concurrency.has_pending_claims():
        times += concurrency._pending_timeouts.values()
    return max(0.0, min(times) - now) if times else None


def cut_known_state(active: ActiveExecution, step: ExecutionStep) -> KnownExecutionState:
    """What one step reads of the known state, so that a message does not grow with the plan.

    ``ready_outputs`` is read for the step's own upstream outputs only, of the attempts only its own
    count, and of the dynamic mappings those that its plan is resolved by: the key of a step
    that is mapped is in its name, one that collects needs all.
    """
    state = active.get_known_state()
    upstream = {
        handle
        for step_input in step.step_inputs
        for handle in step_input.get_step_output_handle_dependencies()
    }
    attempts = state.previous_retry_attempts
    return state._replace(
        ready_outputs=state.ready_outputs & upstream,
        previous_retry_attempts={step.key: attempts[step.key]} if step.key in attempts else {},
        dynamic_mappings=state.dynamic_mappings if _collects(step) else {},
    )


def _collects(step: ExecutionStep) -> bool:
    """Whether an input of the step is made of all that dynamic outputs have become, maybe none."""
    sources = [it.source for it in step.step_inputs if isinstance(it.source, FromMultipleSources)]
    handles = [source.step_output_handle_dependencies for source in sources]
    return any(not found or any(map(_is_dynamic, found)) for found in handles)


def _is_dynamic(output: StepOutputHandle) -> bool:
    handle = StepHandle.parse_from_key(output.step_key)
    return output.mapping_key is not None or isinstance(handle, ResolvedFromDynamicStepHandle)


def is_end_of_attempt(event: DagsterEvent) -> bool:
    """Whether the event says how an attempt of a step ended."""
    return event.is_step_success or event.is_step_failure or event.is_step_up_for_retry


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


def runs_user_code() -> bool:
    """Whether Dagster would raise an interrupt here and now, rather than keep it for later.

    It does within its error boundaries around user code, where it has exchanged the handler of
    SIGINT for one that raises.
    """
    handler = signal.getsignal(signal.SIGINT)
    return getattr(handler, "__qualname__", "").startswith(f"{raise_interrupts_as.__qualname__}.")


def is_interrupt_captured() -> bool:
    """Whether a signal asked this process to stop, and what runs has not been told yet."""
    return check_captured_interrupt()


@contextmanager
def interrupts_end_no_attempt(is_run_over: Callable[[], bool]) -> Iterator[None]:
    """Keep Dagster from logging an interrupted step as failed or to be retried.

    Its process knows neither why it was interrupted, nor whether it is to be retried. Where Dagster
    has no such functions any more, it logs an end that tells of the interrupt alone.

    Args:
        is_run_over: whether no loop of the run will log the end; asked after an interrupt.
    """
    module: Any = execute_plan
    names = ("step_failure_event_from_exc_info", "core_dagster_event_sequence_for_step")
    fail, run = (getattr(module, name, None) for name in names)
    if fail is None or run is None:
        yield
        return
    interrupts = (KeyboardInterrupt, DagsterExecutionInterruptedError)

    def fail_unless_interrupted(
        step_context: Any, exc_info: Any, *more: Any, **options: Any
    ) -> DagsterEvent:
        if issubclass(exc_info[0], interrupts) and not is_run_over():
            message = f'Step "{step_context.step.key}" was interrupted.'
            return DagsterEvent.engine_event(step_context, message, EngineEventData())
        event: DagsterEvent = fail(step_context, exc_info, *more, **options)
        return event

    def run_without_policy(step_context: Any) -> Iterator[DagsterEvent]:
        try:
            yield from run(step_context)
        except RetryRequested as request:
            if isinstance(request.__cause__, interrupts):
                raise request.__cause__ from None
            raise

    module.step_failure_event_from_exc_info = fail_unless_interrupted
    module.core_dagster_event_sequence_for_step = run_without_policy
    try:
        yield
    finally:
        module.step_failure_event_from_exc_info = fail
        module.core_dagster_event_sequence_for_step = run


def copy_logs_by(begin: Callable[[str, int], None], end: Callable[[str], None]) -> None:
    """Have somebody else copy the captured output of steps to where it would have gone.

    Dagster's local compute log manager, and those that build on it, redirect standard output and
    error into files and start two processes for each, to copy them. The files, which the UI shows,
    stay as they are. Where Dagster has no such function any more, nothing changes.

    Args:
        begin: called with a file's path and the descriptor whose output goes into it from now on.
        end: called with the path when no more will come.
    """
    original = getattr(compute_logs, "tail_to_stream", None)
    if original is None or list(inspect.signature(original).parameters) != ["path", "stream"]:
        return

    @contextmanager
    def tail_to_stream(path: str, stream: Any) -> Iterator[tuple[None, None]]:
        begin(path, stream.fileno())
        try:
            yield None, None
        finally:
            end(path)

    compute_logs.tail_to_stream = tail_to_stream


def end_copies_of_steps() -> None:
    """Have a copy of this process that a step forks end where Dagster would go on after user code.

    All its boundaries around user code let interrupts through by one function. What comes after
    them writes events in the step's name.
    """

    @contextmanager
    def raise_interrupts_and_end_copies(error_class: type[BaseException]) -> Iterator[None]:
        with raise_interrupts_as(error_class), ending_copies():
            yield

    boundaries: Any = errors
    boundaries.raise_interrupts_as = raise_interrupts_and_end_copies


def keep_definitions() -> None:
    """Keep more than the one job that was used last, for a process that serves many runs.

    Dagster keeps one job and loads its whole code location anew for another one. Here a location
    is loaded once for all of its jobs. A run's config, which is resolved several times for each
    step, is known by the definition and the dictionary it was resolved for.
    """
    repository: Any = ReconstructableRepository
    repository.get_definition = lru_cache(_KEPT_LOCATIONS)(repository.get_definition)
    job: Any = ReconstructableJob
    load = ending_copies()(job.get_definition.__wrapped__)
    job.get_definition = lru_cache(_KEPT_JOBS)(load)
    config: Any = ResolvedRunConfig
    config.build = staticmethod(_known_by_identity(config.build))


def _known_by_identity(build: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Remember what was built for these very objects, which are not to be changed."""
    known: OrderedDict[tuple[int, int], tuple[Any, Any, Any]] = OrderedDict()

    def remembering(job_def: Any, run_config: Any = None) -> Any:
        key = (id(job_def), id(run_config))
        # the objects are kept with it, so that nothing else gets their ids
        if key not in known:
            known[key] = (job_def, run_config, build(job_def, run_config))
        known.move_to_end(key)
        if len(known) > _KEPT_JOBS:
            known.popitem(last=False)
        return known[key][-1]

    return remembering


class StorageEngine:
    """The SQLAlchemy engine of one of an instance's storages, which may be exchanged."""

    def __init__(self, storage: Any) -> None:
        self._storage = storage

    @property
    def engine(self) -> Engine:
        """The present one."""
        engine: Engine = self._storage._engine
        return engine

    @engine.setter
    def engine(self, engine: Engine) -> None:
        self._storage._engine = engine


def storage_engines(instance: DagsterInstance) -> list[StorageEngine]:
    """The engines of the storages that keep one."""
    storages = (instance.run_storage, instance.event_log_storage, instance.schedule_storage)
    having = [it for it in storages if isinstance(getattr(it, "_engine", None), Engine)]
    return [StorageEngine(storage) for storage in having]


def has_server(engine: Engine) -> bool:
    """Whether its database is one with a server, unlike SQLite's files."""
    return engine.dialect.name != "sqlite"


class SqlEventLog:
    """The event log of an instance, in a database with a server."""

    def __init__(self, storage: Any) -> None:
        self._storage = storage
        #: Dagster's own, which writes one event, to other tables too if it is about an asset.
        self.store_event: Callable[[EventLogEntry], None] = storage.store_event

    def row_of(self, event: EventLogEntry) -> Mapping[str, Any]:
        """What the log's table has of an event."""
        row: Mapping[str, Any] = self._storage._event_to_row(event)
        return row

    def store_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows of events that concern no other table in one statement.

        Unlike ``store_event`` it does not notify PostgreSQL's channel of each, which Dagster does
        for its former releases only.
        """
        with self._storage.index_connection() as connection:
            connection.execute(SqlEventLogStorageTable.insert(), rows)

    def has_row(self, row: Mapping[str, Any]) -> bool:
        """Whether the log has this row, which no other one is equal to: it has the time in it."""
        columns = SqlEventLogStorageTable.c
        same = (columns.run_id == row["run_id"], columns.event == row["event"])
        with self._storage.index_connection() as connection:
            found = connection.execute(select(columns.id).where(*same).limit(1))
            return found.first() is not None

    @contextmanager
    def store_replaced_by(self, store: Callable[[EventLogEntry], None]) -> Iterator[None]:
        """Let the instance give its events to somebody else."""
        before = vars(self._storage).get("store_event")
        self._storage.store_event = store
        try:
            yield
        finally:
            if before is None:
                del self._storage.store_event
            else:
                self._storage.store_event = before


def sql_event_log(instance: DagsterInstance) -> SqlEventLog | None:
    """The instance's event log, if it is in a database with a server."""
    storage: Any = instance.event_log_storage
    if not isinstance(storage, SqlEventLogStorage) or not hasattr(storage, "_event_to_row"):
        return None
    engine = getattr(storage, "_engine", None)
    return SqlEventLog(storage) if isinstance(engine, Engine) and has_server(engine) else None


#: The events that bound the attempts of a step, and those of the workers that begin with them.
_ATTEMPT_EVENTS = {
    DagsterEventType.ENGINE_EVENT,
    DagsterEventType.STEP_START,
    DagsterEventType.STEP_RESTARTED,
    DagsterEventType.STEP_SUCCESS,
    DagsterEventType.STEP_FAILURE,
    DagsterEventType.STEP_UP_FOR_RETRY,
}


def read_step_log(instance: DagsterInstance, run_id: str, step_key: str) -> list[EventLogEntry]:
    """What the log says of when a step's attempts have begun and ended, in its order.

    Dagster can read the events of one step only as their sums (``get_run_step_stats``), which do
    not tell one attempt from another; and the events of a run, of which there may be thousands.
    """
    storage: Any = instance.event_log_storage
    if not isinstance(storage, SqlEventLogStorage):
        entries = instance.all_logs(run_id, of_type=_ATTEMPT_EVENTS)
        return [entry for entry in entries if entry.step_key == step_key]
    columns = SqlEventLogStorageTable.c
    query = (
        select(columns.event)
        .where(columns.run_id == run_id, columns.step_key == step_key)
        .where(columns.dagster_event_type.in_([kind.value for kind in _ATTEMPT_EVENTS]))
        .order_by(columns.id)
    )
    with storage.run_connection(run_id) as connection:
        texts = connection.execute(query).scalars().all()
    return [deserialize_value(text, EventLogEntry) for text in texts]


def plain_error(
    message: str, error_class: str, cause: SerializableErrorInfo | None = None
) -> SerializableErrorInfo:
    """An error without a traceback of its own, for where a sentence serves."""
    return SerializableErrorInfo(message=message, stack=[], cls_name=error_class, cause=cause)


def execute_or_resume_run(
    instance: DagsterInstance,
    run_id: str,
    *,
    is_resumed: bool,
    on_begun: Callable[[], None] = lambda: None,
) -> int:
    """Execute a run in this process, as Dagster's own run workers do; its exit code.

    With one difference: a run that is cancelled while its code is being loaded is CANCELED. To
    Dagster it is in a wrong state then, which makes it a FAILURE.

    Args:
        on_begun: called when the log says that the run has started.
    """

    def look(event: DagsterEvent) -> None:
        if event.event_type is DagsterEventType.RUN_START:
            on_begun()

    body = _resume_run_command_body if is_resumed else _execute_run_command_body
    grpc_impl: Any = import_module("dagster._grpc.impl")  # Any, as it does not export the name
    grpc_impl.execute_run_iterator = _execute_unless_cancelled
    try:
        return body(
            run_id=run_id,
            instance=instance,
            write_stream_fn=look,
            set_exit_code_on_failure=True,
        )
    finally:
        grpc_impl.execute_run_iterator = execute_run_iterator


def _execute_unless_cancelled(
    job: Any, dagster_run: DagsterRun, instance: DagsterInstance, **options: Any
) -> Iterator[DagsterEvent]:
    """Dagster's ``execute_run_iterator``, called with the run as it is after its code is loaded."""
    if dagster_run.status is DagsterRunStatus.CANCELING:
        message = "The run was cancelled before its process had begun with it."
        return iter([instance.report_run_canceled(dagster_run, message)])
    return execute_run_iterator(job, dagster_run, instance, **options)


def is_own_instance(instance: DagsterInstance) -> bool:
    """Whether a worker with a DAGSTER_HOME of its own finds this instance there.

    A packed reference carries the literal passwords of dagster.yaml, so it is sent only where the
    instance is another one than DAGSTER_HOME's: that of a test, for example.
    """
    home = os.getenv("DAGSTER_HOME")
    if not home or not instance.is_persistent:
        return False
    return Path(instance.root_directory).resolve() == Path(home).expanduser().resolve()


def has_database_server(home: Path) -> bool:
    """Whether the instance of a DAGSTER_HOME keeps its event log on a server, not in files.

    Raises:
        ConfigError: Dagster cannot use its dagster.yaml.
    """
    try:
        storage = InstanceRef.from_dir(str(home)).event_storage_data
    except Exception as error:  # of any kind; its text may have a password
        raise ConfigError(
            f"Dagster cannot use {home / 'dagster.yaml'} ({type(error).__name__}): run `dagster "
            "instance info` there to see why."
        ) from None
    # Dagster's own storages are SQLite's; each of those on a server is a package of its own
    return storage is not None and storage.module_name.partition(".")[0] != "dagster"


@dataclass(frozen=True)
class Replayed:
    """What a replay of a run's log has found.

    Attributes:
        sent: keys of the steps that were sent and have not come to an end.
        ended: keys of the others of which an attempt has ended.
        retries: how many attempts of a step, by key, asked for another one.
        failures: the failures of the steps that have failed, in their order.
    """

    sent: tuple[str, ...]
    ended: tuple[str, ...]
    retries: Mapping[str, int]
    failures: tuple[DagsterEvent, ...]


def replay_log(
    active: ActiveExecution,
    entries: Iterable[EventLogEntry],
    is_sent: Callable[[DagsterEvent], bool],
) -> Replayed:
    """Bring a new ``ActiveExecution`` to where the one of the run's former process was.

    ``ActiveExecution.rebuild_from_events`` cannot: it raises on skipped steps and delayed retries,
    asks for pool slots that others hold by now, and gives an unfinished dynamic step its keys
    twice. Here an attempt's outputs count once its end is in the log, and ends of attempts that
    were already over (of a worker that had been given up) count for nothing.

    Args:
        active: just made.
        entries: of the run's log about its steps, in their order.
        is_sent: whether an event says that its step was sent.
    """
    outputs: dict[str, list[DagsterEvent]] = {}
    sent: dict[str, None] = {}
    retries: dict[str, int] = {}
    failures: list[DagsterEvent] = []
    for entry in entries:
        event = entry.get_dagster_event()
        key = event.step_key or ""
        if is_sent(event):
            sent[key] = None
            outputs.pop(key, None)
        elif event.is_successful_output:
            outputs.setdefault(key, []).append(event)
        elif event.is_step_skipped:
            _replay_skip(active, key)
        elif is_end_of_attempt(event):
            made = outputs.pop(key, [])
            if key in sent and put_in_flight(active, key):
                del sent[key]
                retries[key] = retries.get(key, 0) + event.is_step_up_for_retry
                for known in (*made, event):
                    active.handle_event(known)
                _date_retry(active, event, entry.timestamp)
                if event.is_step_failure:
                    failures.append(event)
    in_flight = tuple(key for key in sent if put_in_flight(active, key))
    ended = tuple(key for key in retries if key not in in_flight)
    return Replayed(in_flight, ended, retries, tuple(failures))


def put_in_flight(active: ActiveExecution, step_key: str) -> bool:
    """Take a step as handed out, without asking limits or pools; False if it is not ready."""
    active._update()
    if step_key in active._in_flight:
        return True
    if step_key in active._executable:
        active._executable.remove(step_key)
    elif step_key in active._waiting_to_retry:
        del active._waiting_to_retry[step_key]
    else:
        return False
    active._in_flight.add(step_key)
    active._prep_for_dynamic_outputs(active.get_step_by_key(step_key))
    return True


def _replay_skip(active: ActiveExecution, step_key: str) -> None:
    active._update()
    if step_key in active._pending_skip:
        active._pending_skip.remove(step_key)
        active._in_flight.add(step_key)
        active._skip_for_dynamic_outputs(active.get_step_by_key(step_key))
        active.mark_skipped(step_key)


def _date_retry(active: ActiveExecution, event: DagsterEvent, timestamp: float) -> None:
    """A delay counts from when the attempt failed, not from its replay."""
    if event.is_step_up_for_retry and event.step_key in active._waiting_to_retry:
        delay = event.step_retry_data.seconds_to_wait or 0
        active._waiting_to_retry[event.step_key] = timestamp + delay


def hold_pool_slot(concurrency: InstanceConcurrencyContext, step: ExecutionStep) -> None:
    """Take over the pool slot that a step was given by the run's former process."""
    if pool_of(step) is not None:
        concurrency._claims.add(step.key)


def free_pool_slot(concurrency: InstanceConcurrencyContext, step: ExecutionStep) -> None:
    """Give back the pool slot of a step that may have ended while its run had no process."""
    hold_pool_slot(concurrency, step)
    concurrency.free_step(step.key)


def pool_of(step: ExecutionStep) -> str | None:
    """The concurrency pool of a step, by itself or by the tag of former releases."""
    return step.pool or (step.tags or {}).get(GLOBAL_CONCURRENCY_TAG)
