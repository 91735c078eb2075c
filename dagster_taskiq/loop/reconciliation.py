"""The reconciliation: what the loop waits for, compared with what broker and backend know.

It heals a wake-up that was lost, has lost tasks judged, and says why tasks wait.
"""

from __future__ import annotations

from collections.abc import Iterator

from dagster import DagsterEvent

from dagster_taskiq.backend.base import TaskState
from dagster_taskiq.defaults import IN_HAND_SECONDS, RECONCILE_SECONDS
from dagster_taskiq.errors import ServerError
from dagster_taskiq.loop.dispatcher import Inspection
from dagster_taskiq.loop.endings import Endings
from dagster_taskiq.loop.flights import Flight, LoopRun
from dagster_taskiq.loop.judging import Judge, RunLog
from dagster_taskiq.loop.outages import Outages
from dagster_taskiq.loop.receiving import Receiving
from dagster_taskiq.loop.stopping import Stopping
from dagster_taskiq.loop.waiting import Waiting
from dagster_taskiq.messages.results import TaskResult


class Reconciliation:
    """Looks after the flights of one run.

    Args:
        run: see ``LoopRun``.
        outages: hear of servers that are away.
        receiving: takes results that no wake-up has brought, and what workers gave back.
        endings: end what no worker can execute.
        judge: decides over what was lost.
        stopping: is told whether the servers have answered.
        waiting: tells why tasks wait.

    Attributes:
        due_at: when it looks again, by the run's clock.
    """

    def __init__(
        self,
        run: LoopRun,
        outages: Outages,
        receiving: Receiving,
        endings: Endings,
        judge: Judge,
        stopping: Stopping,
        waiting: Waiting,
    ) -> None:
        self._context = run.context
        self._dispatcher = run.dispatcher
        self._flights = run.flights
        self._now = run.now
        self._outages = outages
        self._receiving = receiving
        self._endings = endings
        self._judge = judge
        self._stopping = stopping
        self._waiting = waiting
        self.due_at = run.now() + RECONCILE_SECONDS

    def reconcile(self) -> Iterator[DagsterEvent]:
        """Look after what was sent, if it is time."""
        now = self._now()
        if now < self.due_at:
            return
        self.due_at = now + RECONCILE_SECONDS
        flights = self._flights.sent()
        if self._flights.is_stopping:
            self._waiting.forget_withheld()
        else:
            yield from self._waiting.tell_of_withheld()
        if not flights:
            return
        try:
            inspection = self._dispatcher.inspect([flight.task for flight in flights])
            self._outages.over("inspect")
            yield from self._receiving.receive(self._fetch_results(inspection))
            # one for all that are judged: after an outage there may be hundreds
            log = RunLog(self._context.instance, self._context.run_id)
            for flight in flights:
                if flight in self._flights:
                    self._look_at_claim(flight, inspection, asked_at=now)
                    yield from self._compare(flight, inspection, log)
            yield from self._waiting.tell(inspection)
        except ServerError as error:
            yield from self._outages.note("inspect", error)
            is_answered = False
        else:
            is_answered = True
        yield from self._stopping.give_up_if_unheard(now, is_answered=is_answered)

    def _fetch_results(self, inspection: Inspection) -> list[tuple[str, TaskResult]]:
        """The stored results that no wake-up has brought."""
        with_result = (TaskState.DONE, TaskState.REFUSED)
        done = [key for key, report in inspection.reports.items() if report.state in with_result]
        return self._dispatcher.fetch(done) if done else []

    def _look_at_claim(self, flight: Flight, inspection: Inspection, asked_at: float) -> None:
        report = inspection.reports[flight.task_id]
        now = self._now()
        if report.state is TaskState.CLAIMED:
            flight.place = report.place
            flight.claim.see(asked_at, report.lease_left_seconds)
        else:
            flight.claim.miss(now, is_expired=report.state is TaskState.EXPIRED)
        self.due_at = min(self.due_at, flight.claim.next_look_at(now))

    def _compare(
        self, flight: Flight, inspection: Inspection, log: RunLog
    ) -> Iterator[DagsterEvent]:
        """Act on what broker and backend know of one task."""
        state = inspection.reports[flight.task_id].state
        if state is TaskState.UNKNOWN:
            yield from self._look_after_waiting(flight, inspection, log)
            return
        flight.absence.see()
        if state is TaskState.CLAIMED:
            return
        if state is TaskState.REFUSED:
            yield from self._receiving.send_to_another(flight)
            return
        is_over = state is not TaskState.EXPIRED or flight.claim.is_over(self._now())
        # DONE here means that the result is gone: the log has what came of it
        if state in (TaskState.DONE, TaskState.DROPPED) or (inspection.is_conclusive and is_over):
            yield from self._judge.judge(flight, state, inspection, log)

    def _look_after_waiting(
        self, flight: Flight, inspection: Inspection, log: RunLog
    ) -> Iterator[DagsterEvent]:
        """A task that no worker has claimed waits in its queue, or has vanished from there."""
        now = self._now()
        if flight.task_id in inspection.absent:
            flight.absence.miss(now)
        else:
            flight.absence.see()
        if (
            flight.absence.seconds(now) > IN_HAND_SECONDS
            and inspection.is_conclusive
            and (flight.claim.is_over(now) or not flight.claim.was_seen)
        ):
            yield from self._judge.judge(flight, TaskState.UNKNOWN, inspection, log)
            return
        self._waiting.note(flight, inspection)
        wait = inspection.waits.get(flight.task.queue)
        # no worker of its queue can ever execute it
        if wait is not None and flight.waits.is_hopeless(now):
            yield from self._endings.fail_unexecuted(flight, wait.reason)
