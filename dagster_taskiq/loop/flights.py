"""What the parts of a loop share: the run, and its attempts that are under way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from dagster_taskiq._dagster.names import (
    ExecutionStep,
    InstanceConcurrencyContext,
    PlanOrchestrationContext,
)
from dagster_taskiq.aio.tracing import NO_ATTEMPT_TRACE, NO_RUN_TRACE, AttemptTrace, RunTrace
from dagster_taskiq.aio.vigil import AbsenceWatch
from dagster_taskiq.loop.claim_watch import ClaimWatch
from dagster_taskiq.loop.dispatcher import Dispatcher, StepTask
from dagster_taskiq.messages.queue_waits import WaitHistory
from dagster_taskiq.messages.results import Place


@dataclass
class Flight:
    """A task that was sent, or is about to be, and has not come back. Times are monotonic seconds.

    Attributes:
        attempt_in_run: number of the attempt in this run, from 1. ``task.attempt`` also counts the
            attempts of the run that this one executes again.
        sent_at: of the last time it was sent.
        sent_on: the same in seconds since the epoch; None where this process has not sent it.
        claim: what was seen of the claim on it.
        place: where it was last seen running.
        absence: for how long neither broker nor backend know it.
        waits: what the log says of why it waits.
        refusals: why each worker that gave the task back cannot execute it, by its name.
        refused_since: when the first of them did.
        trace: the attempt's.
    """

    task: StepTask
    step: ExecutionStep
    attempt_in_run: int
    sent_at: float
    claim: ClaimWatch
    sent_on: float | None = None
    place: Place | None = None
    absence: AbsenceWatch = field(default_factory=AbsenceWatch)
    waits: WaitHistory = field(default_factory=WaitHistory)
    refusals: dict[str, str] = field(default_factory=dict)
    refused_since: float | None = None
    trace: AttemptTrace = NO_ATTEMPT_TRACE

    @property
    def task_id(self) -> str:
        """Of its task."""
        return self.task.task_id


class Flights:
    """All flights of one run, by their task ids.

    Args:
        concurrency: has the pool slots that their steps hold.

    Attributes:
        unsent: the tasks of those that are still to be sent, the next one first.
        count_when_taken: how many there were when ready steps were last taken, with these.
        is_stopping: whether all are to end: none is sent, sent again or retried.
    """

    def __init__(self, concurrency: InstanceConcurrencyContext) -> None:
        self._concurrency = concurrency
        self._by_id: dict[str, Flight] = {}
        self.unsent: list[StepTask] = []
        self.count_when_taken = 0
        self.is_stopping = False

    def add(self, flight: Flight) -> None:
        """An attempt is under way from now on."""
        self._by_id[flight.task_id] = flight

    def find(self, task_id: str) -> Flight | None:
        """The flight of a task, unless it is over or was never one of this run."""
        return self._by_id.get(task_id)

    def sent(self) -> list[Flight]:
        """Those whose tasks a server should know of."""
        unsent = {task.task_id for task in self.unsent}
        return [flight for flight in self if flight.task_id not in unsent]

    def end(self, flight: Flight) -> None:
        """It is over; the event of its end frees its pool slot."""
        del self._by_id[flight.task_id]
        # one that was to be sent again may have come back from a message that was thought lost
        self.unsent = [task for task in self.unsent if task.task_id != flight.task_id]

    def drop(self, flight: Flight) -> None:
        """Forget one whose task is known not to run, without an event of its end."""
        self.end(flight)
        self._concurrency.free_step(flight.step.key)

    def drop_unsent(self) -> None:
        """Forget those that were not sent."""
        unsent, self.unsent = self.unsent, []
        for task_id in {task.task_id for task in unsent}:
            flight = self._by_id[task_id]
            flight.trace.ended("cancelled", "The run was stopped before the step was sent.")
            self.drop(flight)

    def __contains__(self, flight: Flight) -> bool:
        return flight.task_id in self._by_id

    def __iter__(self) -> Iterator[Flight]:
        return iter(list(self._by_id.values()))

    def __len__(self) -> int:
        return len(self._by_id)


@dataclass(frozen=True)
class LoopRun:
    """One run, as the parts of its loop share it.

    Attributes:
        context: of the run, in whose name events are made.
        dispatcher: carries its steps to workers.
        flights: its attempts that are under way.
        now: the clock, in monotonic seconds.
        trace: the run's.
    """

    context: PlanOrchestrationContext
    dispatcher: Dispatcher
    flights: Flights
    now: Callable[[], float]
    trace: RunTrace = NO_RUN_TRACE
