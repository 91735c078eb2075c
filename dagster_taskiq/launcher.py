"""``TaskiqRunLauncher``: Dagster's plug-in point for whole runs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from dagster import DagsterInstance, DagsterRun, MetadataValue
from typing_extensions import Self

from dagster_taskiq._dagster.names import (
    CheckRunHealthResult,
    ConfigurableClass,
    ConfigurableClassData,
    EngineEventData,
    LaunchRunContext,
    ResumeRunContext,
    RunLauncher,
    WorkerStatus,
)
from dagster_taskiq._dagster.run_table import add_run_tag, report_engine_event
from dagster_taskiq.backend import TaskReport, TaskState
from dagster_taskiq.config.schema import CONNECTION_SCHEMA
from dagster_taskiq.config.settings import Settings
from dagster_taskiq.connections import find_servers
from dagster_taskiq.defaults import QUEUE_WAIT_MARKER
from dagster_taskiq.errors import ServerError
from dagster_taskiq.execution.run_payloads import payload_of
from dagster_taskiq.launch.background import Background
from dagster_taskiq.launch.late_launches import LateLaunches
from dagster_taskiq.launch.launch_connections import LaunchConnections
from dagster_taskiq.launch.launch_watch import LaunchWatch
from dagster_taskiq.launch.run_client import RunClient
from dagster_taskiq.launch.termination import Termination
from dagster_taskiq.messages.attempt_ends import AttemptEnd, EndOutcome
from dagster_taskiq.messages.envelope import (
    Envelope,
    TaskName,
    run_task_id,
)
from dagster_taskiq.messages.queue_looks import queue_metadata, task_metadata
from dagster_taskiq.messages.queue_waits import QueueWait
from dagster_taskiq.messages.results import Outcome, TaskResult
from dagster_taskiq.servers.patience import is_passing
from dagster_taskiq.tags import TASK_ID_TAG, clamp_priority, run_priority, run_queue

logger = logging.getLogger(__name__)

#: How old may be what runs that are launched one after the other are told of the workers. To read
#: the list of a thousand workers takes longer than to launch a run.
_WAITS_SECONDS = 1.0


class TaskiqRunLauncher(RunLauncher[DagsterInstance], ConfigurableClass):
    """Executes each run in a process of its own on a Taskiq worker.

    .. code-block:: yaml

        run_launcher:
          module: dagster_taskiq.launcher
          class: TaskiqRunLauncher
          config:
            broker: {env: DAGSTER_TASKIQ_BROKER_URL}
            backend: {env: DAGSTER_TASKIQ_BACKEND_URL}
            default_queue: long-queue

    The settings are the executor's. A run's queue and priority are those of its tags
    ``dagster-taskiq/queue`` and ``dagster-taskiq/run_priority``. The time that it waits in its
    queue counts against the instance's ``start_timeout_seconds``.
    """

    def __init__(self, settings: Settings, inst_data: ConfigurableClassData | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._inst_data = inst_data
        self._settings = settings
        self._opened: tuple[RunClient, LaunchWatch] | None = None
        self._opening = threading.Lock()
        self._connections = LaunchConnections(settings.source.kept_connection_seconds)
        #: Tasks of runs that the history was told of as lost.
        self._lost: set[str] = set()
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._background = Background()
        self._late = LateLaunches(self._background, self._settings.server_patience_seconds)

    # --- configuration ---

    @property
    def inst_data(self) -> ConfigurableClassData | None:
        """Where Dagster keeps what this was configured with."""
        return self._inst_data

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        """The schema of ``config:`` in dagster.yaml."""
        return dict(CONNECTION_SCHEMA)

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData, config_value: Mapping[str, Any]
    ) -> Self:
        """Made by Dagster from dagster.yaml."""
        return cls(Settings.from_config(config_value), inst_data)

    @property
    def _client(self) -> RunClient:
        return self._open()[0]

    @property
    def _watch(self) -> LaunchWatch:
        return self._open()[1]

    def _open(self) -> tuple[RunClient, LaunchWatch]:
        with self._opening:
            if self._opened is None:
                servers = find_servers(self._settings)
                if servers.notice:
                    logger.log(servers.notice_level, servers.notice)
                client = RunClient(servers, self._background)
                watch = LaunchWatch(client, self._background, self._settings.lease_seconds)
                self._opened = client, watch
            return self._opened

    def dispose(self) -> None:
        """Leave the servers; runs that wait or are being cancelled are left to Dagster."""
        self._background.close()  # the end of all that belongs to it
        self._connections.close()
        with self._opening:
            if self._opened is not None:
                self._opened[0].close()
                self._opened = None
        self._begin_anew()  # it may be used again

    # --- launching ---

    def launch_run(self, context: LaunchRunContext) -> None:
        """Send a run to its queue, and again should the servers lose it before it begins.

        While a server is away the run goes back to Dagster's queue, or is sent later.

        Raises:
            ServerError: a server refuses, or was away for ``server_patience_seconds``; the launch
                has failed then.
            TagError: a tag of the run cannot be used.
        """
        run = context.dagster_run
        self._connections.keep(self._instance)
        is_sending = False
        try:
            epoch = self._client.reach(self._queue(run))
            is_sending = True
            self._launch(run, epoch)
        except ServerError as error:
            if not is_passing(error, has_worked=self._client.has_worked):
                raise
            self._late.put_off(
                self._instance, run, error, self._launch, may_have_been_sent=is_sending
            )

    def _launch(self, run: DagsterRun, epoch: str | None = None) -> None:
        envelope, wait = self._send(run, TaskName.EXECUTE_JOB, 0, epoch)
        self._watch.look_after(self._instance, envelope, wait)

    @property
    def supports_resume_run(self) -> bool:
        """A run whose process died is resumed in another one."""
        return True

    def resume_run(self, context: ResumeRunContext) -> None:
        """Send a run whose process died to its queue again; its steps are adopted.

        While a server is away it is sent later: its steps may be running.

        Raises:
            ServerError: a server refuses.
        """
        run = context.dagster_run
        number = context.resume_attempt_number
        if number is None:
            number = self._instance.count_resume_run_attempts(run.run_id)
        resume_number = number

        def send(run: DagsterRun, epoch: str | None = None) -> None:
            self._send(run, TaskName.RESUME_JOB, resume_number, epoch)

        try:
            send(run, self._client.reach(self._queue(run)))
        except ServerError as error:
            # it has been launched with these settings
            if not is_passing(error, has_worked=True):
                raise
            self._late.put_off_resume(self._instance, run, error, send)

    def _send(
        self, run: DagsterRun, name: TaskName, resume_number: int, epoch: str | None
    ) -> tuple[Envelope, QueueWait | None]:
        """Send a run; its task, and why it waits, where there is a reason.

        Args:
            epoch: the backend's, where it was just asked.
        """
        queue = self._queue(run)
        task_id = run_task_id(run.run_id, resume_number)
        payload, code_location = payload_of(self._instance, run)
        envelope = Envelope(
            task_id=task_id,
            name=name,
            run_id=run.run_id,
            step_key=None,
            attempt=resume_number,
            queue=queue,
            priority=clamp_priority(run_priority(run.tags)),
            lease_seconds=self._settings.lease_seconds,
            cancel_grace_seconds=self._settings.cancel_grace_seconds,
            epoch=epoch or self._client.epoch(),
            payload=payload,
            code_location=code_location,
            job=run.job_name,
        )
        # the tag first: whoever finds the run running must be able to find its task
        add_run_tag(self._instance, run, TASK_ID_TAG, task_id)
        self._client.submit(envelope)
        wait = self._report_sent(run, envelope)
        return envelope, wait

    def _report_sent(self, run: DagsterRun, envelope: Envelope) -> QueueWait | None:
        """Log that a run was sent, and why it waits, if there is a reason and it is known."""
        page = self._settings.page_of(run.run_id)
        queue, text = envelope.queue, f'Sent the run to queue "{envelope.queue}".'
        metadata: dict[str, Any] = {
            **({"dashboard": MetadataValue.url(page)} if page else {}),
            "queue": queue,
            "priority": envelope.priority,
            "task id": envelope.task_id,
        }
        wait = None
        with suppress(ServerError):  # the watch will say it
            waits = self._client.queue_waits(max_age_seconds=_WAITS_SECONDS)
            if wait := waits.of(queue):
                look = self._client.look_into(queue, envelope.task_id)
                text = f"{text} It waits. {wait.reason} {look.sentence(envelope.task_id)}".rstrip()
                metadata |= queue_metadata(queue, wait, look, waits.listeners(queue))
                metadata |= task_metadata(envelope.task_id, envelope.priority, look)
        text = f"[{type(self).__name__}] {text}"
        data = EngineEventData(metadata=metadata, marker_start=QUEUE_WAIT_MARKER)
        report_engine_event(self._instance, run, text, data)
        return wait

    def terminate(self, run_id: str) -> bool:
        """Stop a run, wherever it is.

        Returns:
            whether there was something to stop.
        """
        run = self._instance.get_run_by_id(run_id)
        if run is None or run.is_finished:
            return False
        termination = Termination(
            instance=self._instance,
            client=self._client,
            run_id=run_id,
            task_id=self._task_id(run),
            queue=self._queue(run),
            patience_seconds=self._settings.lease_seconds + self._settings.cancel_grace_seconds,
        )
        return termination.carry_out(run, self._background)

    # --- monitoring ---

    @property
    def supports_check_run_worker_health(self) -> bool:
        """Run monitoring can ask after a run's process."""
        return True

    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        """Whether the run's process lives, or how it ended.

        Raises:
            ServerError: the backend is away, which says nothing of the run.
        """
        task_id = self._task_id(run)
        report, result = self._client.look(run.run_id, task_id)
        if report.state is TaskState.UNKNOWN:
            status, reason = self._health_of_waiting(run, task_id)
        else:
            status, reason = _health(report, result)
            if report.state in (TaskState.EXPIRED, TaskState.LOST):
                self._note_lost(run, task_id, str(reason))
        return CheckRunHealthResult(status, reason, run_worker_id=task_id)

    def _note_lost(self, run: DagsterRun, task_id: str, reason: str) -> None:
        """Tell the history, once, of a run whose worker is gone; Dagster decides what follows."""
        if task_id in self._lost:
            return
        self._lost.add(task_id)
        self._client.note_end(
            AttemptEnd(
                task_id=task_id,
                run_id=run.run_id,
                step_key="",
                attempt=self._instance.count_resume_run_attempts(run.run_id),
                queue=self._queue(run),
                outcome=EndOutcome.LOST,
                ended_at=time.time(),
                job=run.job_name,
                reason=reason,
            )
        )

    def _health_of_waiting(self, run: DagsterRun, task_id: str) -> tuple[WorkerStatus, str | None]:
        """Of a run that no worker has claimed: it waits, or was lost with its server's memory."""
        why = self._why_it_waits(run)
        if not self._watch.is_lost(self._queue(run), run.run_id, task_id):
            return WorkerStatus.RUNNING, f"The run waits in its queue. {why}".rstrip()
        reason = "Neither a worker nor a queue has the run's task any more."
        return WorkerStatus.NOT_FOUND, f"{reason} {why}".rstrip()

    def _why_it_waits(self, run: DagsterRun) -> str:
        """Why a run that no worker has claimed waits; empty where there is no reason to be seen."""
        wait = self._client.queue_waits().of(self._queue(run))
        explained = self._client.explained(run.run_id, wait)
        return explained.reason if explained else ""

    def get_run_worker_debug_info(
        self, run: DagsterRun, include_container_logs: bool | None = True
    ) -> str | None:
        """Where the run's process is or was, for people."""
        del include_container_logs
        task_id = self._task_id(run)
        report, result = self._client.look(run.run_id, task_id)
        queue = self._queue(run)
        state = report.state.value
        if report.state is TaskState.UNKNOWN:
            why = self._why_it_waits(run) or f'Workers take runs from queue "{queue}".'
            state = f"no worker has taken it. {why}".rstrip(".")
        lines = [f'Task {task_id} in queue "{queue}": {state}.']
        place = result.place if result else report.place
        if place is not None:
            lines.append(
                f"Worker {place.worker}, host {place.host}, slot {place.slot}, pid {place.pid}."
            )
        if result is not None:
            lines.append(_ending(result))
        return "\n".join(lines)

    def _task_id(self, run: DagsterRun) -> str:
        """Of the run's present process; computed where the tag is not there (yet)."""
        known = run.tags.get(TASK_ID_TAG)
        if known is not None:
            return known
        return run_task_id(run.run_id, self._instance.count_resume_run_attempts(run.run_id))

    def _queue(self, run: DagsterRun) -> str:
        return run_queue(run.tags, self._settings.default_queue)


def _health(report: TaskReport, result: TaskResult | None) -> tuple[WorkerStatus, str | None]:
    if report.state is TaskState.CLAIMED:
        return WorkerStatus.RUNNING, None
    if report.state is TaskState.DONE:
        if result is None:
            return WorkerStatus.NOT_FOUND, "The run's process has ended; how is not known any more."
        if result.outcome is Outcome.FINISHED and not result.exit_code:
            return WorkerStatus.SUCCESS, None
        return WorkerStatus.FAILED, _ending(result)
    return WorkerStatus.NOT_FOUND, _why_nobody_has_it(report, result)


def _why_nobody_has_it(report: TaskReport, result: TaskResult | None) -> str:
    if report.state is TaskState.CANCELLED:
        return "The run was cancelled before a worker had started it."
    if report.state is TaskState.REFUSED:
        return f"A worker gave the run back. {result.reason if result else ''}".rstrip()
    return "The run's worker is gone: its lease ended without a result."


def _ending(result: TaskResult) -> str:
    if result.reason:
        return result.reason
    if result.error is not None:
        return str(result.error.get("message", "The run's process could not be started."))
    return f"The run's process ended with exit code {result.exit_code}."
