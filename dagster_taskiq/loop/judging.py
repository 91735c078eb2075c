"""Judging a task that nobody works on any more and that has no result, by Dagster's log."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property

from dagster import DagsterEvent, DagsterInstance

from dagster_taskiq._dagster.names import EngineEventData
from dagster_taskiq._dagster.replay import is_end_of_attempt
from dagster_taskiq.backend.base import TaskState
from dagster_taskiq.execution.attempt_log import (
    has_started,
    last_place,
    of_attempt,
    read_steps_log,
)
from dagster_taskiq.loop.dispatcher import Inspection
from dagster_taskiq.loop.endings import Endings
from dagster_taskiq.loop.flights import Flight, LoopRun
from dagster_taskiq.loop.sending import Sending
from dagster_taskiq.messages.results import NOWHERE, Outcome, Place, TaskResult

#: States of a task that nobody works on and that has not ended.
_MAY_REOPEN = (TaskState.UNKNOWN, TaskState.EXPIRED, TaskState.DROPPED)


class Judge:
    """Judges the lost tasks of one run.

    Args:
        run: see ``LoopRun``.
        endings: end what was lost.
        sending: sends again what never started.
    """

    def __init__(self, run: LoopRun, endings: Endings, sending: Sending) -> None:
        self._context = run.context
        self._dispatcher = run.dispatcher
        self._flights = run.flights
        self._endings = endings
        self._sending = sending

    def judge(
        self, flight: Flight, state: TaskState, inspection: Inspection, log: RunLog
    ) -> Iterator[DagsterEvent]:
        """Decide over a task.

        What Dagster's log says of the attempt decides: its end counts as its result, a start
        without an end makes it a failure, and one that never started is sent again.

        Args:
            state: of the task, by the inspection.
            log: read after the inspection.
        """
        ended = log.has_ended(flight)
        has_started = ended or log.has_started(flight)
        is_stopping = self._flights.is_stopping
        if state is TaskState.CANCELLED and is_stopping and not has_started:
            yield from self._endings.note_withdrawn(flight)
            return
        if state is TaskState.CANCELLED and not has_started:
            reason = "It was cancelled by an order before a worker had started it."
            cancelled = TaskResult(Outcome.ERROR, NOWHERE, reason=reason, is_cancelled=True)
            yield from self._endings.finish(flight, cancelled)
            return
        may_reopen = state in _MAY_REOPEN and not is_stopping
        if may_reopen and not has_started:
            if self._dispatcher.reopen(flight.task_id):
                yield from self._send_again(flight)
            return
        is_over = ended or state is TaskState.DONE
        if not self._dispatcher.condemn(flight.task_id) and not is_over:
            return  # it is claimed or has its result after all
        begun_at = log.place_of(flight)
        lost = TaskResult(
            Outcome.DIED,
            flight.place or NOWHERE if begun_at == NOWHERE else begun_at,
            reason=_reason_of_loss(flight, inspection, begun_at),
        )
        yield from self._endings.finish(flight, lost)

    def _send_again(self, flight: Flight) -> Iterator[DagsterEvent]:
        yield DagsterEvent.engine_event(
            self._context.for_step(flight.step),
            f'Sending step "{flight.step.key}" to queue "{flight.task.queue}" again: its task '
            "disappeared before a worker had started it.",
            EngineEventData(metadata={"task id": flight.task_id}),
        )
        self._sending.repeat(flight)


class RunLog:
    """Dagster's log of a run's attempts: all of it is read, once, at the first question."""

    def __init__(self, instance: DagsterInstance, run_id: str) -> None:
        self._instance = instance
        self._run_id = run_id

    @cached_property
    def _events(self) -> dict[str, list[DagsterEvent]]:
        by_step: dict[str, list[DagsterEvent]] = defaultdict(list)
        for entry in read_steps_log(self._instance, self._run_id):
            event = entry.get_dagster_event()
            by_step[event.step_key or ""].append(event)
        return by_step

    def _of(self, flight: Flight) -> list[DagsterEvent]:
        return of_attempt(flight.attempt_in_run, self._events.get(flight.step.key, ()))

    def place_of(self, flight: Flight) -> Place:
        """Where a worker has last begun with the attempt; ``NOWHERE`` if none has."""
        return last_place(self._of(flight))

    def has_ended(self, flight: Flight) -> bool:
        """Whether the end of the attempt is there."""
        return any(is_end_of_attempt(event) for event in self._of(flight))

    def has_started(self, flight: Flight) -> bool:
        """Whether the log says more of the attempt than that it was sent."""
        return has_started(self._of(flight))


def _reason_of_loss(flight: Flight, inspection: Inspection, begun_at: Place) -> str:
    """Why an attempt that a worker had begun has no result and no claim any more.

    Args:
        begun_at: where Dagster's log has it; ``NOWHERE`` if it has not begun.
    """
    held_at = flight.place
    if begun_at != NOWHERE and held_at is not None and _slot(held_at) != _slot(begun_at):
        return (
            f"Worker {held_at.worker} (slot {held_at.slot}) was given its task too, and its claim, "
            "but has not begun: the first claim was deleted from the backend, or had expired."
        )
    if inspection.trouble and inspection.troubled_at > max(flight.claim.seen_at, flight.sent_at):
        return (
            "Its lease could not be renewed, so that it was stopped or is taken for lost: "
            f"{inspection.trouble}"
        )
    if flight.claim.has_vanished:
        return (
            "Its claim was gone before its lease had ended, so that its worker has stopped it: the "
            "backend's clock was set forward, or the key was deleted."
        )
    return "The worker is gone: its lease on this attempt ended without a result."


def _slot(place: Place) -> tuple[str, int]:
    return place.worker, place.slot
