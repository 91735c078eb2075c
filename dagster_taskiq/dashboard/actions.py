"""What can be ordered on the page: each action is one entry of ``ACTIONS``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from dagster_taskiq.dashboard.looks import Opened
from dagster_taskiq.errors import DagsterTaskiqError
from dagster_taskiq.messages.control import refuses, worker_order
from dagster_taskiq.messages.worker_records import WorkerRecord


class Subject(str, Enum):
    """What an action is about."""

    WORKER = "worker"
    QUEUE = "queue"
    TASK = "task"


@dataclass(frozen=True)
class Order:
    """An action that somebody has asked for.

    Attributes:
        servers: with connections of this order alone.
        target: id of a worker or of a task, or name of a queue.
        reason: that was given for it; may be empty.
    """

    servers: Opened
    target: str
    reason: str = ""


def _always(_: Any) -> bool:
    return True


@dataclass(frozen=True)
class Action:
    """Something that can be ordered.

    Attributes:
        key: in addresses of the page.
        label: of its button.
        effect: what it does, sentences for who is asked whether it is meant.
        do: does it, and says in a sentence what was done; raises DagsterTaskiqError with a sentence
            where it could not.
        fits: whether it is offered beside a row of the subject's table.
        asks_reason: whether a reason can be given.
        is_grave: whether its button is marked.
    """

    key: str
    label: str
    subject: Subject
    effect: str
    do: Callable[[Order], Awaitable[str]]
    fits: Callable[[Any], bool] = _always
    asks_reason: bool = False
    is_grave: bool = False


def _lives(row: Any) -> bool:
    return not row.is_gone


async def _worker_of(order: Order) -> WorkerRecord:
    """The worker that an order is about.

    Raises:
        DagsterTaskiqError: it is not there, or would refuse the order.
    """
    backend, servers = order.servers.backend, order.servers.servers
    await backend.startup()
    found = [it for it in await backend.workers() if it.worker_id == order.target]
    if not found:
        raise DagsterTaskiqError("That worker is not running any more.")
    if refusal := refuses(servers.signer, found[0]):
        raise DagsterTaskiqError(f"The order would be of no use: {refusal}")
    return found[0]


async def _tell(order: Order, kind: str) -> WorkerRecord:
    record = await _worker_of(order)
    signer = order.servers.servers.signer
    await order.servers.backend.send_control(record.worker_id, worker_order(signer, record, kind))
    return record


async def _drain(order: Order) -> str:
    record = await _tell(order, "terminate")
    return f"Told {record.name} to finish its steps and stop."


async def _reload(order: Order) -> str:
    record = await _tell(order, "reload")
    return f"Told {record.name} to reload."


ACTIONS: Mapping[str, Action] = {
    it.key: it
    for it in (
        Action(
            "worker-reload",
            "Reload",
            Subject.WORKER,
            "Its processes are replaced between steps, so that new code is run. No step is "
            "interrupted.",
            _reload,
            fits=_lives,
        ),
        Action(
            "worker-drain",
            "Drain",
            Subject.WORKER,
            "It takes nothing new, finishes its steps and stops. Told twice, it stops now, and "
            "cancels its steps.",
            _drain,
            fits=_lives,
            is_grave=True,
        ),
    )
}
