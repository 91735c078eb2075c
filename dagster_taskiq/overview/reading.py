"""How the read model is read from backend and broker."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from dagster_taskiq.backend import Backend, TaskState
from dagster_taskiq.backend.base import RunReport
from dagster_taskiq.brokers import TaskBroker
from dagster_taskiq.brokers.looks import WaitingTask
from dagster_taskiq.connections import Servers
from dagster_taskiq.errors import MalformedTaskError, ServerError, UntrustedError
from dagster_taskiq.messages.envelope import Envelope
from dagster_taskiq.messages.queue_names import QueueKind
from dagster_taskiq.messages.queue_pauses import QueuePause
from dagster_taskiq.messages.queue_waits import QueueWait, QueueWaits
from dagster_taskiq.messages.worker_records import PAUSED, RunningTask, WorkerRecord
from dagster_taskiq.overview.views import (
    Overview,
    QueueView,
    RunView,
    ServerView,
    TaskStatus,
    TaskView,
)

#: How many of the tasks that wait in a queue are shown one by one.
MOST_WAITING = 100

#: Why a task that is not executed does not wait in a queue either, and what its run's loop does.
_REASONS: Mapping[TaskState, tuple[str, str]] = {
    TaskState.EXPIRED: ("Its worker has not been heard of for a lease", "judges it"),
    TaskState.DROPPED: ("A worker dropped its message", "sends it again"),
    TaskState.REFUSED: ("A worker has given it back", "sends it again"),
}

#: Of a step whose run nobody executes; what becomes of the run is Dagster's affair.
_WITHOUT_LOOP = "The process of its run is gone, and no worker executes a step of such a run."


async def reach_servers(servers: Servers, backend: Backend, broker: TaskBroker) -> list[ServerView]:
    """Start both, and say how they answer; one that is away is no error."""
    if servers.broker.address == servers.backend.address:
        views = [await _reach(("broker", "backend"), backend)]
        if not views[0].problem:
            await broker.startup()
        return views
    # together, as one that is away may take seconds to be found so
    return list(await asyncio.gather(_reach(("broker",), broker), _reach(("backend",), backend)))


async def _reach(roles: tuple[str, ...], server: Backend | TaskBroker) -> ServerView:
    try:
        await server.startup()
        began = time.monotonic()
        product = await server.product()
    except ServerError as error:
        return ServerView(roles, None, server.address, None, str(error))
    return ServerView(roles, product, server.address, time.monotonic() - began)


async def read_overview(
    servers: Servers,
    backend: Backend,
    broker: TaskBroker,
    queues: Iterable[str] = (),
    most_waiting: int = MOST_WAITING,
    most_ended: int = 0,
) -> Overview:
    """What there is to see on broker and backend; how they answer is ``reach_servers``.

    Args:
        servers: which they are.
        backend, broker: on which ``startup`` was called.
        queues: that are shown though no worker listens on them and no task may wait there.
        most_waiting: how many of the tasks that wait in a queue are shown one by one.
        most_ended: how many attempts that have ended are shown, of each ``EndGroup``.

    Raises:
        ServerError: one of the two is away or refuses.
    """
    known = await read_backend(backend, most_ended)
    pauses = await backend.paused_queues()
    reader = _QueueReader(servers, backend, broker, known.workers, known.runs, pauses, most_waiting)
    return replace(known, queues=await reader.read(queues))


async def read_backend(backend: Backend, most_ended: int = 0) -> Overview:
    """Workers, runs and what has ended alone, which are seen while the broker is away.

    Args:
        most_ended: see ``read_overview``.

    Raises:
        ServerError: the backend is away or refuses.
    """
    workers, runs = await backend.workers(), await _read_runs(backend)
    ended = await backend.ended(most_ended) if most_ended else []
    lost_workers = await backend.lost_workers()
    return Overview(workers=workers, lost_workers=lost_workers, runs=runs, ended=ended)


# --- queues ---


@dataclass(frozen=True)
class _QueueReader:
    """Reads queues, with what is known of workers and runs.

    Attributes:
        most_waiting: see ``read_overview``.
    """

    servers: Servers
    backend: Backend
    broker: TaskBroker
    workers: Sequence[WorkerRecord]
    runs: Sequence[RunView]
    pauses: Mapping[str, QueuePause]
    most_waiting: int

    async def read(self, names: Iterable[str]) -> list[QueueView]:
        """The queues that are known of, and those of the names, by name."""
        listed = await self.broker.queues_with_tasks() or set()
        found = {queue for physical in listed if (queue := self.servers.queue_of(physical))}
        found |= {(kind, name) for name in (*names, *self.pauses) for kind in QueueKind}
        for worker in self.workers:
            found |= {(kind, name) for kind in _kinds_of(worker) for name in worker.queues}
        running = Counter(
            (task.kind, task.queue)
            for run in self.runs
            for task in run.tasks
            if task.status is TaskStatus.RUNNING
        )
        ordered = sorted(found, key=lambda queue: (queue[1], queue[0] is not QueueKind.STEPS))
        views = [await self._read_queue(kind, name, running[kind, name]) for kind, name in ordered]
        # a queue of the settings is shown though it is empty, and its part for runs is seldom used
        return [it for it in views if it.kind is QueueKind.STEPS or it.depth or it.workers]

    async def _read_queue(self, kind: QueueKind, name: str, running: int) -> QueueView:
        physical = self.servers.physical_queue(kind, name)
        depth = await self.broker.depth(physical)
        groups = await self.broker.by_priority(physical)
        waits = QueueWaits(
            self.workers,
            kind,
            self.servers.broker.address,
            self.servers.signer,
            says_busy_steps=depth > 0,
            pauses=self.pauses,
        )
        wait = waits.of(name)
        listening = [
            it.name
            for it in self.workers
            if name in it.queues
            and kind in _kinds_of(it)
            and it.state not in ("draining", PAUSED)
            and name not in self.pauses
        ]
        known = QueueView(
            name,
            kind,
            depth,
            None,
            None,
            None,
            running,
            listening,
            wait,
            self.pauses.get(name),
            self._blindness(),
        )
        if groups is None:
            return known
        firsts = [self._sent_at(group.first) for group in groups]
        return replace(
            known,
            priorities={group.first.priority: group.count for group in groups},
            oldest_sent_at=min((at for at in firsts if at is not None), default=None),
            waiting=await self._read_waiting(physical, wait),
            blindness="",
        )

    def _blindness(self) -> str:
        product = self.servers.broker.kind.name
        return f"{product} says how many tasks wait in a queue, not which, and lists no queues."

    def _sent_at(self, message: WaitingTask) -> float | None:
        envelope = self._open(message)
        return envelope.sent_at or None if envelope else None

    async def _read_waiting(self, physical: str, wait: QueueWait | None) -> list[TaskView]:
        if not self.most_waiting:
            return []
        messages = await self.broker.peek(physical, self.most_waiting) or []
        live = {run.run_id for run in self.runs if run.has_loop}
        return [
            _waiting_task(envelope, message.priority, position, self._reason(envelope, wait, live))
            for position, message in enumerate(messages, 1)
            if (envelope := self._open(message))
        ]

    def _open(self, message: WaitingTask) -> Envelope | None:
        try:
            return Envelope.from_bytes(message.data, self.servers.signer)
        except (MalformedTaskError, UntrustedError):
            return None

    def _reason(
        self, envelope: Envelope, wait: QueueWait | None, live_runs: Collection[str]
    ) -> str:
        own = self.backend.identity
        if envelope.state and own and envelope.state != own:
            return (
                f"Its run has another backend, {envelope.backend}, than is looked at here, "
                f"{self.backend.address}; only a worker with the run's backend can take it."
            )
        if envelope.kind is QueueKind.STEPS and envelope.run_id not in live_runs:
            return _WITHOUT_LOOP
        return wait.reason if wait else ""


def _kinds_of(worker: WorkerRecord) -> list[QueueKind]:
    slots = {QueueKind.STEPS: worker.slots, QueueKind.RUNS: worker.run_slots}
    return [kind for kind, count in slots.items() if count]


def _waiting_task(envelope: Envelope, priority: int, position: int, reason: str) -> TaskView:
    return TaskView(
        task_id=envelope.task_id,
        run_id=envelope.run_id,
        state=TaskState.UNKNOWN,
        step_key=envelope.step_key or "",
        job=envelope.job,
        attempt=envelope.attempt,
        queue=envelope.queue,
        priority=priority,
        position=position,
        sent_at=envelope.sent_at or None,
        reason=reason,
    )


# --- runs ---


async def _read_runs(backend: Backend) -> list[RunView]:
    told = {task.task_id: task for task in await backend.running()}
    return [
        RunView(
            report.run_id,
            report.has_loop,
            report.is_resumable,
            _tasks_of(report, told),
            report.withheld,
        )
        for report in await backend.runs()
    ]


def _tasks_of(run: RunReport, told: Mapping[str, RunningTask]) -> list[TaskView]:
    views = []
    for task_id, report in run.tasks.items():
        view = TaskView(
            task_id,
            run.run_id,
            report.state,
            place=report.place,
            reason=_reason_of(report.state, run),
        )
        task = told.get(task_id)
        if task is not None and task.run_id == run.run_id:
            view = replace(
                view,
                step_key=task.step_key,
                job=task.job,
                attempt=task.attempt,
                queue=task.queue,
                claimed_at=task.claimed_at,
            )
        views.append(view)
    return sorted(views, key=lambda view: (view.step_key or "", view.task_id))


def _reason_of(state: TaskState, run: RunReport) -> str:
    if state not in _REASONS:
        return ""
    what, loop_does = _REASONS[state]
    return f"{what}: its run {loop_does}." if run.has_loop else f"{what}. {_WITHOUT_LOOP}"
