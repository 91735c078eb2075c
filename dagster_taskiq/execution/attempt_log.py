"""What Dagster's log says of a step's attempts: which has begun where, and what came too late."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dagster import (
    DagsterEvent,
    DagsterEventType,
    DagsterInstance,
    TimestampMetadataValue,
)

from dagster_taskiq._dagster.names import EventLogEntry
from dagster_taskiq._dagster.replay import is_end_of_attempt
from dagster_taskiq._dagster.storage import read_step_log
from dagster_taskiq.defaults import QUEUE_WAIT_MARKER
from dagster_taskiq.messages.results import NOWHERE, Place

#: Of the event of a worker's process that begins with a step: when, by its host's clock.
STARTED_AT = "started at"
#: Classes of the errors of ends that no worker has written: what was lost, and anything else.
LOOP_ERRORS = LOST_ERROR, FAILED_ERROR = "StepLost", "StepError"


def of_attempt(attempt: int, events: Iterable[DagsterEvent]) -> list[DagsterEvent]:
    """The events of one attempt of a step: what follows its previous STEP_UP_FOR_RETRY."""
    found = []
    number = 1
    for event in events:
        if number == attempt:
            found.append(event)
        number += event.is_step_up_for_retry
    return found


def has_started(events: Iterable[DagsterEvent]) -> bool:
    """Whether the events of an attempt say more than that it was sent.

    A worker's start, an end, or the loop's withdrawal, whoever wrote it.
    """
    return any(
        not event.is_engine_event or event.engine_event_data.marker_end == QUEUE_WAIT_MARKER
        for event in events
    )


def last_place(events: Sequence[DagsterEvent]) -> Place:
    """Where a worker has last begun, by the events of an attempt; ``NOWHERE`` if none has."""
    places = [place_in(event) for event in events]
    return next((place for place in reversed(places) if place), NOWHERE)


def last_start(events: Sequence[DagsterEvent]) -> float | None:
    """When a worker has last begun, by its host's clock, in seconds since the epoch."""
    begun = [event for event in events if place_in(event)]
    found = begun and begun[-1].engine_event_data.metadata.get(STARTED_AT)
    return found.value if isinstance(found, TimestampMetadataValue) else None


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
    events = _of_one_attempt(read_step_log(instance, run_id, step_key), attempt)
    return last_place(events) if has_started(events) else None


def read_attempt(
    instance: DagsterInstance, run_id: str, step_key: str, attempt: int
) -> list[DagsterEvent]:
    """What Dagster's log tells of an attempt: where it has begun, its outputs and its end.

    Args:
        attempt: of the step in this run, from 1.
    """
    entries = read_step_log(instance, run_id, step_key, with_outputs=True)
    return _of_one_attempt(entries, attempt)


def outcome_in(events: Iterable[DagsterEvent]) -> list[DagsterEvent]:
    """What an attempt has come to, by its events: its outputs, and its end where it has one."""
    return [it for it in events if is_end_of_attempt(it) or it.is_successful_output]


def _of_one_attempt(entries: Iterable[EventLogEntry], attempt: int) -> list[DagsterEvent]:
    known = without_late_events(entries)
    return of_attempt(attempt, (entry.get_dagster_event() for entry in known))


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


def end_in_words(event: DagsterEvent) -> tuple[str, str]:
    """How an attempt ended, as a word and as the reason, by the event of its end."""
    if event.is_step_success:
        return "succeeded", ""
    data: Any = event.event_specific_data
    error = cause = data.error if data else None
    while cause and cause.cause:
        cause = cause.cause
    # around what the step's code has raised, Dagster's words say nothing, and the loop's say where
    said = (error, cause) if error and error.cls_name in LOOP_ERRORS else (cause,)
    return "failed", " ".join(dict.fromkeys(it.message.strip() for it in said if it))


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
