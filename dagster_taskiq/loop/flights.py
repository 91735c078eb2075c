"""Attempts that were sent and have not come back, and what Dagster's log says of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from dagster import DagsterEvent, DagsterInstance

from dagster_taskiq._dagster.names import (
    DagsterEventType,
    EventLogEntry,
    ExecutionStep,
    SerializableErrorInfo,
    plain_error,
)
from dagster_taskiq._dagster.replay import is_end_of_attempt
from dagster_taskiq.defaults import QUEUE_WAIT_MARKER
from dagster_taskiq.loop.claim_watch import ClaimWatch
from dagster_taskiq.loop.dispatcher import Inspection, StepTask
from dagster_taskiq.messages.queue_waits import WaitHistory
from dagster_taskiq.messages.results import NOWHERE, Outcome, Place, TaskResult


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
        """The events of one attempt: what follows the step's previous STEP_UP_FOR_RETRY."""
        found = []
        attempt = 1
        for event in self._events.get(flight.step.key, ()):
            if attempt == flight.attempt_in_run:
                found.append(event)
            attempt += event.is_step_up_for_retry
        return found

    def outcome(self, flight: Flight) -> list[DagsterEvent]:
        """What ``ActiveExecution`` has to know of an attempt: its outputs and its end."""
        return [it for it in self._of(flight) if is_end_of_attempt(it) or it.is_successful_output]

    def place_of(self, flight: Flight) -> Place:
        """Where a worker has last begun with the attempt; ``NOWHERE`` if none has."""
        places = [place_in(event) for event in self._of(flight)]
        return next((place for place in reversed(places) if place), NOWHERE)

    def has_ended(self, flight: Flight) -> bool:
        """Whether the end of the attempt is there."""
        return any(is_end_of_attempt(event) for event in self._of(flight))

    def has_started(self, flight: Flight) -> bool:
        """Whether a worker has written anything of the attempt."""
        return any(
            not event.is_engine_event or event.engine_event_data.marker_end == QUEUE_WAIT_MARKER
            for event in self._of(flight)
        )


def read_steps_log(instance: DagsterInstance, run_id: str) -> Iterator[EventLogEntry]:
    """What Dagster's log says of a run's steps, in its order, without what came too late."""
    return without_late_events(instance.all_logs(run_id, of_type=set(DagsterEventType)))


def without_late_events(entries: Iterable[EventLogEntry]) -> Iterator[EventLogEntry]:
    """Leave out what a process has written about an attempt of a step that was already over.

    A worker that was given up may live, and then its process writes the end of its attempt into
    the log in which the next attempt is under way. Events do not name their attempt, so they are
    known by the process that announced itself as the one that executes it.
    """
    present: dict[str, set[int]] = defaultdict(set)
    former: dict[str, set[int]] = defaultdict(set)
    for entry in entries:
        event = entry.dagster_event
        if event is None or event.step_key is None:
            continue
        ours, gone = present[event.step_key], former[event.step_key]
        place = place_in(event)
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


def reason_of_loss(flight: Flight, inspection: Inspection) -> str:
    """Why an attempt that a worker had begun has no result and no claim any more."""
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
