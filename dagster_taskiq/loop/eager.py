"""``task_always_eager``: steps run in the calling process, through the same task code."""

from __future__ import annotations

import json
import os
import socket
from collections import deque
from collections.abc import Collection, Mapping, Sequence

from dagster_taskiq.aio.tracing import Tracing
from dagster_taskiq.aio.waker import Waker
from dagster_taskiq.backend.base import TaskReport, TaskState
from dagster_taskiq.execution.arrivals import Arrival
from dagster_taskiq.execution.event_batches import EventWriter
from dagster_taskiq.execution.tasks import TaskRunner
from dagster_taskiq.loop.dispatcher import Dispatcher, Inspection, StepTask
from dagster_taskiq.messages.attempt_ends import AttemptEnd
from dagster_taskiq.messages.queue_looks import QueueLook
from dagster_taskiq.messages.results import Place, TaskResult
from dagster_taskiq.messages.withheld_steps import Withheld


class EagerDispatcher(Dispatcher):
    """Runs one step at each ``wait``, the one of the highest priority first.

    Args:
        events: writes what the loop reports.
        keeps_connections: see ``TaskRunner``.
        patience_seconds: see ``TaskRunner``.
        tracing: see ``TaskRunner``.
    """

    def __init__(
        self,
        events: EventWriter,
        *,
        keeps_connections: bool,
        patience_seconds: float,
        tracing: Tracing | None = None,
    ) -> None:
        self._events = events
        host = socket.gethostname()
        self._place = Place(f"eager@{host}", "eager", host, os.getpid(), 0)
        self._waiting: deque[StepTask] = deque()
        self._waker = Waker()
        self._runner = TaskRunner(
            keeps_connections=keeps_connections, patience_seconds=patience_seconds, tracing=tracing
        )

    def open(self) -> None:
        """Do nothing: there are no servers."""

    def submit(self, tasks: Sequence[StepTask]) -> None:
        """See ``Dispatcher``."""
        self._events.flush()  # the runner has an instance of its own
        self._waiting.extend(tasks)
        self._waiting = deque(sorted(self._waiting, key=lambda task: -task.priority))

    def wait(self, timeout_seconds: float) -> list[tuple[str, TaskResult]]:
        """Run the next step, if one waits."""
        if not self._waiting:
            self._waker.wait(timeout_seconds)
            return []
        task = self._waiting.popleft()
        # what would not survive the way to a worker must not work here
        payload = json.loads(json.dumps(task.make_payload()))
        arrival = Arrival(task.queue, task.attempt, trace=task.trace)
        result = self._runner.execute_plan(payload, self._place, arrival)
        return [(task.task_id, TaskResult.from_bytes(result.to_bytes()))]

    def acknowledge(self, task_ids: Collection[str]) -> None:
        """Do nothing: no result is kept."""

    def inspect(self, tasks: Sequence[StepTask]) -> Inspection:
        """Report every task as waiting; none can be lost."""
        reports = {task.task_id: TaskReport(TaskState.UNKNOWN) for task in tasks}
        return Inspection(is_conclusive=False, reports=reports)

    def look_into(self, queue: str, tasks: Sequence[StepTask]) -> QueueLook:
        """Return nothing: there are no queues."""
        return QueueLook()

    def fetch(self, task_ids: Sequence[str]) -> list[tuple[str, TaskResult]]:
        """Return nothing: no result arrives unnoticed."""
        return []

    def cancel(self, tasks: Sequence[StepTask], reason: str) -> Mapping[str, TaskState]:
        """Forget what waits."""
        self._waiting.clear()
        return {task.task_id: TaskState.CANCELLED for task in tasks}

    def condemn(self, task_id: str) -> bool:
        """Return False: no task can be lost."""
        return False

    def reopen(self, task_id: str) -> bool:
        """Return False: no task can be lost."""
        return False

    def note_end(self, end: AttemptEnd) -> None:
        """Do nothing: there is no backend with a history."""

    def note_withheld(self, withheld: Withheld) -> None:
        """Do nothing: there is no backend to tell it."""

    def close(self, *, leave_running: bool = False) -> None:
        """Forget what waits."""
        self._waiting.clear()
        self._runner.close()
        self._waker.close()
