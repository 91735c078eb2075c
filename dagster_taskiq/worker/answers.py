"""What a child's answer means: the result of its task, and what is said of that."""

from __future__ import annotations

import logging
from dataclasses import replace

from dagster_taskiq.errors import TooLargeError
from dagster_taskiq.messages.envelope import Envelope
from dagster_taskiq.messages.results import Outcome, TaskResult
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.worker.child_messages import Answer, Executed
from dagster_taskiq.worker.leases import Lease, StopReason
from dagster_taskiq.worker.slot_base import ChildDied

logger = logging.getLogger(__name__)

#: What a child says of a step that has failed, see ``TaskRunner``.
_FAILED_ENDS = ("failure", "up_for_retry")


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


def has_failed(result: TaskResult, step_end: str) -> bool:
    """Whether a task came to no good end: a step's attempt, or a run; one that was stopped, too.

    False of one that is for another worker.

    Args:
        step_end: what a step came to by its own events, see ``TaskRunner``; empty of a run.
    """
    if result.outcome in (Outcome.REFUSED, Outcome.COPY):
        return False
    if result.outcome is not Outcome.FINISHED or result.error or result.exit_code:
        return True
    return step_end in _FAILED_ENDS


def sealed(result: TaskResult, envelope: Envelope, signer: Signer) -> bytes:
    """A task's result as it is stored; of one that is too large only the reason why it is not sent.

    The loop then reads in Dagster's log, which has all of the step's events, how it ended.
    """
    try:
        return result.to_bytes(signer, envelope.task_id)
    except TooLargeError as error:
        reason = str(error.of(f"{envelope.title} returned too much"))
        logger.error("%s", reason)
        too_large = TaskResult(Outcome.DIED, result.place, reason=reason)
        return too_large.to_bytes(signer, envelope.task_id)
