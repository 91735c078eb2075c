"""Pausing queues, emptying them, and moving what waits in one to another."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from dagster_taskiq.backend import TaskState
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

#: How long the launcher of a run that is moved has to send it to its new queue. The process that
#: has launched a run looks after it every 5 s, as long as it lives.
LAUNCHER_SECONDS = 15.0

_LOOK_SECONDS = 0.2

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

    emptied = Emptied()
    await _empty(helm, QueueKind.STEPS, queue, Answer(Outcome.ERROR, reason), emptied)
    if cancel_run is None:
        emptied.left += await helm.broker.depth(helm.servers.physical_queue(QueueKind.RUNS, queue))
        return emptied
    ended = Answer(Outcome.ERROR, reason, first=tell_dagster)
    await _empty(helm, QueueKind.RUNS, queue, ended, emptied)
    return emptied


async def move_tasks(helm: Helm, queue: str, to_queue: str, reason: str) -> Emptied:
    """Have the runs send what waits in a queue to another one, and their launchers the runs.

    Raises:
        ServerError: a server is away or refuses; what has been moved stays so.
    """
    moved = Answer(Outcome.REFUSED, reason, to_queue)
    emptied = Emptied()
    await _empty(helm, QueueKind.STEPS, queue, moved, emptied)
    await _see_off(helm, await _empty(helm, QueueKind.RUNS, queue, moved, emptied), to_queue)
    return emptied


async def _see_off(helm: Helm, runs: Sequence[Envelope], to_queue: str) -> None:
    """Send those whole runs to their new queue that no launcher sends, as it lives no more."""
    deadline = time.monotonic() + LAUNCHER_SECONDS
    left = list(runs)
    try:
        while left and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK_SECONDS)
            left = [it for it in left if await _is_refused(helm, it)]
    finally:  # at Ctrl-C too: they wait in no queue
        for run in left:
            if await helm.backend.reopen(run.run_id, run.task_id):  # whoever reopens it sends it
                moved = replace(run, queue=to_queue, epoch=await helm.backend.epoch())
                physical = helm.servers.physical_queue(QueueKind.RUNS, to_queue)
                await helm.broker.kick(moved.to_message(physical, helm.servers.signer))


async def _is_refused(helm: Helm, run: Envelope) -> bool:
    _, reports = await helm.backend.inspect(run.run_id, [run.task_id])
    return reports[run.task_id].state is TaskState.REFUSED


async def _empty(
    helm: Helm,
    kind: QueueKind,
    queue: str,
    answer: Answer,
    emptied: Emptied,
) -> list[Envelope]:
    """Give everything that waits an answer; the tasks that have it.

    Args:
        emptied: counts what becomes of it.
    """
    answered = []
    # what comes meanwhile stays, or a run that sends again what it gets back would keep us here
    left = await helm.broker.depth(helm.servers.physical_queue(kind, queue))
    in_hand: list[Delivery] = []
    try:
        async for delivery, envelope in waiting_in(helm, kind, queue):
            in_hand.append(delivery)
            taken = None if envelope is None else await take(helm, envelope, answer)
            _count(emptied, kind, taken)
            if envelope is not None and taken is Taken.ANSWERED:
                answered.append(envelope)
            if taken is not Taken.LEFT:
                await in_hand.pop().ack()
            left -= 1
            if left <= 0:
                break
    finally:
        # only now, or they would be the next ones again
        for delivery in in_hand:
            await delivery.release()
    return answered


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
