"""What can be ordered on the page: each action is one entry of ``ACTIONS``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from dagster_taskiq.backend import Backend
from dagster_taskiq.connections import Servers
from dagster_taskiq.dashboard.looks import opened
from dagster_taskiq.dashboard.words import count_of, short_id
from dagster_taskiq.errors import DagsterTaskiqError
from dagster_taskiq.messages.control import OrderKind
from dagster_taskiq.messages.envelope import QueueKind
from dagster_taskiq.overview import TaskView, read_overview
from dagster_taskiq.steering.helm import Helm, opened_helm
from dagster_taskiq.steering.queues import pause_queue, resume_queue
from dagster_taskiq.steering.tasks import CancelOutcome, cancel_task
from dagster_taskiq.steering.workers import Told, answers_of, give_order

#: How long the page waits for a worker to obey; later it does so all the same.
ANSWER_SECONDS = 3.0

#: How many tasks of a queue are looked through for one.
_MOST_LOOKED_THROUGH = 10_000


class Subject(str, Enum):
    """What an action is about."""

    WORKER = "worker"
    QUEUE = "queue"
    TASK = "task"


@dataclass(frozen=True)
class Order:
    """An action that somebody has asked for.

    Attributes:
        target: id of a worker or of a task, or name of a queue.
        reason: that was given for it; may be empty.
        user: who asks; empty where nobody has a name.
    """

    servers: Servers
    target: str
    reason: str = ""
    user: str = ""


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
    fits: Callable[[Any], bool]
    asks_reason: bool = False
    is_grave: bool = False


# --- workers ---


@asynccontextmanager
async def _backend_of(order: Order) -> AsyncIterator[Backend]:
    """The backend alone, as a worker can be told something while the broker is away."""
    async with opened(order.servers) as connected:
        await connected.backend.startup()
        yield connected.backend


async def _tell(order: Order, kind: OrderKind, done: str, **details: Any) -> str:
    """Give a worker an order.

    Args:
        done: what it has done when it has obeyed, behind its name.

    Raises:
        DagsterTaskiqError: it is not there, or would refuse the order, or the backend is away.
    """
    async with _backend_of(order) as backend:
        records = [it for it in await backend.workers() if it.worker_id == order.target]
        if not records:
            raise DagsterTaskiqError("That worker is not running any more.")
        told = await give_order(backend, order.servers.signer, records, kind, **details)
        for refusal in told.refusals:
            raise DagsterTaskiqError(f"The order would be of no use: {refusal}")
        name = records[0].name
        if await answers_of(backend, told, ANSWER_SECONDS):
            return f"{name} {done}."
        return f"Told {name}, which has not answered yet: it obeys when it finds the order."


async def _pause_worker(order: Order) -> str:
    return await _tell(order, OrderKind.PAUSE, "takes nothing new", reason=order.reason)


async def _resume_worker(order: Order) -> str:
    return await _tell(order, OrderKind.RESUME, "takes tasks again")


async def _reload(order: Order) -> str:
    return await _tell(order, OrderKind.RELOAD, "reloads")


async def _drain(order: Order) -> str:
    return await _tell(order, OrderKind.TERMINATE, "finishes its steps and stops")


def _runs(row: Any) -> bool:
    return not row.is_gone and not row.is_paused


def _lives(row: Any) -> bool:
    return not row.is_gone


def _is_paused(row: Any) -> bool:
    return bool(row.is_paused)


# --- queues and tasks ---


@asynccontextmanager
async def _helm_of(order: Order) -> AsyncIterator[Helm]:
    async with opened_helm(order.servers) as helm:
        yield replace(helm, user=order.user or helm.user)


async def _pause_queue(order: Order) -> str:
    async with _helm_of(order) as helm:
        told = await pause_queue(helm, order.target, order.reason)
        return f"Queue {order.target} is paused; {await _heard(helm, told)}."


async def _resume_queue(order: Order) -> str:
    async with _helm_of(order) as helm:
        told = await resume_queue(helm, order.target)
        if told is None:
            raise DagsterTaskiqError(f"Queue {order.target} is not paused any more.")
        return f"Queue {order.target} is resumed; {await _heard(helm, told)}."


async def _heard(helm: Helm, told: Told) -> str:
    answers = await answers_of(helm.backend, told, ANSWER_SECONDS)
    later = len(told.records) - len(answers)
    more = f", {count_of(later, 'other')} within half a minute" if later else ""
    return f"{count_of(len(answers), 'worker')} told{more}"


async def _cancel(order: Order) -> str:
    async with _helm_of(order) as helm:
        task = await _task_of(helm, order.target)
        outcome = await cancel_task(helm, task, helm.who_and_why("Cancelled", order.reason))
    step = f"{task.step_key or 'the step'} of run {short_id(task.run_id)}"
    if outcome is CancelOutcome.GONE:
        raise DagsterTaskiqError(f"Nothing to cancel: {step} is over, or its run is judging it.")
    if outcome is CancelOutcome.TOLD:
        return f"Told the worker of {step} to stop it."
    return f"Cancelled {step}, which no worker had started."


async def _task_of(helm: Helm, task_id: str) -> TaskView:
    """The step that an order is about.

    Raises:
        DagsterTaskiqError: it is not in flight, or a whole run.
    """
    seen = await read_overview(
        helm.servers, helm.backend, helm.broker, most_waiting=_MOST_LOOKED_THROUGH
    )
    found = {it.task_id: it for it in seen.tasks()}.get(task_id)
    if found is None:
        raise DagsterTaskiqError("That step is over, or its run is sending it again.")
    if found.kind is QueueKind.RUNS:
        raise DagsterTaskiqError("That is a whole run: terminate it in Dagster.")
    return found


def _is_open(row: Any) -> bool:
    return not row.is_paused


def _is_step(row: Any) -> bool:
    return bool(row.is_step)


ACTIONS: Mapping[str, Action] = {
    it.key: it
    for it in (
        Action(
            "worker-pause",
            "Pause",
            Subject.WORKER,
            "It takes nothing new until it is resumed, or started again. What it executes goes on.",
            _pause_worker,
            _runs,
            asks_reason=True,
        ),
        Action(
            "worker-resume",
            "Resume",
            Subject.WORKER,
            "It takes tasks again.",
            _resume_worker,
            _is_paused,
        ),
        Action(
            "worker-reload",
            "Reload",
            Subject.WORKER,
            "Its processes are replaced between steps, so that new code is run. No step is "
            "interrupted.",
            _reload,
            _lives,
        ),
        Action(
            "worker-drain",
            "Drain",
            Subject.WORKER,
            "It takes nothing new, finishes its steps and stops. Told twice, it stops now, and "
            "cancels its steps.",
            _drain,
            _lives,
            is_grave=True,
        ),
        Action(
            "queue-pause",
            "Pause",
            Subject.QUEUE,
            "No worker takes steps or runs from it until it is resumed, not even one that is "
            "started later. What is executed goes on.",
            _pause_queue,
            _is_open,
            asks_reason=True,
        ),
        Action(
            "queue-resume",
            "Resume",
            Subject.QUEUE,
            "Workers take steps and runs from it again.",
            _resume_queue,
            _is_paused,
        ),
        Action(
            "task-cancel",
            "Cancel",
            Subject.TASK,
            "This attempt of the step fails, for the reason that you give and without a retry. One "
            "that is executed is stopped by SIGTERM, and by SIGKILL after its grace period.",
            _cancel,
            _is_step,
            asks_reason=True,
            is_grave=True,
        ),
    )
}
