"""Attempts that were sent and have not come back, and what Dagster's log says of them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property

from dagster import DagsterEvent, DagsterInstance

from dagster_taskiq._dagster.names import (
    ExecutionStep,
    SerializableErrorInfo,
    plain_error,
)
from dagster_taskiq._dagster.replay import is_end_of_attempt
from dagster_taskiq.aio.vigil import AbsenceWatch
from dagster_taskiq.execution.attempt_log import (
    has_started,
    last_place,
    of_attempt,
    read_steps_log,
)
from dagster_taskiq.loop.claim_watch import ClaimWatch
from dagster_taskiq.loop.dispatcher import Inspection, StepTask
from dagster_taskiq.messages.queue_waits import WaitHistory
from dagster_taskiq.messages.results import NOWHERE, Outcome, Place, TaskResult


@dataclass
class Flight:
    """A task that was sent and has not come back.

    Attributes:
        attempt_in_run: number of the attempt in this run, from 1. ``task.attempt`` also counts the
            attempts of the run that this one executes again.
        sent_at: monotonic seconds; of the last time it was sent.
        claim: what was seen of the claim on it.
        place: where it was last seen running.
        absence: for how long neither broker nor backend know it.
        waits: what the log says of why it waits.
        refusals: why each worker that gave the task back cannot execute it, by its name.
        refused_since: when the first of them did, in monotonic seconds.
    """

    task: StepTask
    step: ExecutionStep
    attempt_in_run: int
    sent_at: float
    claim: ClaimWatch
    place: Place | None = None
    absence: AbsenceWatch = field(default_factory=AbsenceWatch)
    waits: WaitHistory = field(default_factory=WaitHistory)
    refusals: dict[str, str] = field(default_factory=dict)
    refused_since: float | None = None


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


def reason_of_loss(flight: Flight, inspection: Inspection, begun_at: Place) -> str:
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


def error_of(
    flight: Flight, result: TaskResult, raised: SerializableErrorInfo | None
) -> SerializableErrorInfo:
    """Why an attempt without an end of its own failed, for the step's page in the UI.

    Args:
        raised: what was raised on the worker, if anything; kept as the cause.
    """
    reason = result.reason or (raised.message.strip() if raised else "")
    reason = reason or "It ended without saying whether it had succeeded."
    place = result.place
    return plain_error(
        f'Step "{flight.step.key}" on worker {place.worker} (host {place.host}, slot '
        f"{place.slot}, pid {place.pid}): {reason}",
        "StepLost" if result.outcome is Outcome.DIED else "StepError",
        raised,
    )
