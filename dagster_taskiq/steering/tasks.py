"""Cancelling one task."""

from __future__ import annotations

from enum import Enum

from dagster_taskiq.backend import TaskState
from dagster_taskiq.errors import MalformedTaskError, UntrustedError
from dagster_taskiq.messages.control import cancel_order
from dagster_taskiq.messages.envelope import Envelope
from dagster_taskiq.messages.queue_names import QueueKind
from dagster_taskiq.messages.results import Outcome
from dagster_taskiq.overview import TaskStatus, TaskView
from dagster_taskiq.steering.helm import Helm
from dagster_taskiq.steering.taking import Answer, Taken, take

#: How many of a queue's tasks are looked through for one.
MOST_LOOKED_THROUGH = 10_000


class CancelOutcome(Enum):
    """What became of a task that was to be cancelled."""

    #: It waited, and is over.
    ENDED = "ended"
    #: Its worker was told to stop it.
    TOLD = "told"
    #: It is over, or has just moved on.
    GONE = "gone"


async def cancel_task(helm: Helm, task: TaskView, reason: str) -> CancelOutcome:
    """Cancel one attempt of a step: it fails without a retry, for a reason.

    Raises:
        ServerError: a server is away or refuses.
    """
    if task.status is TaskStatus.WAITING and await _end_waiting(helm, task, reason):
        return CancelOutcome.ENDED
    order = cancel_order(helm.servers.signer, task.task_id, reason)
    _, states = await helm.backend.cancel(task.run_id, {task.task_id: order})
    state = states[task.task_id]
    if state is TaskState.CANCELLED:
        return CancelOutcome.ENDED
    return CancelOutcome.TOLD if state is TaskState.CLAIMED else CancelOutcome.GONE


async def _end_waiting(helm: Helm, task: TaskView, reason: str) -> bool:
    """Give a waiting task its result, and take it out of its queue; False where it is not there."""
    physical = helm.servers.physical_queue(QueueKind.STEPS, task.queue or "")
    for message in await helm.broker.peek(physical, MOST_LOOKED_THROUGH) or ():
        if message.task_id != task.task_id:
            continue
        try:
            envelope = Envelope.from_bytes(message.data, helm.servers.signer)
        except (MalformedTaskError, UntrustedError):
            return False
        taken = await take(helm, envelope, Answer(Outcome.ERROR, reason))
        if taken is not Taken.ANSWERED:
            return False
        await helm.broker.withdraw(physical, [task.task_id])
        return True
    return False
