"""The stop of a run: its steps are told, and each is accounted for before the loop ends."""

from __future__ import annotations

from collections.abc import Iterator

from dagster import DagsterEvent

from dagster_taskiq._dagster.names import (
    ActiveExecution,
    DagsterRunStatus,
    EngineEventData,
)
from dagster_taskiq.backend.base import TaskState
from dagster_taskiq.errors import ServerError
from dagster_taskiq.loop.dispatcher import StepTask
from dagster_taskiq.loop.endings import Endings
from dagster_taskiq.loop.flights import LoopRun
from dagster_taskiq.loop.outages import Outages


class Stopping:
    """Stops the steps of one run.

    Args:
        run: see ``LoopRun``.
        active: is told of an interrupt.
        endings: withdraw what never started.
        outages: hear of servers that are away.
        stop_seconds: after which every worker has stopped its steps by itself.

    Attributes:
        leaves_steps_running: whether another loop of the run takes over.
    """

    def __init__(
        self,
        run: LoopRun,
        active: ActiveExecution,
        endings: Endings,
        outages: Outages,
        stop_seconds: float,
    ) -> None:
        self._context = run.context
        self._dispatcher = run.dispatcher
        self._flights = run.flights
        self._now = run.now
        self._active = active
        self._endings = endings
        self._outages = outages
        self._stop_seconds = stop_seconds
        self._to_cancel: list[StepTask] = []
        self._deadline = float("inf")
        self.leaves_steps_running = False

    @property
    def is_untold(self) -> bool:
        """Whether the order to stop has not reached the servers yet."""
        return bool(self._to_cancel)

    def interrupt(self) -> Iterator[DagsterEvent]:
        """A signal asks this process to end: stop the steps, unless another loop takes over."""
        instance, run_id = self._context.instance, self._context.run_id
        run = instance.get_run_by_id(run_id)
        is_cancelled = run is not None and run.status is DagsterRunStatus.CANCELING
        self._active.mark_interrupted()
        self._flights.is_stopping = True
        steps = [flight.step.key for flight in self._flights]
        if not is_cancelled and instance.run_will_resume(run_id):
            self.leaves_steps_running = True
            yield DagsterEvent.engine_event(
                self._context,
                "Received a termination signal; the steps go on, since the run will be resumed.",
                EngineEventData.interrupted(steps),
            )
            return
        yield DagsterEvent.engine_event(
            self._context,
            "Received a termination signal; stopping the steps on their workers.",
            EngineEventData.interrupted(steps),
        )
        self.begin()

    def begin(self) -> None:
        """Stop all steps: ``send_cancels`` tells the servers."""
        self._flights.is_stopping = True
        self._flights.drop_unsent()
        self._to_cancel = [flight.task for flight in self._flights]
        self._deadline = self._now() + self._stop_seconds

    def send_cancels(self) -> Iterator[DagsterEvent]:
        """Tell the servers to stop the steps, until they have heard it."""
        if not self._to_cancel:
            return
        try:
            states = self._dispatcher.cancel(self._to_cancel, "The run was terminated")
        except ServerError as error:
            yield from self._outages.note("cancel", error)
            return
        for task in self._to_cancel:
            flight = self._flights.find(task.task_id)
            if flight is not None and states[task.task_id] is TaskState.CANCELLED:
                yield from self._endings.note_withdrawn(flight)
        self._to_cancel = []
        self._outages.over("cancel")

    def give_up_if_unheard(self, now: float, *, is_answered: bool) -> Iterator[DagsterEvent]:
        """Forget all tasks once every worker has stopped its steps by itself, unheard.

        Args:
            is_answered: whether the servers have just said what they know of the tasks.
        """
        if now <= self._deadline or (is_answered and not self._to_cancel):
            return
        yield DagsterEvent.engine_event(
            self._context,
            "The servers have been away, or have refused, for longer than a lease: the workers "
            "have stopped the run's steps, though none could say so.",
            EngineEventData.interrupted([flight.step.key for flight in self._flights]),
        )
        for flight in self._flights:
            self._endings.note_unheard(flight)
