"""The launcher's way to the workers: sends whole runs, looks after them, stops them.

Lives as long as the daemon or web server it is in. It connects when it is first used, and a server
that was away is reached again by the next call.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from dagster_taskiq.aio.loop_thread import LoopThread, end_tasks
from dagster_taskiq.backend import Backend, TaskReport, TaskState, open_backend
from dagster_taskiq.backend.history_log import HistoryLog
from dagster_taskiq.brokers import TaskBroker, open_broker
from dagster_taskiq.carrier import Carrier
from dagster_taskiq.connections import Servers
from dagster_taskiq.defaults import DEFAULT_QUEUE
from dagster_taskiq.errors import LauncherClosedError, ServerError, UnreachableServerError
from dagster_taskiq.launch.background import Background
from dagster_taskiq.messages.attempt_ends import AttemptEnd
from dagster_taskiq.messages.envelope import Envelope, QueueKind
from dagster_taskiq.messages.queue_looks import QueueLook
from dagster_taskiq.messages.queue_waits import QueueWait, QueueWaits
from dagster_taskiq.messages.results import TaskResult

T = TypeVar("T")

#: A try that has waited this long has found a server silent.
_SILENT_SECONDS = 1.0

#: Pause between two looks at a server that was silent.
_LOOK_SECONDS = 1.0


class RunClient:
    """Used from any thread. A queue is given as people name it.

    After a call that waited in vain, a thread asks until both servers answer, and meanwhile each
    call raises at once: Dagster's daemon launches runs and asks for their health one after the
    other, and would wait for each.

    Args:
        servers: broker and backend.
        background: where a server that is silent is asked again; its end is this client's.

    Errors: ``ServerError`` with the address from every method that talks to a server, and
    ``LauncherClosedError`` once the background is closed.
    """

    def __init__(self, servers: Servers, background: Background) -> None:
        self._servers = servers
        self._background = background
        self._lock = threading.Lock()
        self._thread: LoopThread | None = None
        self._silence: UnreachableServerError | None = None
        #: What was last said of all queues, and when it was asked, on this process's clock.
        self._waits: tuple[float, QueueWaits] | None = None
        self._broker: TaskBroker
        self._backend: Backend
        self._carrier: Carrier
        self._history: HistoryLog
        self._telling: asyncio.Task[None] | None = None

    @property
    def has_worked(self) -> bool:
        """Whether the servers have ever taken us."""
        return self._thread is not None

    def reach(self, queue: str) -> str:
        """The backend's epoch; raises unless both servers answer, asked for one queue."""
        return self._call(lambda: self._ask(queue))

    async def _ask(self, queue: str) -> str:
        epoch = await self._backend.epoch()
        await self._carrier.depth(queue)
        return epoch

    def epoch(self) -> str:
        """The backend's epoch, to send a task in."""

        async def ask() -> str:
            return await self._backend.epoch()

        return self._call(ask)

    def submit(self, envelope: Envelope) -> None:
        """Send a run."""

        async def submit() -> None:
            await self._carrier.send([self._carrier.message_of(envelope)])
            self._history.note_sent(envelope.queue, QueueKind.RUNS.value)

        self._call(submit)

    def note_end(self, end: AttemptEnd) -> None:
        """Tell the history of a run that has ended, once the servers were reached; it may be lost.

        See ``HistoryLog``.
        """
        if self._thread is not None:
            self._history.note_end(end)

    def look(self, run_id: str, task_id: str) -> tuple[TaskReport, TaskResult | None]:
        """What the backend knows of a run's task, and its result if it has one."""

        async def look() -> tuple[TaskReport, TaskResult | None]:
            _, reports = await self._backend.inspect(run_id, [task_id])
            report = reports[task_id]
            if report.state not in (TaskState.DONE, TaskState.REFUSED):
                return report, None
            data = (await self._backend.read_results(run_id, [task_id])).get(task_id)
            return report, None if data is None else self._carrier.read(task_id, data)

        return self._call(look)

    def reopen(self, run_id: str, task_id: str) -> bool:
        """Let a run that a worker has given back be claimed again; see ``RunBackend.reopen``."""
        return self._call(lambda: self._backend.reopen(run_id, task_id))

    def state_of(self, run_id: str, task_id: str) -> tuple[str, TaskState]:
        """The backend's epoch, and what it knows of a run's task in it."""

        async def inspect() -> tuple[str, TaskState]:
            epoch, reports = await self._backend.inspect(run_id, [task_id])
            return epoch, reports[task_id].state

        return self._call(inspect)

    def absent(self, queue: str, task_ids: Sequence[str]) -> set[str]:
        """Which of a queue's tasks the broker certainly does not hold, all at one moment."""
        return self._call(lambda: self._carrier.absent(dict.fromkeys(task_ids, queue)))

    def cancel(self, run_id: str, task_id: str, queue: str, reason: str) -> TaskState:
        """Stop a run's task; its state when it was told, see ``RunBackend.cancel``."""

        async def cancel() -> TaskState:
            await self._backend.disown_run(run_id)
            _, states = await self._carrier.cancel(run_id, {task_id: queue}, reason)
            return states[task_id]

        return self._call(cancel)

    def queue_waits(self, max_age_seconds: float = 0.0) -> QueueWaits:
        """Why runs wait in their queues, as the workers are now, or were lately."""
        known = self._waits
        if known is not None and time.monotonic() - known[0] < max_age_seconds:
            return known[1]

        async def look() -> QueueWaits:
            return await self._carrier.queue_waits()

        asked_at = time.monotonic()
        waits = self._call(look)
        self._waits = asked_at, waits
        return waits

    def look_into(self, queue: str, task_id: str) -> QueueLook:
        """What is to be seen of a queue in which a run waits, for people."""
        return self._call(lambda: self._carrier.look_into(queue, [task_id]))

    def explained(self, run_id: str, wait: QueueWait | None) -> QueueWait | None:
        """Why a run waits, with what a worker says of it; see ``Carrier.explained``."""
        if not Carrier.may_explain(wait):
            return wait

        async def explain() -> QueueWait | None:
            return await self._carrier.explained(run_id, wait)

        return self._call(explain)

    def close(self) -> None:
        """Leave the servers: for good, since the background is closed before."""
        with self._lock:
            if self._thread is None:
                return
            self._thread.call(self._disconnect())
            self._thread.stop()
            self._thread = None

    # --- silence ---

    def _call(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        if silence := self._silence:
            raise UnreachableServerError(silence.address, str(silence))
        began = time.monotonic()
        try:
            return self._call_anyway(make)
        except UnreachableServerError as error:
            if time.monotonic() - began >= _SILENT_SECONDS:
                self._silence = error
                self._background.repeat(
                    "silent-server",
                    self._is_answered,
                    _LOOK_SECONDS,
                    "Cannot ask a server whether it answers again",
                )
            raise

    def _is_answered(self) -> bool:
        try:
            self._call_anyway(lambda: self._ask(DEFAULT_QUEUE))
        except UnreachableServerError:
            return False
        except ServerError:
            pass  # it answers with an error, which the next call gets too
        self._silence = None
        return True

    # --- the thread ---

    def _call_anyway(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        with self._lock:
            if self._background.is_closed:
                raise LauncherClosedError("The launcher has left its servers.")
            if self._thread is None:
                self._thread = self._connect()
            thread = self._thread
        try:
            return thread.call(make())
        except UnreachableServerError:
            self._servers.revive()  # for the next call
            raise

    def _connect(self) -> LoopThread:
        thread = LoopThread("dagster-taskiq-launcher")
        try:
            thread.call(self._open())
        except BaseException:
            thread.stop()
            raise
        return thread

    async def _open(self) -> None:
        self._broker = open_broker(self._servers.broker)
        self._backend = open_backend(self._servers.backend, self._servers.signer)
        self._carrier = Carrier(self._servers, QueueKind.RUNS, self._broker, self._backend)
        self._history = HistoryLog(self._backend)
        try:
            await self._backend.startup()
            await self._broker.startup()
        except BaseException:
            await self._disconnect()
            raise
        self._telling = asyncio.create_task(self._history.run(), name="history")

    async def _disconnect(self) -> None:
        if self._telling is not None:
            await end_tasks([self._telling])
            await self._history.send()
        await self._broker.shutdown()
        await self._backend.shutdown()
