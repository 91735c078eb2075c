"""Pausing queues, emptying them, and moving what waits in one to another."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from dagster_taskiq.brokers import Delivery
from dagster_taskiq.messages.control import OrderKind
from dagster_taskiq.messages.envelope import Envelope
from dagster_taskiq.messages.plain_text import plain_reason
from dagster_taskiq.messages.queue_names import QueueKind
from dagster_taskiq.messages.queue_pauses import QueuePause
from dagster_taskiq.messages.results import Outcome
from dagster_taskiq.steering.helm import Helm
from dagster_taskiq.steering.taking import Answer, Taken, take, waiting_in
from dagster_taskiq.steering.workers import Told, give_order

#: Has Dagster cancel a whole run that is not to be executed, given the run's id and a reason; says
#: whether the run is over by then.
CancelRun = Callable[[str, str], Awaitable[bool]]


@dataclass
class Emptied:
    """What became of the tasks of a queue that was emptied.

    Attributes:
        steps: how many steps were ended, or are moved by their runs.
        runs: the same of whole runs.
        over: how many messages were dropped whose tasks, or runs, were over.
        unreadable: how many were dropped that are no tasks of ours.
        left: how many stay: another deployment's, those that are executed, whole runs that Dagster
            has not cancelled.
    """

    steps: int = 0
    runs: int = 0
    over: int = 0
    unreadable: int = 0
    left: int = 0


async def pause_queue(helm: Helm, queue: str, reason: str) -> Told:
    """Hold a queue up, of steps and of runs, for all workers until it is resumed.

    Returns:
        the workers that were told; others find out within half a minute.

    Raises:
        ServerError: the backend is away or refuses.
    """
    pause = QueuePause(queue, plain_reason(reason), time.time(), helm.host)
    await helm.backend.pause_queue(pause)
    return await _tell_workers(helm, queue)


async def resume_queue(helm: Helm, queue: str) -> Told | None:
    """Let workers take tasks from a queue again.

    Returns:
        see ``pause_queue``; None where it was not paused.

    Raises:
        ServerError: the backend is away or refuses.
    """
    if not await helm.backend.resume_queue(queue):
        return None
    return await _tell_workers(helm, queue)


async def _tell_workers(helm: Helm, queue: str) -> Told:
    records = [it for it in await helm.backend.workers() if queue in it.queues]
    signer = helm.servers.signer
    return await give_order(helm.backend, signer, records, OrderKind.LOOK_AT_QUEUES)


async def purge(helm: Helm, queue: str, reason: str, cancel_run: CancelRun | None) -> Emptied:
    """End what waits in a queue: steps fail without a retry, whole runs are cancelled.

    Args:
        reason: a sentence for the logs of their runs.
        cancel_run: None leaves whole runs where they are; what it raises ends the purge.

    Raises:
        ServerError: a server is away or refuses; what has been ended stays so.
    """

    async def tell_dagster(envelope: Envelope) -> bool:
        assert cancel_run is not None  # else no whole run is taken
        is_over = await cancel_run(envelope.run_id, reason)
        if is_over:
            # the steps of a run that is resumed go on until nobody is there to take over
            await helm.backend.disown_run(envelope.run_id)
        return is_over

    ended = Answer(Outcome.ERROR, reason)
    emptied = await _empty(helm, QueueKind.STEPS, queue, ended, Emptied())
    if cancel_run is None:
        emptied.left += await helm.broker.depth(helm.servers.physical_queue(QueueKind.RUNS, queue))
        return emptied
    ended = Answer(Outcome.ERROR, reason, first=tell_dagster)
    return await _empty(helm, QueueKind.RUNS, queue, ended, emptied)


async def move_tasks(helm: Helm, queue: str, to_queue: str, reason: str) -> Emptied:
    """Have the runs send what waits in a queue to another one.

    Raises:
        ServerError: a server is away or refuses; what has been moved stays so.
    """
    moved = Answer(Outcome.REFUSED, reason, to_queue)
    emptied = await _empty(helm, QueueKind.STEPS, queue, moved, Emptied())
    return await _empty(helm, QueueKind.RUNS, queue, moved, emptied)


async def _empty(
    helm: Helm, kind: QueueKind, queue: str, answer: Answer, emptied: Emptied
) -> Emptied:
    # what comes meanwhile stays, or a run that sends again what it gets back would keep us here
    left = await helm.broker.depth(helm.servers.physical_queue(kind, queue))
    in_hand: list[Delivery] = []
    try:
        async for delivery, envelope in waiting_in(helm, kind, queue):
            in_hand.append(delivery)
            taken = None if envelope is None else await take(helm, envelope, answer)
            _count(emptied, kind, taken)
            if taken is not Taken.LEFT:
                await in_hand.pop().ack()
            left -= 1
            if left <= 0:
                break
    finally:
        # only now, or they would be the next ones again
        for delivery in in_hand:
            await delivery.release()
    return emptied


def _count(emptied: Emptied, kind: QueueKind, taken: Taken | None) -> None:
    if taken is None:
        emptied.unreadable += 1
    elif taken is Taken.LEFT:
        emptied.left += 1
    elif taken is Taken.OVER:
        emptied.over += 1
    elif kind is QueueKind.STEPS:
        emptied.steps += 1
    else:
        emptied.runs += 1
