"""The events with which a process announces in Dagster's log that it executes a task."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any

from dagster import DagsterEvent, DagsterInstance, DagsterRun, MetadataValue

from dagster_taskiq._dagster.names import EngineEventData
from dagster_taskiq.aio.tracing import TraceContext
from dagster_taskiq.defaults import QUEUE_WAIT_MARKER
from dagster_taskiq.execution.attempt_log import STARTED_AT
from dagster_taskiq.messages.envelope import Envelope
from dagster_taskiq.messages.results import Place


@dataclass(frozen=True)
class Arrival:
    """How a task has come to its process.

    Attributes:
        queue: that it was taken from, as people name it.
        attempt: see ``Envelope``.
        waited_seconds: from when it was sent until a worker had claimed it, by the clocks of both
            hosts; None where its sender has not said when.
        sent_at: by its sender's clock, seconds since the epoch; 0 as before.
        trace: the context of the attempt's span; empty without tracing.
    """

    queue: str
    attempt: int
    waited_seconds: float | None = None
    sent_at: float = 0.0
    trace: TraceContext = field(default_factory=dict)

    @classmethod
    def of(cls, envelope: Envelope, waited_seconds: float | None) -> Arrival:
        """That of a message's task."""
        return cls(
            envelope.queue,
            envelope.attempt,
            waited_seconds,
            envelope.sent_at,
            envelope.trace,
        )

    @property
    def claimed_at(self) -> float:
        """By the clock of its sender, as far as the two agree; 0 where that has not said when."""
        return self.sent_at + (self.waited_seconds or 0.0)

    def attributes(self, run: DagsterRun, step_key: str, place: Place) -> dict[str, str | int]:
        """What a span says of the execution of a step."""
        return {
            "dagster.run_id": run.run_id,
            "dagster.job_name": run.job_name,
            "dagster.step_key": step_key,
            "dagster.attempt": self.attempt,
            "dagster_taskiq.queue": self.queue,
            "dagster_taskiq.worker": place.worker,
            "dagster_taskiq.slot": place.slot,
            "host.name": place.host,
        }


def report_run_start(
    instance: DagsterInstance, run: DagsterRun, place: Place, arrival: Arrival
) -> None:
    """Log that this process executes a run."""
    instance.report_engine_event(
        f"Executing the run on worker {place.worker}.",
        run,
        EngineEventData(
            metadata=_metadata(place, arrival, resumed=arrival.attempt),
            marker_end=QUEUE_WAIT_MARKER,
        ),
    )


def report_step_start(
    instance: DagsterInstance,
    run: DagsterRun,
    step_key: str,
    place: Place,
    arrival: Arrival,
    trace_id: str = "",
) -> DagsterEvent:
    """Log that this process begins with a step; see ``attempt_log``.

    Args:
        trace_id: of its trace, for people; empty for none.
    """
    metadata = _metadata(place, arrival, attempt=arrival.attempt)
    if trace_id:
        metadata["trace id"] = trace_id
    return instance.report_engine_event(
        f'Executing step "{step_key}" on worker {place.worker}.',
        run,
        EngineEventData(metadata=metadata, marker_end=QUEUE_WAIT_MARKER),
        step_key=step_key,
    )


def _metadata(place: Place, arrival: Arrival, **count: int) -> dict[str, Any]:
    """The table that Dagster's UI shows; ``attempt_log.place_in`` reads the place from it.

    Args:
        count: ``attempt`` of a step, from 1; of a run, how often it was resumed.
    """
    found: dict[str, Any] = {
        "queue": arrival.queue,
        "worker": place.worker,
        "host": place.host,
        "slot": place.slot,
        "pid": str(os.getpid()),
        STARTED_AT: MetadataValue.timestamp(time.time()),
        **count,
    }
    if arrival.waited_seconds is not None:
        found["seconds waited"] = round(arrival.waited_seconds, 3)
    return found
