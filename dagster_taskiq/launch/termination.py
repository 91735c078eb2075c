"""Stops a run, wherever it is, and sees to its end where its own process cannot."""

from __future__ import annotations

import time
from dataclasses import dataclass

from dagster import DagsterInstance, DagsterRun

from dagster_taskiq.backend import TaskState
from dagster_taskiq.errors import ServerError
from dagster_taskiq.launch.background import Background
from dagster_taskiq.launch.run_client import RunClient

#: How often to look whether a cancelled run's process has ended.
LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Termination:
    """The termination of one run that has not finished.

    Attributes:
        task_id: of the run's present process.
        queue: that its task was sent to.
        patience_seconds: how long a process may live on that the backend has forgotten.
    """

    instance: DagsterInstance
    client: RunClient
    run_id: str
    task_id: str
    queue: str
    patience_seconds: float

    def carry_out(self, run: DagsterRun, background: Background) -> bool:
        """Stop the run; whether there was something to stop.

        Raises:
            ServerError: a server is away.
        """
        self.instance.report_run_canceling(run)
        reason = "The run was terminated"
        state = self.client.cancel(self.run_id, self.task_id, self.queue, reason)
        # if Dagster saw it start, the server was flushed and has forgotten who executes it
        is_forgotten = state is TaskState.CANCELLED and self._has_started()
        if state is TaskState.CLAIMED or is_forgotten:
            # its process ends the run as soon as its steps have stopped, if it still can
            deadline = time.monotonic() + (self.patience_seconds if is_forgotten else 0)
            background.repeat(
                f"end of run {self.run_id}",
                lambda: self._end_if_gone(deadline),
                LOOK_SECONDS,
                f"Cannot see to the end of run {self.run_id}, which was cancelled",
            )
            return True
        is_queued = state is TaskState.CANCELLED
        where = "before a worker had started it" if is_queued else "after its process had gone"
        return self._report_canceled(f"The run was cancelled {where}.")

    def _has_started(self) -> bool:
        record = self.instance.get_run_record_by_id(self.run_id)
        return record is not None and record.start_time is not None

    def _end_if_gone(self, deadline: float) -> bool:
        """Report the run as cancelled if its process is gone; True when the run is over."""
        if self._unfinished_run() is None:
            return True
        try:
            report, _ = self.client.look(self.run_id, self.task_id)
        except ServerError:
            return False
        if report.state is TaskState.CLAIMED or time.monotonic() < deadline:
            return False
        self._report_canceled("The run was cancelled; its process is gone.")
        return True

    def _unfinished_run(self) -> DagsterRun | None:
        run = self.instance.get_run_by_id(self.run_id)
        return None if run is None or run.is_finished else run

    def _report_canceled(self, message: str) -> bool:
        run = self._unfinished_run()
        if run is not None:
            self.instance.report_run_canceled(run, message)
        return run is not None
