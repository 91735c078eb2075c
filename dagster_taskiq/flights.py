"""Attempts that were sent and have not come back, and what Dagster's log says of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from dagster import DagsterEvent, DagsterInstance

from dagster_taskiq._dagster import (
    DagsterEventType,
    EventLogEntry,
    ExecutionStep,
    SerializableErrorInfo,
    is_end_of_attempt,
    plain_error,
    read_step_log,
)
from dagster_taskiq.claim_watch import ClaimWatch
from dagster_taskiq.dispatcher import Inspection, StepTask
from dagster_taskiq.queue_waits import WaitHistory
from dagster_taskiq.results import NOWHERE, Outcome, Place, TaskResult

#: Joins the loop's event that a step was sent with the worker's that it took it: the UI shows the
#: time between the two as the wait in the queue.
QUEUE_WAIT_MARKER = "taskiq_queue_wait"


@dataclass
class Flight:
    """A task that was sent and has not come back.

    Attributes:
        attempt_in_run: of the step, from 1; a re-executed run goes on counting in the task.
        sent_at: monotonic seconds; of the last time it was sent.
        claim: what was seen of the claim on it.
        place: where it was last seen running.
        absent_since: since when neither broker nor backend know it.
        waits: what the log says of why it waits.
        refusals: by worker that has given it back as it cannot execute it, the reason.
        refused_since: when the first of them did, in monotonic seconds.
    """

    task: StepTask
    step: ExecutionStep
    attempt_in_run: int
    sent_at: float
    claim: ClaimWatch
    place: Place | None = None
    absent_since: float | None = None
    waits: WaitHistory = field(default_factory=WaitHistory)
    refusals: dict[str, str] = field(default_factory=dict)
    refused_since: float | None = None


class RunLog:
    """What Dagster's log says of a run's attempts: all of it is read, once, when it is asked."""

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
        return _of_attempt(flight.attempt_in_run, self._events.get(flight.step.key, ()))

    def outcome(self, flight: Flight) -> list[DagsterEvent]:
        """What ``ActiveExecution`` has to know of an attempt: its outputs and its end."""
        return [it for it in self._of(flight) if is_end_of_attempt(it) or it.is_successful_output]

    def place_of(self, flight: Flight) -> Place:
        """Where a worker has last begun with the attempt; ``NOWHERE`` if none has."""
        return _last_place(self._of(flight))

    def has_ended(self, flight: Flight) -> bool:
        """Whether the end of the attempt is there."""
        return any(is_end_of_attempt(event) for event in self._of(flight))

    def has_started(self, flight: Flight) -> bool:
        """Whether a worker has written anything of the attempt."""
        return _has_started(self._of(flight))


def _of_attempt(attempt: int, events: Iterable[DagsterEvent]) -> list[DagsterEvent]:
    """The events of one attempt of a step: what follows its previous STEP_UP_FOR_RETRY."""
    found = []
    number = 1
    for event in events:
        if number == attempt:
            found.append(event)
        number += event.is_step_up_for_retry
    return found


def _has_started(events: Iterable[DagsterEvent]) -> bool:
    return any(
        not event.is_engine_event or event.engine_event_data.marker_end == QUEUE_WAIT_MARKER
        for event in events
    )


def _last_place(events: Sequence[DagsterEvent]) -> Place:
    places = [place_in(event) for event in events]
    return next((place for place in reversed(places) if place), NOWHERE)


def already_begun(
    instance: DagsterInstance, run_id: str, step_key: str, attempt: int
) -> Place | None:
    """Where an attempt has been begun, by Dagster's log, or ended without having begun.

    This is the loop's own rule: what it finds begun or ended it never sends again.

    Args:
        attempt: of the step in this run, from 1.

    Returns:
        None if the attempt is still to begin; ``NOWHERE`` if it was only ended.
    """
    entries = without_late_events(read_step_log(instance, run_id, step_key))
    events = _of_attempt(attempt, (entry.get_dagster_event() for entry in entries))
    return _last_place(events) if _has_started(events) else None


def read_steps_log(instance: DagsterInstance, run_id: str) -> Iterator[EventLogEntry]:
    """What Dagster's log says of a run's steps, in its order, without what came too late."""
    return without_late_events(instance.all_logs(run_id, of_type=set(DagsterEventType)))


def without_late_events(entries: Iterable[EventLogEntry]) -> Iterator[EventLogEntry]:
    """Leave out what a process has written about an attempt of a step that was already over.

    A worker that was given up may live, and then its process writes the end of its attempt into
    the log in which the next attempt is under way. Events do not name their attempt, so they are
    known by the process that announced itself as the one that executes it. Where the loop and such
    a process have asked for a retry at the same time, it is the same retry.
    """
    present: dict[str, set[int]] = defaultdict(set)
    former: dict[str, set[int]] = defaultdict(set)
    to_retry: set[str] = set()
    for entry in entries:
        event = entry.dagster_event
        if event is None or event.step_key is None:
            continue
        ours, gone = present[event.step_key], former[event.step_key]
        place = place_in(event)
        if says_sent(event):
            to_retry.discard(event.step_key)
        elif event.is_step_up_for_retry:
            if event.step_key in to_retry:
                continue
            to_retry.add(event.step_key)
        if place is not None:
            gone.discard(place.pid)
            ours.add(place.pid)
        elif event.pid in gone and not event.is_engine_event:
            continue
        elif is_end_of_attempt(event):
            gone |= ours
            ours.clear()
        yield entry


def says_sent(event: DagsterEvent) -> bool:
    """Whether this is the event of a loop that sends a step."""
    return event.is_engine_event and event.engine_event_data.marker_start == QUEUE_WAIT_MARKER


def place_in(event: DagsterEvent) -> Place | None:
    """Where a step runs, if this is the event of a worker's process that begins with it."""
    if not event.is_engine_event or event.engine_event_data.marker_end != QUEUE_WAIT_MARKER:
        return None
    said = {key: str(value.value) for key, value in event.engine_event_data.metadata.items()}
    try:
        return Place(said["worker"], "", said["host"], int(said["pid"]), int(said["slot"]))
    except (KeyError, ValueError):
        return None  # a loop that has withdrawn the step ends the wait too


def reason_of_loss(flight: Flight, inspection: Inspection, begun_at: Place) -> str:
    """Why an attempt that a worker had begun has no result and no claim any more.

    Args:
        begun_at: where Dagster's log has it; ``NOWHERE`` if it has not begun.
    """
    held_at = flight.place
    if begun_at is not NOWHERE and held_at is not None and _slot(held_at) != _slot(begun_at):
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
