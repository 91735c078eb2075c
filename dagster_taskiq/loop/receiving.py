"""The way back: results of workers, and tasks that a worker gives back for another one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from dagster import DagsterEvent

from dagster_taskiq._dagster.names import EngineEventData
from dagster_taskiq.defaults import FOREIGN_WORKERS_SECONDS
from dagster_taskiq.loop.endings import Endings
from dagster_taskiq.loop.flights import Flight, LoopRun
from dagster_taskiq.loop.sending import Sending
from dagster_taskiq.messages.results import Outcome, TaskResult


class Receiving:
    """Receives what comes back to one run.

    Args:
        run: whose log says which workers give a task back.
        endings: end those that come back with a result.
        sending: sends again what was given back.
    """

    def __init__(self, run: LoopRun, endings: Endings, sending: Sending) -> None:
        self._context = run.context
        self._dispatcher = run.dispatcher
        self._flights = run.flights
        self._now = run.now
        self._endings = endings
        self._sending = sending

    def receive(self, results: Sequence[tuple[str, TaskResult]]) -> Iterator[DagsterEvent]:
        """Take results, by task id."""
        for task_id, result in results:
            flight = self._flights.find(task_id)
            if flight is None:
                continue  # a second copy of what the reconciliation has fetched, or of a lost one
            if result.outcome is Outcome.REFUSED:
                yield from self._take_back(flight, result)
            else:
                yield from self._finish(flight, result)

    def _finish(self, flight: Flight, result: TaskResult) -> Iterator[DagsterEvent]:
        yield from self._endings.finish(flight, result)
        self._dispatcher.acknowledge([flight.task_id])

    def _take_back(self, flight: Flight, result: TaskResult) -> Iterator[DagsterEvent]:
        """A worker could not execute a task: the reconciliation sends it again, for another one."""
        if self._context.instance.get_run_by_id(self._context.run_id) is None:
            reason = "The run has been deleted from Dagster's instance: its steps do not start."
            failed = replace(result, outcome=Outcome.ERROR, reason=reason)
            yield from self._finish(flight, failed)
            return
        if self._flights.is_stopping:
            yield from self._endings.note_withdrawn(flight)
            return
        if result.queue:
            yield from self._move(flight, result)
            return
        if flight.refused_since is None:
            flight.refused_since = self._now()
        worker = result.place.worker
        if worker not in flight.refusals:
            flight.refusals[worker] = result.reason
            yield DagsterEvent.engine_event(
                self._context.for_step(flight.step),
                f'Step "{flight.step.key}" waits for another worker: {worker} has given it back. '
                f"{result.reason}",
                EngineEventData(metadata={"queue": flight.task.queue}),
            )

    def _move(self, flight: Flight, result: TaskResult) -> Iterator[DagsterEvent]:
        """Have the reconciliation send a task to another queue, as somebody has asked."""
        old, new = flight.task.queue, result.queue
        flight.task = replace(flight.task, queue=new)
        if old != new:
            yield DagsterEvent.engine_event(
                self._context.for_step(flight.step),
                f'Step "{flight.step.key}" moves from queue "{old}" to queue "{new}". '
                f"{result.reason}",
                EngineEventData(metadata={"queue": new}),
            )

    def send_to_another(self, flight: Flight) -> Iterator[DagsterEvent]:
        """Send a task again that a worker has given back, for a while."""
        now = self._now()
        if self._flights.is_stopping:
            return  # it is being cancelled
        if flight.refused_since and now - flight.refused_since >= FOREIGN_WORKERS_SECONDS:
            reasons = " ".join(f"Worker {name}: {why}" for name, why in flight.refusals.items())
            yield from self._endings.fail_unexecuted(flight, f"Each worker gave it back. {reasons}")
        elif self._dispatcher.reopen(flight.task_id):
            self._sending.repeat(flight)
