"""What a child's answer means: the result of its task, and what is said of that."""

from __future__ import annotations

from dataclasses import replace

from dagster_taskiq.messages.results import Outcome, TaskResult
from dagster_taskiq.worker.child_messages import Answer, Executed
from dagster_taskiq.worker.leases import Lease, StopReason
from dagster_taskiq.worker.slot_base import ChildDied

#: How the serialized events of Dagster say that an attempt has ended; the quotes in what a user
#: has put into an event are escaped.
_SUCCESS = '"event_type_value": "STEP_SUCCESS"'
_FAILURES = tuple(f'"event_type_value": "{name}"' for name in ("STEP_FAILURE", "STEP_UP_FOR_RETRY"))


def result_of(answer: Answer | ChildDied, lease: Lease, verdict: str) -> TaskResult:
    """What a task came to.

    Args:
        answer: of its child.
        verdict: why its time limit had its child killed; empty if it had not.
    """
    if isinstance(answer, ChildDied):
        why = lease.stop_cause or verdict
        why = why and f" after {why}"
        return TaskResult(
            Outcome.DIED,
            lease.claim.place,
            reason=f"{answer}{why}.",
            exit_code=answer.exit_code,
            is_cancelled=lease.stop_reason is StopReason.CANCELLED,
        )
    assert isinstance(answer, Executed), answer
    result = TaskResult.from_bytes(answer.result.encode())
    if not result.is_cancelled:
        return result
    # the child knows that it was interrupted, but not by whom: only a cancel rules out a retry
    result = replace(result, is_cancelled=lease.stop_reason is StopReason.CANCELLED)
    if result.outcome is Outcome.UNLOGGED:
        return result  # its reason is what the database said
    why = lease.stop_cause or "a signal that its worker had not sent"
    return replace(result, reason=f"{result.reason.removesuffix('.')} after {why}.")


def cause_of(result: TaskResult) -> str:
    """Why a task ended other than by its own end; empty where there is nothing to say."""
    return result.reason or str((result.error or {}).get("message", ""))


def has_failed(result: TaskResult) -> bool:
    """Whether a task came to no good end: a step's attempt, or a run; one that was stopped, too.

    False of one that is for another worker. Of the events only the last ones are looked at, as
    text: the worker's event loop parses none.
    """
    if result.outcome in (Outcome.REFUSED, Outcome.COPY):
        return False
    if result.outcome is not Outcome.FINISHED or result.error or result.exit_code:
        return True
    # hooks write events behind the end
    for event in reversed(result.events):
        if _SUCCESS in event:
            return False
        if any(failure in event for failure in _FAILURES):
            return True
    return False
