"""What workers, queues and runs do now: one read model, for everything that shows it.

It is read from the contracts of backend and broker, so it is the same for every kind of server. The
backend is the truth about who executes what; the workers' own words add what people want to know of
it, and may be some seconds old. Nothing here changes anything on a server.

A dash in a listing is a ``None`` here: the server cannot tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from dagster_taskiq.backend import Backend, TaskReport, TaskState
from dagster_taskiq.brokers import TaskBroker
from dagster_taskiq.connections import Servers
from dagster_taskiq.errors import MalformedTaskError, UntrustedError
from dagster_taskiq.messages.envelope import Envelope, QueueKind
from dagster_taskiq.messages.queue_waits import QueueWait, QueueWaits
from dagster_taskiq.messages.results import Place
from dagster_taskiq.messages.worker_records import RunningTask, WorkerRecord

#: How many of the tasks that wait in a queue are shown one by one.
MOST_WAITING = 100


@dataclass(frozen=True)
class TaskView:
    """A task that waits in a queue, is executed, or waits for a judgement.

    Attributes:
        state: UNKNOWN for one that waits; see ``TaskState``.
        step_key: empty for a whole run; None where only its id is known.
        attempt: see ``Envelope``; None as before.
        queue: as people name it; None as before.
        priority: of one that waits.
        position: in its queue, from 1, of one that waits.
        place: where it is executed.
        claimed_at: by the clock of its worker; seconds since the epoch.
    """

    task_id: str
    run_id: str
    state: TaskState
    step_key: str | None = None
    attempt: int | None = None
    queue: str | None = None
    priority: int | None = None
    position: int | None = None
    place: Place | None = None
    claimed_at: float | None = None


@dataclass(frozen=True)
class QueueView:
    """The part of a queue for tasks of one kind.

    Attributes:
        name: as people name it.
        depth: how many tasks wait.
        waiting: the next of them, at most ``MOST_WAITING``; None where the server cannot tell.
            What is no task of ours, or is not signed as it must be, is left out.
        workers: names of those that listen on it.
        wait: why a task would wait there, beside the tasks before it; None for no reason.
    """

    name: str
    kind: QueueKind
    depth: int
    waiting: Sequence[TaskView] | None
    workers: Sequence[str]
    wait: QueueWait | None


@dataclass(frozen=True)
class RunView:
    """A run that is not over.

    Attributes:
        has_loop: whether an execution loop of it lives.
        is_resumable: whether it may get another one.
        tasks: those that are executed or wait for a judgement, by step.
    """

    run_id: str
    has_loop: bool
    is_resumable: bool
    tasks: Sequence[TaskView]


@dataclass(frozen=True)
class Overview:
    """All of it; a server's parts are of one moment after the other."""

    workers: Sequence[WorkerRecord]
    queues: Sequence[QueueView]
    runs: Sequence[RunView]


async def read_workers(backend: Backend, name: str | None = None) -> list[WorkerRecord]:
    """The workers that are listed, by name.

    Args:
        name: only those that it means; see ``is_named``.

    Raises:
        ServerError: the backend is away or refuses.
    """
    return [it for it in await backend.workers() if name is None or is_named(it, name)]


def is_named(record: WorkerRecord, name: str) -> bool:
    """Whether NAME, NAME@HOST or @HOST means this worker."""
    own, _, host = record.name.partition("@")
    return name in (record.name, own, f"@{host}")


async def read_overview(
    servers: Servers, backend: Backend, broker: TaskBroker, queues: Iterable[str] = ()
) -> Overview:
    """What there is to see on broker and backend.

    Args:
        servers: which they are.
        backend, broker: on which ``startup`` was called.
        queues: that are shown though no worker listens on them and no task may wait there.

    Raises:
        ServerError: one of the two is away or refuses.
    """
    workers = await read_workers(backend)
    return Overview(
        workers,
        await _read_queues(servers, broker, workers, queues),
        await _read_runs(backend),
    )


# --- queues ---


async def _read_queues(
    servers: Servers, broker: TaskBroker, workers: Sequence[WorkerRecord], names: Iterable[str]
) -> list[QueueView]:
    listed = await broker.queues_with_tasks() or set()
    found = {queue for physical in listed if (queue := servers.queue_of(physical))}
    found |= {(QueueKind.STEPS, name) for name in names}
    for worker in workers:
        found |= {(kind, name) for kind in _kinds_of(worker) for name in worker.queues}
    ordered = sorted(found, key=lambda queue: (queue[1], queue[0] is not QueueKind.STEPS))
    return [await _read_queue(servers, broker, workers, kind, name) for kind, name in ordered]


def _kinds_of(worker: WorkerRecord) -> list[QueueKind]:
    slots = {QueueKind.STEPS: worker.slots, QueueKind.RUNS: worker.run_slots}
    return [kind for kind, count in slots.items() if count]


async def _read_queue(
    servers: Servers,
    broker: TaskBroker,
    workers: Sequence[WorkerRecord],
    kind: QueueKind,
    name: str,
) -> QueueView:
    physical = servers.physical_queue(kind, name)
    depth = await broker.depth(physical)
    messages = await broker.peek(physical, MOST_WAITING)
    waiting = None
    if messages is not None:
        waiting = [
            view
            for position, message in enumerate(messages, 1)
            if (view := _waiting_task(servers, message.data, message.priority, position))
        ]
    listening = [it.name for it in workers if name in it.queues and kind in _kinds_of(it)]
    waits = QueueWaits(workers, kind, servers.broker.address, servers.signer)
    return QueueView(name, kind, depth, waiting, listening, waits.of(name))


def _waiting_task(servers: Servers, data: bytes, priority: int, position: int) -> TaskView | None:
    try:
        envelope = Envelope.from_bytes(data, servers.signer)
    except (MalformedTaskError, UntrustedError):
        return None
    return TaskView(
        task_id=envelope.task_id,
        run_id=envelope.run_id,
        state=TaskState.UNKNOWN,
        step_key=envelope.step_key or "",
        attempt=envelope.attempt,
        queue=envelope.queue,
        priority=priority,
        position=position,
    )


# --- runs ---


async def _read_runs(backend: Backend) -> list[RunView]:
    told = {task.task_id: task for task in await backend.running()}
    return [
        RunView(
            report.run_id,
            report.has_loop,
            report.is_resumable,
            _tasks_of(report.run_id, report.tasks, told),
        )
        for report in await backend.runs()
    ]


def _tasks_of(
    run_id: str, reports: Mapping[str, TaskReport], told: Mapping[str, RunningTask]
) -> list[TaskView]:
    views = []
    for task_id, report in reports.items():
        view = TaskView(task_id, run_id, report.state, place=report.place)
        task = told.get(task_id)
        if task is not None and task.run_id == run_id:
            view = replace(
                view,
                step_key=task.step_key,
                attempt=task.attempt,
                queue=task.queue,
                claimed_at=task.claimed_at,
            )
        views.append(view)
    return sorted(views, key=lambda view: (view.step_key or "", view.task_id))
