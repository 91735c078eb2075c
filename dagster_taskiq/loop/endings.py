"""How attempts end: what they came to goes to ``ActiveExecution``, which decides what is next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from dagster import DagsterEvent

from dagster_taskiq._dagster.names import (
    ActiveExecution,
    EngineEventData,
    SerializableErrorInfo,
    deserialize_events,
    fail_step,
    plain_error,
    retry_or_fail_step,
    unpack_error,
)
from dagster_taskiq._dagster.replay import is_in_flight, is_of_outcome
from dagster_taskiq.backend.base import TaskState
from dagster_taskiq.defaults import QUEUE_WAIT_MARKER
from dagster_taskiq.errors import MalformedResultError
from dagster_taskiq.execution.attempt_log import outcome_in, read_attempt
from dagster_taskiq.loop.flights import Flight, LoopRun
from dagster_taskiq.loop.reporting import Reporting
from dagster_taskiq.messages.results import Outcome, TaskResult


class Endings:
    """Ends the attempts of one run.

    Args:
        run: whose log gets the ends that no worker has written.
        active: hears of every end.
    """

    def __init__(self, run: LoopRun, active: ActiveExecution) -> None:
        self._context = run.context
        self._dispatcher = run.dispatcher
        self._flights = run.flights
        self._active = active
        self._reporting = Reporting(run)

    def finish(self, flight: Flight, result: TaskResult) -> Iterator[DagsterEvent]:
        """End an attempt by its result."""
        self._flights.end(flight)
        try:
            events = deserialize_events(result.events)
            error = None if result.error is None else unpack_error(result.error)
        except MalformedResultError as malformed:
            # as after a death, the log says what came of the step
            reason = f"Its result cannot be read: {malformed}."
            result = replace(result, outcome=Outcome.DIED, error=None, reason=reason)
            error = None
        if result.outcome in (Outcome.DIED, Outcome.UNLOGGED):
            # what is in the log counts; the result has no events. Read only now, since a condemned
            # attempt may have ended after the log was read by which it was judged
            instance, run_id = self._context.instance, self._context.run_id
            told = read_attempt(instance, run_id, flight.step.key, flight.attempt_in_run)
            events = outcome_in(told)
        else:
            told = events
        end = None
        for event in events:
            yield event
            if event.step_key != flight.step.key or not is_of_outcome(event):
                continue
            if event.is_resource_init_failure:
                # no end of the attempt, though older versions of Dagster take it for one
                error = event.engine_event_data.error
            else:
                self._active.handle_event(event)
        if is_in_flight(self._active, flight.step.key):
            error = _error_of(flight, result, error)
            end = self._fail(flight, error, may_retry=not result.is_cancelled)
            yield end
            self._active.handle_event(end)
        elif result.outcome is Outcome.UNLOGGED:
            yield DagsterEvent.engine_event(
                self._context.for_step(flight.step),
                f'Step "{flight.step.key}" has ended, but events after its end are lost: '
                f"{result.reason}",
                EngineEventData(error=error),
            )
        self._reporting.finished(flight, result, told, end)

    def fail_unexecuted(self, flight: Flight, reason: str) -> Iterator[DagsterEvent]:
        """Fail an attempt that no worker has taken, unless one has by now."""
        states = self._dispatcher.cancel([flight.task], reason)
        if states[flight.task_id] is TaskState.CANCELLED:
            self._flights.end(flight)
            message = f'Step "{flight.step.key}" was not executed. {reason}'
            self._reporting.unexecuted(flight, reason)
            end = self._fail(flight, plain_error(message, "StepError"), may_retry=False)
            yield end
            self._active.handle_event(end)

    def note_unheard(self, flight: Flight) -> None:
        """Forget a task whose worker must have stopped it, though no word of that has come."""
        self._flights.drop(flight)
        self._reporting.cancelled(flight, "Its worker has stopped it, while the servers were away.")

    def note_withdrawn(self, flight: Flight) -> Iterator[DagsterEvent]:
        """Forget a cancelled task that never started, and say so in the log."""
        self._flights.drop(flight)
        self._reporting.cancelled(flight, "It was withdrawn before a worker had started it.")
        yield DagsterEvent.engine_event(
            self._context.for_step(flight.step),
            f'Withdrew step "{flight.step.key}" from queue "{flight.task.queue}" before a worker '
            "had started it.",
            EngineEventData(marker_end=QUEUE_WAIT_MARKER),
        )

    def _fail(
        self, flight: Flight, error: SerializableErrorInfo, *, may_retry: bool
    ) -> DagsterEvent:
        """Log the end of an attempt that did not log one itself."""
        step_context = self._context.for_step(flight.step)
        if may_retry and not self._flights.is_stopping:
            return retry_or_fail_step(self._context, step_context, error, self._active)
        return fail_step(step_context, error)


def _error_of(
    flight: Flight, result: TaskResult, raised: SerializableErrorInfo | None
) -> SerializableErrorInfo:
    """Why an attempt without an end of its own failed, for the step's page in the UI.

    Args:
        raised: what was raised on the worker, if anything; kept as the cause.
    """
    reason = result.reason or (raised.message.strip() if raised else "")
    reason = reason or "It ended without saying whether it had succeeded."
    place = result.place
    where = (
        ""  # it was taken out of its queue, by whom the reason says
        if result.is_cancelled and not place.worker_id
        else f" on worker {place.worker} (host {place.host}, slot {place.slot}, pid {place.pid})"
    )
    return plain_error(
        f'Step "{flight.step.key}"{where}: {reason}',
        "StepLost" if result.outcome is Outcome.DIED else "StepError",
        raised,
    )
