"""Looks after launched runs that have not begun.

It says why they wait, sends lost and refused ones again, and fails those that no worker can
execute.

Dagster looks at nothing but the age of a run that is STARTING, and fails it after
``start_timeout_seconds``. A queued run is lost when its server is flushed, its queue is
purged, or a server that keeps nothing on disk restarts.

The process that has launched a run looks after it, as long as that process lives. A run that is
sent twice by mistake is still executed once: the task is the same one, so one worker claims it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial

from dagster import DagsterInstance, DagsterRun, DagsterRunStatus, RunsFilter

from dagster_taskiq._dagster.names import EngineEventData
from dagster_taskiq.aio.vigil import AbsenceWatch
from dagster_taskiq.backend import TaskState
from dagster_taskiq.defaults import (
    FOREIGN_WORKERS_SECONDS,
    IN_HAND_SECONDS,
    TURN_REASON_SECONDS,
)
from dagster_taskiq.errors import LauncherClosedError, UnreachableServerError
from dagster_taskiq.launch.background import Background
from dagster_taskiq.launch.run_client import RunClient
from dagster_taskiq.messages.envelope import Envelope
from dagster_taskiq.messages.queue_looks import queue_metadata, task_metadata
from dagster_taskiq.messages.queue_waits import Listeners, QueueWait, WaitHistory, WaitKind
from dagster_taskiq.messages.results import TaskResult

logger = logging.getLogger(__name__)

#: How often to look after runs that wait to be started.
LOOK_SECONDS = 5.0

#: States of a run's task that no worker holds. A claim that has ended before the run began is as
#: good as none: its message is delivered again, unless the server has lost that too.
_NOT_HELD = (TaskState.UNKNOWN, TaskState.EXPIRED)


@dataclass
class _Launched:
    """A run's task, and what its log says of why it waits.

    Attributes:
        refusals: why each worker that gave the run back cannot execute it, by its name.
        refused_since: when the first of them did, on the watch's clock.
    """

    envelope: Envelope
    sent_at: float
    waits: WaitHistory
    refusals: dict[str, str] = field(default_factory=dict)
    refused_since: float | None = None


class LaunchWatch:
    """Watches the runs that were launched over one connection to the servers.

    Args:
        client: that connection.
        background: where the looks are made.
        lease_seconds: within which a live worker claims again what the backend has forgotten.
        now: the clock, in seconds; another one for tests.
    """

    def __init__(
        self,
        client: RunClient,
        background: Background,
        lease_seconds: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._now = now
        self._client = client
        self._background = background
        self._patience_seconds = max(lease_seconds, IN_HAND_SECONDS)
        #: By task id, of those that no server has known at the last look.
        self._absences: dict[str, AbsenceWatch] = {}
        self._waiting: dict[str, _Launched] = {}
        self._lock = threading.Lock()

    def is_lost(self, queue: str, run_id: str, task_id: str) -> bool:
        """Whether no server has known a run's task for as long as a worker could be silent of it.

        As far as these calls have seen: nothing is lost at the first one. The time is counted anew
        in a new epoch, in which workers must have had the time to claim again what they execute.

        Args:
            queue: that it was sent to.

        Raises:
            ServerError: a server is away.
        """
        absent = partial(self._client.absent, queue, [task_id])
        return self._is_lost(run_id, task_id, absent, self._now())

    def _is_lost(
        self, run_id: str, task_id: str, absent: Callable[[], set[str]], now: float
    ) -> bool:
        # an outage during this look ends the absence, as every sign of the run does
        absence = self._absences.pop(task_id, None) or AbsenceWatch()
        if task_id not in absent():
            return False
        epoch, state = self._client.state_of(run_id, task_id)
        if state not in _NOT_HELD:
            return False
        absence.miss(now, epoch)
        self._absences[task_id] = absence
        return absence.seconds(now) >= self._patience_seconds

    def look_after(
        self, instance: DagsterInstance, envelope: Envelope, told: QueueWait | None = None
    ) -> None:
        """Until a launched run has begun: say why it waits, and send it again should it be lost.

        Args:
            envelope: its task, which was sent.
            told: what the run's log says already of why it waits.
        """
        waits = WaitHistory(told.kind if told else None)
        with self._lock:
            self._waiting[envelope.run_id] = _Launched(envelope, self._now(), waits)
        self._background.repeat(
            "launch-watch",
            lambda: self._look(instance),
            LOOK_SECONDS,
            "Cannot look after runs that wait to be started",
        )

    def _look(self, instance: DagsterInstance) -> bool:
        """Look after all that wait; whether none does."""
        with self._lock:
            launched = list(self._waiting)
        starting = RunsFilter(run_ids=launched, statuses=[DagsterRunStatus.STARTING])
        runs = {run.run_id: run for run in instance.get_runs(starting)}
        with self._lock:
            for run_id in launched:
                if run_id not in runs:
                    self._absences.pop(self._waiting.pop(run_id).envelope.task_id, None)
            # in the order in which they were launched, which is their queues' too
            waiting = [it for run_id, it in self._waiting.items() if run_id in runs]
        if not waiting:
            return True
        now = self._now()
        found, lost = self._find_lost(waiting, now)
        if not found:
            return False
        queues = self._client.queue_waits()

        def act(it: _Launched) -> None:
            run = runs[it.envelope.run_id]
            queue = it.envelope.queue
            wait = self._client.explained(run.run_id, queues.of(queue))
            # what a worker refuses was not lost: it has said why it does not want it
            if it.envelope.task_id in lost and not (wait and wait.kind is WaitKind.REFUSED):
                self._send_again(instance, run, it.envelope)
            report, result = self._client.look(run.run_id, it.envelope.task_id)
            listeners = queues.listeners(queue)
            self._explain_wait(instance, run, it, wait, listeners, now, report.state)
            if report.state is TaskState.REFUSED:
                self._look_after_refused(instance, run, it, now, result)

        _each(found, act)
        return False

    def _find_lost(
        self, waiting: Sequence[_Launched], now: float
    ) -> tuple[list[_Launched], set[str]]:
        """The runs that could be looked at, and the ids of the lost tasks among theirs.

        RabbitMQ cannot tell that a run is missing from a queue in which another one waits. What was
        lost together must be found lost together, at one moment and before any of it is sent.
        """
        lost: set[str] = set()
        by_queue: dict[str, list[str]] = {}
        for it in waiting:
            by_queue.setdefault(it.envelope.queue, []).append(it.envelope.task_id)

        @cache
        def absent(queue: str) -> set[str]:
            return self._client.absent(queue, by_queue[queue])

        def look(it: _Launched) -> None:
            envelope = it.envelope
            absent_there = partial(absent, envelope.queue)
            if self._is_lost(envelope.run_id, envelope.task_id, absent_there, now):
                lost.add(envelope.task_id)

        return _each(waiting, look), lost

    def _explain_wait(
        self,
        instance: DagsterInstance,
        run: DagsterRun,
        launched: _Launched,
        wait: QueueWait | None,
        listeners: Listeners,
        now: float,
        state: TaskState,
    ) -> None:
        """Say why a run waits; fail it where no worker of its queue can ever execute it."""
        envelope, waited_seconds = launched.envelope, now - launched.sent_at
        is_said_to_wait = wait is not None or waited_seconds > TURN_REASON_SECONDS
        if is_said_to_wait and state is not TaskState.UNKNOWN:  # claimed or given back by a worker
            launched.waits.news(None, waited_seconds, now)
            return
        if news := launched.waits.news(wait, waited_seconds, now, listeners):
            look = self._client.look_into(envelope.queue, envelope.task_id)
            instance.report_engine_event(
                f"The run waits. {news.reason} {look.sentence(envelope.task_id)}".rstrip(),
                run,
                EngineEventData(
                    metadata={
                        **queue_metadata(envelope.queue, news, look, listeners),
                        **task_metadata(envelope.task_id, envelope.priority, look),
                    }
                ),
            )
        if wait and launched.waits.is_hopeless(now):
            self._fail_unexecuted(instance, run, envelope, wait.reason)

    def _look_after_refused(
        self,
        instance: DagsterInstance,
        run: DagsterRun,
        launched: _Launched,
        now: float,
        result: TaskResult | None,
    ) -> None:
        """Send a run again that a worker with another instance has given back, for a while."""
        envelope = launched.envelope
        if result is not None and result.queue:
            self._move(instance, run, launched, result)
            return
        if launched.refused_since is None:
            launched.refused_since = now
        if result is not None and result.place.worker not in launched.refusals:
            launched.refusals[result.place.worker] = result.reason
            instance.report_engine_event(
                f"The run waits for another worker: {result.place.worker} has given it back. "
                f"{result.reason}",
                run,
                EngineEventData(metadata={"queue": envelope.queue}),
            )
        if now - launched.refused_since < FOREIGN_WORKERS_SECONDS:
            if self._client.reopen(run.run_id, envelope.task_id):
                self._client.submit(replace(envelope, epoch=self._client.epoch()))
            return
        reasons = " ".join(f"Worker {name}: {why}" for name, why in launched.refusals.items())
        self._fail_unexecuted(instance, run, envelope, f"Each worker gave it back. {reasons}")

    def _move(
        self, instance: DagsterInstance, run: DagsterRun, launched: _Launched, result: TaskResult
    ) -> None:
        """Send a run to another queue, as somebody has asked."""
        envelope = launched.envelope
        if not self._client.reopen(run.run_id, envelope.task_id):
            return
        launched.envelope = replace(envelope, queue=result.queue, epoch=self._client.epoch())
        self._client.submit(launched.envelope)
        instance.report_engine_event(
            f'The run moves from queue "{envelope.queue}" to queue "{result.queue}". '
            f"{result.reason}",
            run,
            EngineEventData(metadata={"queue": result.queue}),
        )

    def _fail_unexecuted(
        self, instance: DagsterInstance, run: DagsterRun, envelope: Envelope, reason: str
    ) -> None:
        """Fail a run that no worker has begun, unless one has by now."""
        state = self._client.cancel(run.run_id, envelope.task_id, envelope.queue, reason)
        if state is TaskState.CANCELLED:
            instance.report_run_failed(run, f"The run was not executed. {reason}")

    def _send_again(self, instance: DagsterInstance, run: DagsterRun, envelope: Envelope) -> None:
        self._client.submit(replace(envelope, epoch=self._client.epoch()))
        self._absences.pop(envelope.task_id, None)
        instance.report_engine_event(
            f'No server knew of the run any more; sent it to queue "{envelope.queue}" again.',
            run,
            EngineEventData(metadata={"queue": envelope.queue, "task id": envelope.task_id}),
        )


def _each(launched: Sequence[_Launched], look: Callable[[_Launched], None]) -> list[_Launched]:
    """Look at each run; those where it has succeeded.

    An error of one run is logged, and the others have their turn. Where a server does not answer
    for a queue, the other runs of that queue are left to the next look: each would only wait for
    the same timeout.

    Raises:
        LauncherClosedError: the launcher has left its servers.
    """
    done: list[_Launched] = []
    silent: set[str] = set()
    for it in launched:
        run_id, queue = it.envelope.run_id, it.envelope.queue
        if queue in silent:
            continue
        try:
            look(it)
        except LauncherClosedError:
            raise
        except Exception as error:
            if isinstance(error, UnreachableServerError):
                silent.add(queue)
            text = f"{type(error).__name__}: {error}"
            logger.warning("Cannot look after run %s, which waits to be started: %s", run_id, text)
        else:
            done.append(it)
    return done
