"""What history and traces are told of a run's attempts when they end; see ``AttemptEnd``."""

from __future__ import annotations

import time
from collections.abc import Sequence

from dagster import DagsterEvent

from dagster_taskiq._dagster.names import SerializableErrorInfo
from dagster_taskiq._dagster.replay import is_end_of_attempt
from dagster_taskiq.execution.attempt_log import last_start
from dagster_taskiq.loop.flights import Flight, LoopRun
from dagster_taskiq.messages.attempt_ends import AttemptEnd, EndOutcome
from dagster_taskiq.messages.plain_text import plain_sentence
from dagster_taskiq.messages.results import NOWHERE, Outcome, Place, TaskResult

#: How the classes of errors begin that have what was raised as their cause.
_WRAPPERS = ("Dagster", "RetryRequested", "StepError")


class Reporting:
    """Tells the history of the attempts of one run, and ends their traces.

    Args:
        run: whose dispatcher passes it on.
    """

    def __init__(self, run: LoopRun) -> None:
        self._dispatcher = run.dispatcher
        self._flights = run.flights
        self._run_id = run.context.run_id
        self._job = run.context.dagster_run.job_name

    def finished(
        self,
        flight: Flight,
        result: TaskResult,
        told: Sequence[DagsterEvent],
        end: DagsterEvent | None,
    ) -> None:
        """An attempt has come to its end by its result.

        Args:
            told: what its process, or the log, has told of it.
            end: that the loop has logged, where they have told none.
        """
        own_ends = [it for it in told if it.step_key == flight.step.key and is_end_of_attempt(it)]
        last = own_ends[-1] if own_ends else end
        outcome = _outcome_of(result, last, has_own_end=bool(own_ends))
        self._note(
            flight,
            outcome,
            "" if outcome is EndOutcome.SUCCEEDED else _reason_of(result, last),
            place=result.place,
            started_at=result.started_at or last_start(told),
            # while the run stops, what a step's policy asks for is not done
            is_retried=last is not None
            and last.is_step_up_for_retry
            and not self._flights.is_stopping,
        )

    def unexecuted(self, flight: Flight, reason: str) -> None:
        """No worker can execute an attempt."""
        self._note(flight, EndOutcome.FAILED, reason)

    def cancelled(self, flight: Flight, reason: str) -> None:
        """An attempt was withdrawn, or is known to have been stopped without a word of it."""
        self._note(flight, EndOutcome.CANCELLED, reason, place=flight.place or NOWHERE)

    def _note(
        self,
        flight: Flight,
        outcome: EndOutcome,
        reason: str,
        *,
        place: Place = NOWHERE,
        started_at: float | None = None,
        is_retried: bool = False,
    ) -> None:
        task, is_known = flight.task, place != NOWHERE
        worker = place.worker if is_known else ""
        flight.trace.ended(outcome.value, reason.strip(), worker, is_retried=is_retried)
        self._dispatcher.note_end(
            AttemptEnd(
                task_id=task.task_id,
                run_id=self._run_id,
                step_key=task.step_key,
                attempt=task.attempt,
                queue=task.queue,
                outcome=outcome,
                ended_at=time.time(),
                is_retried=is_retried,
                job=self._job,
                worker=worker,
                host=place.host if is_known else "",
                slot=place.slot if is_known else None,
                sent_at=flight.sent_on,
                started_at=started_at,
                reason=plain_sentence(reason),
            )
        )


def _outcome_of(result: TaskResult, end: DagsterEvent | None, *, has_own_end: bool) -> EndOutcome:
    if end is not None and end.is_step_success:
        return EndOutcome.SUCCEEDED
    if result.is_cancelled:
        return EndOutcome.CANCELLED
    is_lost = result.outcome is Outcome.DIED and not has_own_end
    return EndOutcome.LOST if is_lost else EndOutcome.FAILED


def _reason_of(result: TaskResult, end: DagsterEvent | None) -> str:
    """Why an attempt has not succeeded: what its worker or the loop says, or what was raised."""
    if result.reason:
        return result.reason
    error: SerializableErrorInfo | None = None
    if end is not None and end.is_step_failure:
        error = end.step_failure_data.error
    elif end is not None and end.is_step_up_for_retry:
        error = end.step_retry_data.error
    # Dagster and the loop wrap what was raised in errors of their own
    while error and error.cause and (error.cls_name or "").startswith(_WRAPPERS):
        error = error.cause
    if error is None:
        return ""
    is_wish = error.cls_name == "RetryRequested"
    return "It asked to be tried again." if is_wish else error.message
