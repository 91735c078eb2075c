"""The events with which a process announces in Dagster's log that it executes a task."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from dagster import DagsterEvent, DagsterInstance, DagsterRun

from dagster_taskiq._dagster.names import EngineEventData
from dagster_taskiq.defaults import QUEUE_WAIT_MARKER
from dagster_taskiq.messages.results import Place


@dataclass(frozen=True)
class Arrival:
    """How a task has come to its process.

    Attributes:
        queue: that it was taken from, as people name it.
        attempt: see ``Envelope``.
        waited_seconds: from when it was sent until a worker had claimed it, by the clocks of both
            hosts; None where its sender has not said when.
    """

    queue: str
    attempt: int
    waited_seconds: float | None = None


def report_run_start(
    instance: DagsterInstance, run: DagsterRun, place: Place, arrival: Arrival
) -> None:
    """Log that this process executes a run."""
    instance.report_engine_event(
        f"Executing the run on worker {place.worker}.",
        run,
        EngineEventData(metadata=_metadata(place, arrival), marker_end=QUEUE_WAIT_MARKER),
    )


def report_step_start(
    instance: DagsterInstance, run: DagsterRun, step_key: str, place: Place, arrival: Arrival
) -> DagsterEvent:
    """Log that this process begins with a step; see ``attempt_log``."""
    return instance.report_engine_event(
        f'Executing step "{step_key}" on worker {place.worker}.',
        run,
        EngineEventData(metadata=_metadata(place, arrival), marker_end=QUEUE_WAIT_MARKER),
        step_key=step_key,
    )


def _metadata(place: Place, arrival: Arrival) -> dict[str, Any]:
    """The table that Dagster's UI shows; ``attempt_log.place_in`` reads the place from it."""
    found: dict[str, Any] = {
        "queue": arrival.queue,
        "worker": place.worker,
        "host": place.host,
        "slot": place.slot,
        "pid": str(os.getpid()),
        "attempt": arrival.attempt,
    }
    if arrival.waited_seconds is not None:
        found["seconds waited"] = round(arrival.waited_seconds, 3)
    return found
