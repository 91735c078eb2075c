"""A resumed run: its loop takes over the steps that a former process has sent."""

from __future__ import annotations

from collections.abc import Iterator

from dagster import DagsterEvent

from dagster_taskiq._dagster.names import (
    ActiveExecution,
    EngineEventData,
    InstanceConcurrencyContext,
)
from dagster_taskiq._dagster.replay import free_pool_slot, hold_pool_slot, replay_log
from dagster_taskiq.execution.attempt_log import read_steps_log, says_sent
from dagster_taskiq.loop.flights import LoopRun
from dagster_taskiq.loop.sending import Sending


def adopt(
    run: LoopRun,
    active: ActiveExecution,
    concurrency: InstanceConcurrencyContext,
    sending: Sending,
) -> Iterator[DagsterEvent]:
    """Take over the run from a former process: its steps go on, finished ones stay finished.

    Yields:
        beside the loop's own events the failures that the log already has: Dagster ends a run
        as failed only for those that it was given in this process.
    """
    context = run.context
    replayed = replay_log(active, read_steps_log(context.instance, context.run_id), says_sent)
    yield from replayed.failures
    for key, count in replayed.retries.items():
        sending.note_retries(key, count)
    for key in replayed.sent:
        step = active.get_step_by_key(key)
        flight = sending.new_flight(step)
        hold_pool_slot(concurrency, step)
        run.flights.add(flight)
    for key in replayed.ended:
        free_pool_slot(concurrency, active.get_step_by_key(key))
    yield DagsterEvent.engine_event(
        context,
        f"Resumed the run; {len(replayed.sent)} steps are queued or running.",
        EngineEventData(metadata={"steps": ", ".join(replayed.sent) or "none"}),
    )
