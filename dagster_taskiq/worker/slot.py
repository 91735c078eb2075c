"""A slot with a child: one warm process, which executes one task at a time.

The child is replaced between tasks: after so many of them, above so much memory, after a cancel
(which may leave something behind) or a task that did leave something, for a task of another code
location, and when it died. ``run`` prepares the slot itself; a worker calls ``prepare`` before it
claims, so that it claims only what it can execute.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from multiprocessing.context import ForkServerContext, ForkServerProcess
from os import kill

from dagster_taskiq.errors import NoProcessError, SlotError
from dagster_taskiq.worker import frames
from dagster_taskiq.worker.child import ChildOptions, child_main
from dagster_taskiq.worker.child_messages import (
    Answer,
    Execute,
    Executed,
    LogClosed,
    LogOpened,
    NotReady,
    Order,
    Ready,
    RunAnswer,
    RunStartLogged,
    Word,
    pack,
    unpack_word,
)
from dagster_taskiq.worker.fork_server import start_deaf
from dagster_taskiq.worker.guard import kill_group
from dagster_taskiq.worker.guard_client import GuardClient
from dagster_taskiq.worker.log_tails import LogTails
from dagster_taskiq.worker.observer import WorkerObserver
from dagster_taskiq.worker.out_of_memory import count_oom_kills
from dagster_taskiq.worker.slot_base import ChildDied, ReplaceReason, Slot
from dagster_taskiq.worker.soft_limit import SOFT_LIMIT_SIGNAL

logger = logging.getLogger(__name__)

#: How long a child may take to import the user's modules.
_READY_TIMEOUT_SECONDS = 300.0

#: How long the exit code of a child that hung up may be on its way.
_EXIT_TIMEOUT_SECONDS = 5.0

#: How long the last message of a child that has ended may be in the socket.
_LAST_MESSAGE_SECONDS = 0.1

#: A child that dies before it has begun to execute is replaced and the task given to the new one,
#: so often.
_STARTS_PER_TASK = 3

_NOBODY = WorkerObserver()


class ChildSlot(Slot):
    """One slot of a worker.

    Args:
        context: see ``fork_server``.
        guard: is told of every child.
        tails: copies the output of steps.
        options: for the child.
        max_tasks: after which the child is replaced; 0 is never.
        max_memory_kib: above which it is replaced; 0 is never.
        observer: hears of each child that is replaced.
    """

    def __init__(
        self,
        context: ForkServerContext,
        guard: GuardClient,
        tails: LogTails,
        options: ChildOptions,
        *,
        max_tasks: int = 0,
        max_memory_kib: int = 0,
        observer: WorkerObserver = _NOBODY,
    ) -> None:
        self.number = options.slot
        self._observer = observer
        self._context = context
        self._guard = guard
        self._tails = tails
        self._options = options
        self._max_tasks = max_tasks
        self._max_memory_kib = max_memory_kib
        self._process: ForkServerProcess | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._exited: asyncio.Future[int] | None = None
        self._tasks_done = 0
        #: Why the child is replaced before the next task; None if it is not.
        self._spent_by: ReplaceReason | None = None
        self._has_task = False
        self._task_number = 0
        self._preparing = asyncio.Lock()
        self._oom_kills = 0

    @property
    def pid(self) -> int:
        """See ``Slot``."""
        return self._process.pid or 0 if self._process else 0

    async def prepare(self, location: str = "") -> None:
        """See ``Slot``."""
        async with self._preparing:
            if self._has_task:
                return
            if self._process is not None:
                reason = self._reason_to_replace(location)
                if not reason:
                    return
                self._observer.child_replaced(self.number, self.pid, reason)
                await self.stop()
            await self._start()

    def retire(self) -> None:
        """See ``Slot``."""
        self._spent_by = ReplaceReason.FRESH

    def _reason_to_replace(self, location: str) -> ReplaceReason | None:
        """Why the child must be replaced before a task of a location; None if it need not be."""
        assert self._exited is not None
        if self._spent_by:
            return self._spent_by
        if self._exited.done():
            return ReplaceReason.ENDED
        has_other_code = self.location and location and self.location != location
        return ReplaceReason.OTHER_CODE if has_other_code else None

    async def _start(self) -> None:
        self._spent_by = None  # first, so that a `retire` that comes meanwhile counts
        self._oom_kills = count_oom_kills()
        process, ours = await self._fork()
        assert process.pid is not None
        self._guard.watch(process.pid)
        self._process = process
        self._exited = self._watch_exit(process)
        self._reader, self._writer = await asyncio.open_connection(sock=ours)
        self._exited.add_done_callback(partial(_hang_up, self._writer))
        self._tasks_done = self._task_number = 0
        answer = await self._next_message(_READY_TIMEOUT_SECONDS)
        if not isinstance(answer, Ready):
            reason = answer.reason if isinstance(answer, NotReady) else str(answer)
            await self.stop()
            raise SlotError(f"slot {self.number}: {reason}")

    async def _fork(self) -> tuple[ForkServerProcess, socket.socket]:
        """Start a child; its process, and our end of the connection to it."""
        with ExitStack() as undo, ExitStack() as after:
            try:
                ours, theirs = socket.socketpair()
                after.callback(theirs.close)
                undo.callback(ours.close)
                process = self._context.Process(
                    target=child_main, args=(theirs, self._options), name=f"slot-{self.number}"
                )
                # the standard library keeps the fork server's state behind a lock and may wait
                await asyncio.to_thread(start_deaf, process)
            # the last one where no thread can be started
            except (OSError, EOFError, RuntimeError) as error:
                reason = f"slot {self.number}: cannot start a process: {error!r}"
                raise NoProcessError(reason) from error
            undo.pop_all()
            return process, ours

    def _watch_exit(self, process: ForkServerProcess) -> asyncio.Future[int]:
        loop = asyncio.get_running_loop()
        exited: asyncio.Future[int] = loop.create_future()
        pid = process.pid or 0

        def note() -> None:
            loop.remove_reader(process.sentinel)
            process.join()
            # at once, while the number cannot yet be that of another group: what it had started
            kill_group(pid)
            self._guard.forget(pid)
            exited.set_result(process.exitcode or 0)

        loop.add_reader(process.sentinel, note)
        return exited

    async def run(
        self,
        order: Order,
        on_child: Callable[[int], None],
        on_order_taken: Callable[[], None] = lambda: None,
        on_run_start_logged: Callable[[], None] = lambda: None,
    ) -> Answer | ChildDied:
        """See ``Slot``."""
        try:
            died = await self._give(order, on_child)
            if died is not None:
                return died
            on_order_taken()
            answer = await self._answer(on_run_start_logged)
            self._tasks_done += 1
            if not isinstance(answer, ChildDied):
                self._note_use(answer)
            return answer
        finally:
            self._has_task = False

    async def _give(self, order: Order, on_child: Callable[[int], None]) -> ChildDied | None:
        """Give the order to a child that begins with it; how the last child died if none does."""
        location = order.code_location if isinstance(order, Execute) else ""
        for last in range(_STARTS_PER_TASK - 1, -1, -1):
            self._has_task = False
            await self.prepare(location)
            self._has_task = True
            self.location = location or self.location
            on_child(self.pid)
            self._oom_kills = count_oom_kills()
            word = await self._send(order)
            if not isinstance(word, ChildDied):
                break
            if not last:
                return word
            logger.warning("Slot %d: %s before it had begun a task.", self.number, word)
        return None

    async def _send(self, order: Order) -> Word | ChildDied:
        assert self._writer is not None
        self._task_number += 1
        self._writer.write(frames.encode({"number": self._task_number, **pack(order)}))
        try:
            await self._writer.drain()
        except ConnectionError:
            pass  # it is gone; reading says how
        return await self._next_message(None)

    async def _answer(self, on_run_start_logged: Callable[[], None]) -> Answer | ChildDied:
        """The child's last message of a task, or its death."""
        pid = self.pid
        while True:
            word = await self._next_message(None)
            if isinstance(word, LogOpened):
                self._tails.begin(pid, word.path, word.target)
            elif isinstance(word, LogClosed):
                self._tails.end(pid, word.path)
            elif isinstance(word, RunStartLogged):
                on_run_start_logged()
            elif isinstance(word, (Executed, RunAnswer)):
                return word
            else:
                if not isinstance(word, ChildDied):
                    word = await self._put_down(f"has said {word} in the midst of a task")
                self._tails.end(pid)
                return word

    def _note_use(self, answer: Answer) -> None:
        if self._max_tasks and self._tasks_done >= self._max_tasks:
            self._spent_by = ReplaceReason.TASKS
        if not isinstance(answer, Executed):
            return
        if answer.left_behind:
            self._spent_by = ReplaceReason.LEFTOVERS
        if self._max_memory_kib and answer.resident_kib > self._max_memory_kib:
            self._spent_by = ReplaceReason.MEMORY

    async def _next_message(self, timeout_seconds: float | None) -> Word | ChildDied:
        """The child's next message, or its death.

        What does not come from our child, or is not about its present task, is a fault of the
        child: a step has forked a copy that speaks for it, or has written into its descriptors.
        """
        assert self._reader is not None
        try:
            values = await asyncio.wait_for(frames.read(self._reader), timeout_seconds)
            said_by = (values.pop("pid", None), values.pop("task", None))
            if said_by == (self.pid, self._task_number):
                return unpack_word(values)
        except (EOFError, OSError, asyncio.TimeoutError):
            return await self._death()
        except ValueError as error:
            return await self._put_down(f"has sent what is no message ({error})")
        return await self._put_down("has sent a message that is not about its task")

    async def _death(self) -> ChildDied:
        """Wait for the end of a child that has hung up or does not answer."""
        assert self._exited is not None
        if not self._exited.done():
            await asyncio.wait({self._exited}, timeout=_EXIT_TIMEOUT_SECONDS)
        if not self._exited.done():
            return await self._put_down("does not speak with its worker any more")
        exit_code, pid = self._exited.result(), self.pid
        was_killed = exit_code == -signal.SIGKILL
        return ChildDied(exit_code, pid, was_killed and count_oom_kills() > self._oom_kills)

    async def _put_down(self, fault: str) -> ChildDied:
        """Kill a child that cannot be relied on."""
        pid = self.pid
        logger.warning("Slot %d: process %d %s; killing it.", self.number, pid, fault)
        self.kill()
        return ChildDied(await self._exit_code(), pid, fault=fault)

    async def _exit_code(self) -> int:
        """Wait for the child's end."""
        assert self._exited is not None
        # not awaited itself: who is cancelled here would cancel it for all others
        await asyncio.wait({self._exited})
        return self._exited.result()

    def interrupt(self) -> None:
        """See ``Slot``."""
        self._spent_by = ReplaceReason.INTERRUPTED
        self._signal(signal.SIGTERM)

    def warn(self) -> None:
        """See ``Slot``."""
        self._spent_by = ReplaceReason.SOFT_LIMIT  # the exception may have torn it
        self._signal(SOFT_LIMIT_SIGNAL)

    def kill(self) -> None:
        """See ``Slot``."""
        self._spent_by = ReplaceReason.KILLED
        if self._exited is not None and not self._exited.done():
            kill_group(self.pid)
            # it leads the group only a moment after its start
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self._exited is not None and not self._exited.done():
            # the guard may have killed it, and nobody have told us yet
            with suppress(ProcessLookupError):
                kill(self.pid, number)

    async def stop(self) -> None:
        """See ``Slot``."""
        if self._process is None:
            return
        self.kill()
        await self._exit_code()
        if self._writer is not None:
            self._writer.close()
        self._process.close()
        self._process = self._reader = self._writer = self._exited = None
        self.location = ""


def _hang_up(writer: asyncio.StreamWriter, exited: asyncio.Future[int]) -> None:
    """End the connection to a child that has ended: a grandchild that has inherited the other side
    would keep it open."""
    exited.get_loop().call_later(_LAST_MESSAGE_SECONDS, writer.transport.abort)
