"""What backends in memory share: a server's tables and mailboxes, its clock and its accidents."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from dagster_taskiq.aio.remote_event import RemoteEvent
from dagster_taskiq.backend.history import History
from dagster_taskiq.backend.life import Moment, RunLife, TaskLife
from dagster_taskiq.defaults import LOST_WORKER_SECONDS
from dagster_taskiq.errors import UnreachableServerError


@dataclass(frozen=True)
class _Mailbox:
    """Messages that wait; ``ends_at`` is by the server's clock."""

    messages: tuple[str, ...]
    ends_at: float


@dataclass(frozen=True)
class _StoredWorker:
    """A worker's record, and what it executes, as signed; ``ends_at`` is by the server's clock."""

    data: bytes
    running: bytes
    ends_at: float


def results_of(run_id: str) -> Hashable:
    """The name of the mailbox of a run's results."""
    return "results", run_id


def orders_of(worker_id: str) -> Hashable:
    """The name of the mailbox of a worker's orders."""
    return "orders", worker_id


@dataclass
class _Tables:
    """What a server keeps: immutable values by their names, so that a copy is a snapshot.

    Attributes:
        tasks: by run, then by task.
    """

    runs: dict[str, RunLife] = field(default_factory=dict)
    tasks: dict[str, dict[str, TaskLife]] = field(default_factory=dict)
    mailboxes: dict[Hashable, _Mailbox] = field(default_factory=dict)
    workers: dict[str, _StoredWorker] = field(default_factory=dict)
    pauses: dict[str, bytes] = field(default_factory=dict)
    history: History = field(default_factory=History)

    def copy(self) -> _Tables:
        """A snapshot, which later changes leave alone."""
        tasks = {run_id: dict(lives) for run_id, lives in self.tasks.items()}
        return _Tables(
            dict(self.runs),
            tasks,
            dict(self.mailboxes),
            dict(self.workers),
            dict(self.pauses),
            self.history,
        )


@dataclass(frozen=True)
class MemorySnapshot:
    """What a ``MemoryServer`` kept at one moment, for ``MemoryServer.restore``."""

    tables: _Tables


class Session:
    """One atomic step on a server's tables, at one moment."""

    def __init__(self, tables: _Tables, moment: Moment, wake: Callable[[Hashable], None]) -> None:
        self._tables = tables
        self.moment = moment
        self._wake = wake

    @property
    def pauses(self) -> dict[str, bytes]:
        """The pauses of queues, as signed, by queue."""
        return self._tables.pauses

    # --- runs and tasks ---

    def run(self, run_id: str) -> RunLife:
        """The run's record and loop, without what has expired."""
        before = self._tables.runs.get(run_id, RunLife())
        run = before.at(self.moment)
        if run is not before:
            self.put_run(run_id, run)
        if before.ends_at is not None and run.ends_at is None:
            for task_id, task in list(self._tables.tasks.get(run_id, {}).items()):
                self.put_task(run_id, task_id, task.without_record())
        return run

    def put_run(self, run_id: str, run: RunLife) -> None:
        """Store a run's record and loop."""
        self._tables.runs[run_id] = run

    def task(self, run_id: str, task_id: str) -> TaskLife:
        """The task's life, without what has expired."""
        self.run(run_id)  # without its record, less is left of its tasks
        return self._tables.tasks.get(run_id, {}).get(task_id, TaskLife()).at(self.moment)

    def run_ids(self) -> list[str]:
        """The runs of which anything may be known."""
        return sorted({*self._tables.runs, *self._tables.tasks})

    def task_ids(self, run_id: str) -> list[str]:
        """The tasks of a run of which anything may be known."""
        return list(self._tables.tasks.get(run_id, {}))

    def change_task(self, run_id: str, task_id: str, changed: TaskLife) -> None:
        """Store a task's life after a change, for which its run's record lives longer."""
        self.put_task(run_id, task_id, changed)
        self.put_run(run_id, self.run(run_id).kept(self.moment))

    def put_task(self, run_id: str, task_id: str, changed: TaskLife) -> None:
        """Store what is left of a task's life, which makes no difference to the record."""
        lives = self._tables.tasks.setdefault(run_id, {})
        lives[task_id] = changed
        if changed == TaskLife():
            del lives[task_id]

    def sweep(self) -> None:
        """Drop what has expired and nobody asks for any more."""
        tables, moment = self._tables, self.moment
        for run_id in list(tables.runs):
            run, lives = self.run(run_id), tables.tasks.get(run_id, {})
            for task_id, task in list(lives.items()):
                self.put_task(run_id, task_id, task.at(moment))
            if run == RunLife() and not lives:
                del tables.runs[run_id]
                tables.tasks.pop(run_id, None)
        tables.mailboxes = {
            name: it for name, it in tables.mailboxes.items() if it.ends_at > moment.seconds
        }
        tables.workers = {
            name: it
            for name, it in tables.workers.items()
            if it.ends_at + LOST_WORKER_SECONDS > moment.seconds
        }
        tables.history = tables.history.at(moment.seconds)

    # --- mailboxes and workers ---

    def post(self, mailbox: Hashable, message: str, expires_seconds: float) -> None:
        """Add a message; the mailbox's time begins anew."""
        found = self._tables.mailboxes.get(mailbox)
        waiting = found.messages if found and found.ends_at > self.moment.seconds else ()
        ends_at = self.moment.seconds + expires_seconds
        self._tables.mailboxes[mailbox] = _Mailbox((*waiting, message), ends_at)
        self._wake(mailbox)

    def take(self, mailbox: Hashable) -> tuple[str, ...]:
        """All that waits; nobody else gets it."""
        found = self._tables.mailboxes.pop(mailbox, None)
        return found.messages if found and found.ends_at > self.moment.seconds else ()

    def put_worker(
        self, worker_id: str, data: bytes, running: bytes, expires_seconds: float
    ) -> None:
        """Store a worker's record, and what it executes, as they were signed."""
        ends_at = self.moment.seconds + expires_seconds
        self._tables.workers[worker_id] = _StoredWorker(data, running, ends_at)

    def remove_worker(self, worker_id: str) -> None:
        """Drop a worker's record and its orders."""
        self._tables.workers.pop(worker_id, None)
        self.take(orders_of(worker_id))

    def workers(self) -> dict[str, bytes]:
        """The records of those that live, as they were signed."""
        return {key: it.data for key, it in self._live_workers().items()}

    def running(self) -> dict[str, bytes]:
        """What those that live execute, as it was signed."""
        return {key: it.running for key, it in self._live_workers().items()}

    @property
    def history(self) -> History:
        """What has ended, and the counters."""
        return self._tables.history

    def put_history(self, history: History) -> None:
        """Store what has ended, and the counters."""
        self._tables.history = history

    def lost_workers(self) -> dict[str, bytes]:
        """The records, by id, of workers that are silent and have not signed off."""
        live, since = self._live_workers(), self.moment.seconds - LOST_WORKER_SECONDS
        workers = self._tables.workers.items()
        return {key: it.data for key, it in workers if key not in live and it.ends_at > since}

    def _live_workers(self) -> dict[str, _StoredWorker]:
        workers = self._tables.workers.items()
        return {key: it for key, it in workers if it.ends_at > self.moment.seconds}


class MemoryServer:
    """What several ``MemoryBackend`` share, with the accidents that a real server has.

    Args:
        clock: seconds, for leases and all that expires. Waits for a mailbox are by the event
            loop's own clock.
        name: of its address, ``memory://<name>``.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, name: str = "test") -> None:
        self.address = f"memory://{name}"
        #: See ``Backend.identity``.
        self.identity = uuid.uuid4().hex
        self._clock = clock
        self._lock = threading.RLock()
        self._tables = _Tables()
        self._epoch = uuid.uuid4().hex
        self._is_frozen = False
        self._waiters: dict[Hashable, set[RemoteEvent]] = {}

    # --- accidents ---

    def restart(self) -> None:
        """A new life of the server, with all its data."""
        with self._lock:
            self._epoch = uuid.uuid4().hex

    def forget(self) -> None:
        """A new life of the server, without any data."""
        self.restore(MemorySnapshot(_Tables()))

    def snapshot(self) -> MemorySnapshot:
        """What it keeps now."""
        with self._lock:
            return MemorySnapshot(self._tables.copy())

    def restore(self, snapshot: MemorySnapshot) -> None:
        """A new life of the server, with older data."""
        with self._lock:
            self._tables = snapshot.tables.copy()
            self.restart()

    def freeze(self) -> None:
        """Be unreachable, until ``thaw``; who waits for a mailbox is told."""
        with self._lock:
            self._is_frozen = True
            for waiters in self._waiters.values():
                for waiter in waiters:
                    waiter.set()

    def thaw(self) -> None:
        """Undo ``freeze``."""
        with self._lock:
            self._is_frozen = False

    def expire_claim(self, run_id: str, task_id: str) -> None:
        """End the lease of the claim on a task now."""
        with self._lock:
            lives = self._tables.tasks.get(run_id, {})
            if task_id in lives:
                lives[task_id] = lives[task_id].without_hold()

    def expire_loop(self, run_id: str) -> None:
        """End the lease of a run's execution loop now."""
        with self._lock:
            if run_id in self._tables.runs:
                self._tables.runs[run_id] = self._tables.runs[run_id].without_loop()

    # --- for ``MemoryBackend`` ---

    @contextmanager
    def reached(self) -> Iterator[Session]:
        """One atomic step.

        Raises:
            UnreachableServerError: the server is frozen.
        """
        with self._lock:
            if self._is_frozen:
                message = f"Cannot reach {self.address}: it is frozen. Call its thaw()."
                raise UnreachableServerError(self.address, message)
            yield Session(self._tables, Moment(self._clock(), self._epoch), self._wake)

    async def wait_for(self, mailbox: Hashable, timeout_seconds: float) -> tuple[str, ...]:
        """Take what is in a mailbox, as soon as there is something; nothing after the timeout."""
        waiter = RemoteEvent()
        deadline = waiter.loop.time() + timeout_seconds
        with self._lock:
            self._waiters.setdefault(mailbox, set()).add(waiter)
        try:
            while True:
                waiter.clear()
                with self.reached() as session:
                    if found := session.take(mailbox):
                        return found
                await asyncio.wait_for(waiter.wait(), deadline - waiter.loop.time())
        except asyncio.TimeoutError:
            return ()
        finally:
            with self._lock:
                self._waiters[mailbox].discard(waiter)
                if not self._waiters[mailbox]:
                    del self._waiters[mailbox]

    def _wake(self, mailbox: Hashable) -> None:
        for waiter in self._waiters.get(mailbox, ()):
            waiter.set()
