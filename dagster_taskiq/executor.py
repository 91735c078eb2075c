"""``taskiq_executor``: Dagster's plug-in point for the steps of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator

from dagster import DagsterEvent, Executor, InitExecutorContext, executor

from dagster_taskiq._dagster.names import (
    ExecutionPlan,
    PlanOrchestrationContext,
    RetryMode,
    multiple_process_executor_requirements,
)
from dagster_taskiq.aio.tracing import Tracing
from dagster_taskiq.config.schema import EXECUTOR_SCHEMA
from dagster_taskiq.config.settings import Settings
from dagster_taskiq.connections import find_servers
from dagster_taskiq.errors import SupersededLoopError
from dagster_taskiq.execution.event_batches import EventWriter, batched_events
from dagster_taskiq.execution.step_messages import StepPayloads
from dagster_taskiq.execution.storage_connections import kept_connections
from dagster_taskiq.execution.storage_patience import DatabasePatience, patient_connections
from dagster_taskiq.execution.tasks import EXIT_SUPERSEDED
from dagster_taskiq.loop.client import Client
from dagster_taskiq.loop.core_execution_loop import core_execution_loop
from dagster_taskiq.loop.dispatcher import Dispatcher
from dagster_taskiq.loop.eager import EagerDispatcher
from dagster_taskiq.telemetry.traces import find_tracing


@executor(
    name="taskiq",
    config_schema=EXECUTOR_SCHEMA,
    requirements=multiple_process_executor_requirements(),
)
def taskiq_executor(init_context: InitExecutorContext) -> TaskiqExecutor:
    """Execute each step of a run on a Taskiq worker.

    Set it as a job's executor, start workers with ``dagster-taskiq worker start``, and the job's
    steps run on them, in the queues and with the priorities that their tags ask for:

    .. code-block:: python

        from dagster import job
        from dagster_taskiq import taskiq_executor

        @job(executor_def=taskiq_executor)
        def my_job(): ...

    Without any configuration run and workers meet at an embedded server of their DAGSTER_HOME.
    Otherwise give the run and its workers the same settings:

    .. code-block:: yaml

        execution:
          config:
            broker: amqp://user:password@rabbitmq:5672//
            backend: redis://redis:6379/0
            max_concurrent: 20

    ``broker``, ``backend``, ``include``, ``config_source`` and ``retries`` have dagster-celery's
    names and meaning; ``default_queue``, ``max_concurrent``, ``tag_concurrency_limits``,
    ``lease_seconds`` and ``cancel_grace_seconds`` are described where the schema lists them.

    Steps exchange their values through IO managers, so those must keep them where every worker
    can read them: a shared file system, S3, GCS, ...
    """
    return TaskiqExecutor(Settings.from_config(init_context.executor_config))


class TaskiqExecutor(Executor):
    """Hands a plan to the execution loop; see ``taskiq_executor``."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._retries = RetryMode(settings.retries)

    @property
    def retries(self) -> RetryMode:
        """Whether steps are retried."""
        return self._retries

    def execute(
        self, plan_context: PlanOrchestrationContext, execution_plan: ExecutionPlan
    ) -> Iterator[DagsterEvent]:
        """Execute the plan's steps on workers; yields their events."""

        kept_seconds = self._settings.source.kept_connection_seconds
        patience = DatabasePatience(self._settings.server_patience_seconds)
        tracing = find_tracing()
        instance = plan_context.instance
        try:
            with (
                kept_connections(instance, kept_seconds),
                patient_connections(instance, patience),
                batched_events(instance, patience) as events,
            ):

                def open_dispatcher() -> Dispatcher:
                    return _open_dispatcher(self._settings, plan_context, events, tracing)

                yield from core_execution_loop(
                    plan_context,
                    execution_plan,
                    self._settings,
                    open_dispatcher,
                    StepPayloads(plan_context).of,
                    tracing=tracing,
                )
        except SupersededLoopError as error:
            # any exception would be written to the log as the end of a run that goes on elsewhere
            plan_context.log.warning(str(error))
            os._exit(EXIT_SUPERSEDED)


def _open_dispatcher(
    settings: Settings, context: PlanOrchestrationContext, events: EventWriter, tracing: Tracing
) -> Dispatcher:
    if settings.source.task_always_eager:
        return EagerDispatcher(
            events,
            database_idle_seconds=settings.source.kept_connection_seconds,
            patience_seconds=settings.server_patience_seconds,
            tracing=tracing,
        )
    instance, run_id = context.instance, context.run_id
    servers = find_servers(settings)
    if servers.notice:
        context.log.log(servers.notice_level, servers.notice)
    return Client(
        servers=servers,
        run_id=run_id,
        generation=instance.count_resume_run_attempts(run_id),
        is_resumable=instance.run_will_resume(run_id),
        lease_seconds=settings.lease_seconds,
        cancel_grace_seconds=settings.cancel_grace_seconds,
        events=events,
    )
