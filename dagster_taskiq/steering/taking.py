"""Taking waiting tasks out of a queue, as a worker does that then does not execute them.

A task is claimed, gets a result that says what becomes of it, and its message is acked: so the
promises of a claim hold here too, and its run's loop hears of it at once, whatever the broker.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum

from dagster_taskiq.backend import Claim, ClaimAnswer
from dagster_taskiq.brokers import Delivery
from dagster_taskiq.defaults import RESULT_EXPIRES_SECONDS
from dagster_taskiq.errors import MalformedTaskError, ServerError, UntrustedError
from dagster_taskiq.messages.envelope import Envelope
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
        first: what is done while nobody else can have the task, before it gets its result; it stays
            where this says False.
    """

    outcome: Outcome
    reason: str
    queue: str = ""
    first: Callable[[Envelope], Awaitable[bool]] | None = None


async def take(helm: Helm, envelope: Envelope, answer: Answer) -> Taken:
    """Claim a waiting task and give it a result.

    Raises:
        ServerError: the backend is away or refuses. What the answer's ``first`` raises, too.
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
    is_step = envelope.kind is QueueKind.STEPS
    # nothing of a run begins here: a claim that we leave behind keeps no worker from a launched one
    claimed = await helm.backend.claim(claim, needs_live_run=is_step, until_begun=not is_step)
    if claimed in (ClaimAnswer.CLAIMED, ClaimAnswer.PENDING):
        return Taken.LEFT
    if claimed is not ClaimAnswer.GRANTED:
        return Taken.OVER
    if not await _is_done_first(helm, claim, envelope, answer):
        return Taken.LEFT
    is_stored = await _store(helm, claim, answer)
    return Taken.ANSWERED if is_stored else Taken.LEFT


async def _store(helm: Helm, claim: Claim, answer: Answer) -> bool:
    is_refused = answer.outcome is Outcome.REFUSED
    result = TaskResult(
        answer.outcome,
        helm.place,
        reason=answer.reason,
        is_cancelled=not is_refused,
        queue=answer.queue,
    )
    return await helm.backend.complete(
        claim,
        result.to_bytes(helm.servers.signer, claim.task_id),
        expires_seconds=RESULT_EXPIRES_SECONDS,
        is_refused=is_refused,
    )


async def _is_done_first(helm: Helm, claim: Claim, envelope: Envelope, answer: Answer) -> bool:
    if answer.first is None:
        return True
    is_done = False
    try:
        is_done = await answer.first(envelope)
    finally:
        if not is_done:
            # for a worker as if it had never been claimed, which no end of a claim could do
            with suppress(ServerError):
                await _store(helm, claim, Answer(Outcome.REFUSED, "It was not taken out."))
                await helm.backend.reopen(claim.run_id, claim.task_id)
    return is_done
