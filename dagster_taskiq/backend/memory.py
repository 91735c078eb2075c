"""The backend in memory: the whole contract in one process, for tests.

A ``MemoryServer`` is what a Redis server is to other backends: it keeps the state, and each process
of a test, or what stands for one, has a ``MemoryBackend`` of its own on it, in any thread::

    server = MemoryServer(clock=lambda: now)
    loop, worker = MemoryBackend(server), MemoryBackend(server)

What happens to a task is in ``life``; here is what keeps its state.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from dagster_taskiq.backend import life
from dagster_taskiq.backend.base import (
    CONTROL_EXPIRES_SECONDS,
    Backend,
    Claim,
    ClaimAnswer,
    Renewal,
    TaskReport,
    TaskState,
    superseded_error,
)
from dagster_taskiq.backend.life import Moment, RunLife, TaskLife
from dagster_taskiq.defaults import RUN_RECORD_EXPIRES_SECONDS
from dagster_taskiq.errors import UnreachableServerError
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.messages.worker_records import WorkerRecord, read_record, write_record


@dataclass(frozen=True)
class _Mailbox:
    """Messages that wait; ``ends_at`` is by the server's clock."""

    messages: tuple[str, ...]
    ends_at: float


@dataclass(frozen=True)
class _StoredWorker:
    """A worker's record as it was signed; ``ends_at`` is by the server's clock."""

    data: bytes
    ends_at: float


def _results_of(run_id: str) -> Hashable:
    """The name of the mailbox of a run's results."""
    return "results", run_id


def _orders_of(worker_id: str) -> Hashable:
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

    def copy(self) -> _Tables:
        tasks = {run_id: dict(lives) for run_id, lives in self.tasks.items()}
        return _Tables(dict(self.runs), tasks, dict(self.mailboxes), dict(self.workers))


@dataclass(frozen=True)
class MemorySnapshot:
    """What a ``MemoryServer`` kept at one moment, for ``MemoryServer.restore``."""

    tables: _Tables


class _Session:
    """One atomic step on a server's tables, at one moment."""

    def __init__(self, tables: _Tables, moment: Moment, wake: Callable[[Hashable], None]) -> None:
        self._tables = tables
        self.moment = moment
        self._wake = wake

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
            name: it for name, it in tables.workers.items() if it.ends_at > moment.seconds
        }

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

    def put_worker(self, worker_id: str, data: bytes, expires_seconds: float) -> None:
        ends_at = self.moment.seconds + expires_seconds
        self._tables.workers[worker_id] = _StoredWorker(data, ends_at)

    def remove_worker(self, worker_id: str) -> None:
        self._tables.workers.pop(worker_id, None)
        self.take(_orders_of(worker_id))

    def workers(self) -> dict[str, bytes]:
        """The records of those that live, as they were signed."""
        workers = self._tables.workers.items()
        return {key: it.data for key, it in workers if it.ends_at > self.moment.seconds}


@dataclass(eq=False)
class _Waiter:
    """Somebody who waits for a mailbox, in an event loop of any thread."""

    loop: asyncio.AbstractEventLoop
    woken: asyncio.Event = field(default_factory=asyncio.Event)

    def wake(self) -> None:
        with suppress(RuntimeError):  # its event loop is closed
            self.loop.call_soon_threadsafe(self.woken.set)


class MemoryServer:
    """What several ``MemoryBackend`` share, with the accidents that a real server has.

    Args:
        clock: seconds, for leases and all that expires. Waits for a mailbox are by the event
            loop's own clock.
        name: of its address, ``memory://<name>``.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, name: str = "test") -> None:
        self.address = f"memory://{name}"
        self._clock = clock
        self._lock = threading.RLock()
        self._tables = _Tables()
        self._epoch = uuid.uuid4().hex
        self._is_frozen = False
        self._waiters: dict[Hashable, set[_Waiter]] = {}

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
                    waiter.wake()

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
    def reached(self) -> Iterator[_Session]:
        """One atomic step.

        Raises:
            UnreachableServerError: the server is frozen.
        """
        with self._lock:
            if self._is_frozen:
                message = f"Cannot reach {self.address}: it is frozen. Call its thaw()."
                raise UnreachableServerError(self.address, message)
            yield _Session(self._tables, Moment(self._clock(), self._epoch), self._wake)

    async def wait_for(self, mailbox: Hashable, timeout_seconds: float) -> tuple[str, ...]:
        """Take what is in a mailbox, as soon as there is something; nothing after the timeout."""
        waiter = _Waiter(asyncio.get_running_loop())
        deadline = waiter.loop.time() + timeout_seconds
        with self._lock:
            self._waiters.setdefault(mailbox, set()).add(waiter)
        try:
            while True:
                waiter.woken.clear()
                with self.reached() as session:
                    if found := session.take(mailbox):
                        return found
                await asyncio.wait_for(waiter.woken.wait(), deadline - waiter.loop.time())
        except asyncio.TimeoutError:
            return ()
        finally:
            with self._lock:
                self._waiters[mailbox].discard(waiter)
                if not self._waiters[mailbox]:
                    del self._waiters[mailbox]

    def _wake(self, mailbox: Hashable) -> None:
        for waiter in self._waiters.get(mailbox, ()):
            waiter.wake()


class MemoryBackend(Backend):
    """See ``Backend``.

    Args:
        server: that keeps the state.
        signer: of workers' records.
    """

    def __init__(self, server: MemoryServer, signer: Signer | None = None) -> None:
        self.address = server.address
        self._server = server
        self._signer = signer or Signer()
        self._runs: dict[str, tuple[int, bool]] = {}

    async def startup(self) -> None:
        """See ``Backend``."""
        with self._server.reached():
            pass

    async def shutdown(self) -> None:
        """See ``Backend``: there is nothing to close."""

    # --- the execution loop's side ---

    async def open_run(
        self, run_id: str, *, generation: int, token: str, is_resumable: bool, lease_seconds: float
    ) -> str:
        """See ``RunBackend``."""
        self._runs[run_id] = (generation, is_resumable)
        with self._server.reached() as session:
            session.sweep()
            run, is_open = life.open_run(
                session.run(run_id),
                session.moment,
                generation=generation,
                token=token,
                is_resumable=is_resumable,
                lease_seconds=lease_seconds,
            )
            session.put_run(run_id, run)
        if not is_open:
            raise superseded_error(run_id, run.generation)
        return session.moment.epoch

    async def renew_run(self, run_id: str, *, token: str, lease_seconds: float) -> str | None:
        """See ``RunBackend``."""
        generation, is_resumable = self._runs[run_id]
        with self._server.reached() as session:
            run, is_renewed = life.renew_run(
                session.run(run_id),
                session.moment,
                generation=generation,
                token=token,
                is_resumable=is_resumable,
                lease_seconds=lease_seconds,
            )
            session.put_run(run_id, run)
        return session.moment.epoch if is_renewed else None

    async def close_run(self, run_id: str, *, token: str) -> None:
        """See ``RunBackend``."""
        with self._server.reached() as session:
            run, is_closed = life.close_run(session.run(run_id), session.moment, token=token)
            if is_closed:
                session.put_run(run_id, run)
                session.take(_results_of(run_id))
        self._runs.pop(run_id, None)

    async def disown_run(self, run_id: str) -> None:
        """See ``RunBackend``."""
        with self._server.reached() as session:
            session.put_run(run_id, life.disown_run(session.run(run_id), session.moment))

    async def wait_for_results(self, run_id: str, timeout_seconds: float) -> dict[str, bytes]:
        """See ``RunBackend``."""
        task_ids = await self._server.wait_for(_results_of(run_id), timeout_seconds)
        return await self.read_results(run_id, task_ids) if task_ids else {}

    async def read_results(self, run_id: str, task_ids: Sequence[str]) -> dict[str, bytes]:
        """See ``RunBackend``."""
        with self._server.reached() as session:
            results = {task_id: session.task(run_id, task_id).result for task_id in task_ids}
        return {task_id: result.data for task_id, result in results.items() if result}

    async def forget_results(self, run_id: str, task_ids: Sequence[str]) -> None:
        """See ``RunBackend``."""
        with self._server.reached() as session:
            for task_id in task_ids:
                task = session.task(run_id, task_id)
                session.put_task(run_id, task_id, task.without_result())

    async def inspect(
        self, run_id: str, task_ids: Sequence[str]
    ) -> tuple[str, dict[str, TaskReport]]:
        """See ``RunBackend``."""
        with self._server.reached() as session:
            reports = {
                task_id: life.report_task(session.task(run_id, task_id), session.moment)
                for task_id in task_ids
            }
        return session.moment.epoch, reports

    async def cancel(self, run_id: str, orders: Mapping[str, str]) -> dict[str, TaskState]:
        """See ``RunBackend``."""
        states: dict[str, TaskState] = {}
        with self._server.reached() as session:
            for task_id, order in orders.items():
                task = session.task(run_id, task_id)
                changed, states[task_id] = life.cancel_task(task, order)
                session.change_task(run_id, task_id, changed)
                if changed.hold and states[task_id] is TaskState.CLAIMED:
                    mailbox = _orders_of(changed.hold.place.worker_id)
                    session.post(mailbox, order, CONTROL_EXPIRES_SECONDS)
        return states

    async def condemn(self, run_id: str, task_id: str) -> bool:
        """See ``RunBackend``."""
        with self._server.reached() as session:
            changed, is_lost = life.condemn_task(session.task(run_id, task_id))
            if is_lost:
                session.change_task(run_id, task_id, changed)
        return is_lost

    async def reopen(self, run_id: str, task_id: str) -> bool:
        """See ``RunBackend``."""
        with self._server.reached() as session:
            changed, is_reopened = life.reopen_task(session.task(run_id, task_id))
            if is_reopened:
                session.change_task(run_id, task_id, changed)
        return is_reopened

    # --- the worker's side ---

    async def claim(
        self, claim: Claim, *, needs_live_run: bool, until_begun: bool = False
    ) -> ClaimAnswer:
        """See ``ClaimBackend``."""
        with self._server.reached() as session:
            before = session.task(claim.run_id, claim.task_id)
            changed, answer = life.claim_task(
                before,
                session.run(claim.run_id),
                session.moment,
                claim,
                needs_live_run=needs_live_run,
                until_begun=until_begun,
            )
            if changed is not before:
                session.change_task(claim.run_id, claim.task_id, changed)
        return answer

    async def begin(self, claim: Claim) -> None:
        """See ``ClaimBackend``."""
        with self._server.reached() as session:
            before = session.task(claim.run_id, claim.task_id)
            changed = life.begin_task(before, claim)
            if changed is not before:
                session.change_task(claim.run_id, claim.task_id, changed)

    async def renew(self, claims: Sequence[Claim]) -> list[Renewal]:
        """See ``ClaimBackend``."""
        with self._server.reached() as session:
            return [self._renew(session, claim) for claim in claims]

    @staticmethod
    def _renew(session: _Session, claim: Claim) -> Renewal:
        task = session.task(claim.run_id, claim.task_id)
        run = session.run(claim.run_id)
        changed, renewal = life.renew_claim(task, run, session.moment, claim)
        if renewal.is_held:
            session.change_task(claim.run_id, claim.task_id, changed)
        return renewal

    async def complete(
        self, claim: Claim, result: bytes, *, expires_seconds: float, is_refused: bool = False
    ) -> bool:
        """See ``ClaimBackend``."""
        with self._server.reached() as session:
            before = session.task(claim.run_id, claim.task_id)
            changed, is_stored = life.complete_task(
                before,
                session.moment,
                claim,
                result,
                expires_seconds=expires_seconds,
                is_refused=is_refused,
            )
            if changed is not before:
                session.change_task(claim.run_id, claim.task_id, changed)
                mailbox = _results_of(claim.run_id)
                session.post(mailbox, claim.task_id, RUN_RECORD_EXPIRES_SECONDS)
        return is_stored

    # --- the list of workers, and messages to them ---

    async def heartbeat(self, record: WorkerRecord, *, expires_seconds: float) -> None:
        """See ``ControlBackend``."""
        data = write_record(self._signer, record)
        with self._server.reached() as session:
            session.put_worker(record.worker_id, data, expires_seconds)

    async def goodbye(self, worker_id: str) -> None:
        """See ``ControlBackend``."""
        with self._server.reached() as session:
            session.remove_worker(worker_id)

    async def workers(self) -> list[WorkerRecord]:
        """See ``ControlBackend``."""
        with self._server.reached() as session:
            found = session.workers()
        records = []
        for worker_id, data in found.items():
            with suppress(ValueError):
                records.append(read_record(self._signer, worker_id, data))
        return sorted(records, key=lambda record: record.name)

    async def send_control(self, worker_id: str, order: str) -> None:
        """See ``ControlBackend``."""
        with self._server.reached() as session:
            session.post(_orders_of(worker_id), order, CONTROL_EXPIRES_SECONDS)

    async def wait_for_control(self, worker_id: str, timeout_seconds: float) -> list[bytes]:
        """See ``ControlBackend``."""
        orders = await self._server.wait_for(_orders_of(worker_id), timeout_seconds)
        return [order.encode() for order in orders]
