"""Taking waiting tasks out of a queue, as a worker does that then does not execute them.

A task is claimed, gets a result that says what becomes of it, and its message is acked: so the
promises of a claim hold here too, and its run's loop hears of it at once, whatever the broker.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from enum import Enum

from dagster_taskiq.backend import Claim, ClaimAnswer
from dagster_taskiq.brokers import Delivery
from dagster_taskiq.defaults import RESULT_EXPIRES_SECONDS
from dagster_taskiq.errors import MalformedTaskError, UntrustedError
from dagster_taskiq.messages.envelope import Envelope, TaskName
from dagster_taskiq.messages.queue_names import QueueKind
from dagster_taskiq.messages.results import Outcome, TaskResult
from dagster_taskiq.steering.helm import Helm


class Taken(Enum):
    """What became of a task that was to be taken out of its queue."""

    #: It has the result that it was given.
    ANSWERED = "answered"
    #: It was over already, or its run is.
    OVER = "over"
    #: It is not for us to take: it stays, or a worker executes it.
    LEFT = "left"


async def waiting_in(
    helm: Helm, kind: QueueKind, queue: str
) -> AsyncIterator[tuple[Delivery, Envelope | None]]:
    """Take the messages of a queue one after the other, until there is none.

    The caller settles each. With a message that is no task of ours, or is not signed as it must be,
    comes None.

    Raises:
        ServerError: the broker is away or refuses.
    """
    helm.broker.listen_on([helm.servers.physical_queue(kind, queue)])
    listener = helm.broker.listener()
    while (delivery := await listener.look()) is not None:
        yield delivery, _envelope_of(helm, delivery)


def _envelope_of(helm: Helm, delivery: Delivery) -> Envelope | None:
    if delivery.flaw:
        return None
    try:
        return Envelope.from_bytes(delivery.data, helm.servers.signer)
    except (MalformedTaskError, UntrustedError):
        return None


@dataclass(frozen=True)
class Answer:
    """What a task that is taken out of its queue is answered.

    Attributes:
        outcome: see ``Outcome``.
        reason: a sentence for people.
        queue: to send it to instead; empty to end it.
        and_then: called with a whole run when its result is stored: nobody else hears of that.
    """

    outcome: Outcome
    reason: str
    queue: str = ""
    and_then: Callable[[Envelope], Awaitable[None]] | None = None


async def take(helm: Helm, envelope: Envelope, answer: Answer) -> Taken:
    """Claim a waiting task and give it a result.

    Raises:
        ServerError: the backend is away or refuses.
    """
    identity = helm.backend.identity
    if envelope.state not in (None, identity):
        return Taken.LEFT  # of a run with another backend
    claim = Claim(
        envelope.run_id,
        envelope.task_id,
        uuid.uuid4().hex,
        envelope.lease_seconds,
        envelope.epoch,
        helm.place,
    )
    is_launched = envelope.name is TaskName.EXECUTE_JOB
    claimed = await helm.backend.claim(
        claim, needs_live_run=envelope.kind is QueueKind.STEPS, until_begun=is_launched
    )
    if claimed in (ClaimAnswer.CLAIMED, ClaimAnswer.PENDING):
        return Taken.LEFT
    if claimed is not ClaimAnswer.GRANTED:
        return Taken.OVER
    result = TaskResult(
        answer.outcome,
        helm.place,
        reason=answer.reason,
        is_cancelled=answer.outcome is not Outcome.REFUSED,
        queue=answer.queue,
    )
    is_stored = await helm.backend.complete(
        claim,
        result.to_bytes(helm.servers.signer, envelope.task_id),
        expires_seconds=RESULT_EXPIRES_SECONDS,
        is_refused=answer.outcome is Outcome.REFUSED,
    )
    if is_stored and answer.and_then is not None:
        await answer.and_then(envelope)
    return Taken.ANSWERED if is_stored else Taken.LEFT
