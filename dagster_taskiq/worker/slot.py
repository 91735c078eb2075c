"""A slot: one warm child process, which executes one task at a time.

The child is replaced between tasks: after so many of them, above so much memory, after a cancel
(which may leave something behind) or a task that did leave something, for a task of another code
location, and when it died. Whoever takes a slot calls ``prepare`` first.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import ForkServerContext, ForkServerProcess
from os import kill
from typing import Any

from dagster_taskiq.errors import NoProcessError, SlotError
from dagster_taskiq.worker import frames
from dagster_taskiq.worker.child import ChildOptions, child_main
from dagster_taskiq.worker.fork_server import start_deaf
from dagster_taskiq.worker.guard import kill_group
from dagster_taskiq.worker.guard_client import GuardClient
from dagster_taskiq.worker.log_tails import LogTails
from dagster_taskiq.worker.memory import count_oom_kills
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


@dataclass(frozen=True)
class ChildDied:
    """The child ended while it had a task.

    Attributes:
        exit_code: negative for the number of the signal that ended it.
        pid: it had.
        is_out_of_memory: whether the kernel has killed for lack of memory meanwhile.
        fault: for which the worker has killed it, in words; empty if it has ended by itself.
    """

    exit_code: int
    pid: int
    is_out_of_memory: bool = False
    fault: str = ""

    def __str__(self) -> str:
        if self.fault:
            return f"its process {self.fault}, and was killed"
        if self.exit_code < 0:
            try:
                name = signal.Signals(-self.exit_code).name
            except ValueError:
                name = f"signal {-self.exit_code}"
            cause = " (out of memory, as the kernel says)" if self.is_out_of_memory else ""
            return f"its process was killed by {name}{cause}"
        return f"its process ended with exit code {self.exit_code}"


class Slot:
    """One slot of a worker.

    Args:
        context: see ``fork_server``.
        guard: is told of every child.
        tails: copies the output of steps.
        options: for the child.
        max_tasks: after which the child is replaced; 0 is never.
        max_memory_kib: above which it is replaced; 0 is never.
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
    ) -> None:
        self.number = options.slot
        #: The code location whose tasks its child has executed; empty where there is none.
        self.location = ""
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
        self._must_replace = False
        self._has_task = False
        self._task_number = 0
        self._preparing = asyncio.Lock()
        self._oom_kills = 0

    @property
    def pid(self) -> int:
        """Of the child, which is also its process group's; 0 when there is none."""
        return self._process.pid or 0 if self._process else 0

    async def prepare(self, location: str = "") -> None:
        """Have a child that is ready for a task, unless there is one that executes a task.

        Args:
            location: of the task; empty for any. See ``code_locations``.

        Raises:
            NoProcessError: none can be started now.
            SlotError: the child could not import the user's modules, or did not come up.
        """
        async with self._preparing:
            is_spent = self._process is None or self._is_spent()
            if self._has_task or not (is_spent or self._has_other_code(location)):
                return
            await self.stop()
            await self._start()

    def retire(self) -> None:
        """Have the child replaced when it has no task any more: the next ``prepare`` does it."""
        self._must_replace = True

    def _is_spent(self) -> bool:
        assert self._exited is not None
        return self._must_replace or self._exited.done()

    def _has_other_code(self, location: str) -> bool:
        return bool(self.location and location) and self.location != location

    async def _start(self) -> None:
        self._must_replace = False  # first, so that a `retire` that comes meanwhile counts
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
        if isinstance(answer, ChildDied) or answer["kind"] != "ready":
            reason = str(answer) if isinstance(answer, ChildDied) else answer["reason"]
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
        task: dict[str, Any],
        on_child: Callable[[int], None],
        on_started: Callable[[], None] = lambda: None,
        on_begun: Callable[[], None] = lambda: None,
    ) -> dict[str, Any] | ChildDied:
        """Execute a task; the child's answer, or how it died.

        Args:
            task: what ``child`` reads.
            on_child: called with the child's process group before it is given the task.
            on_started: called when the child has begun with it.
            on_begun: called when the log of a run says that it has started.

        Raises:
            SlotError: the child died before it had begun, and no other one comes up.
        """
        try:
            return await self._run(task, on_child, on_started, on_begun)
        finally:
            self._has_task = False

    async def _run(
        self,
        task: dict[str, Any],
        on_child: Callable[[int], None],
        on_started: Callable[[], None],
        on_begun: Callable[[], None],
    ) -> dict[str, Any] | ChildDied:
        location = task.get("code_location", "")
        for last in range(_STARTS_PER_TASK - 1, -1, -1):
            self._has_task = False
            await self.prepare(location)
            self._has_task = True
            self.location = location or self.location
            on_child(self.pid)
            self._oom_kills = count_oom_kills()
            answer = await self._send(task)
            if isinstance(answer, dict):
                break
            if not last:
                return answer
            logger.warning("Slot %d: %s before it had begun a task.", self.number, answer)
        on_started()
        answer = await self._result(on_begun)
        self._tasks_done += 1
        if isinstance(answer, ChildDied):
            return answer
        self._note_use(answer)
        return answer

    async def _send(self, task: dict[str, Any]) -> dict[str, Any] | ChildDied:
        assert self._writer is not None
        self._task_number += 1
        self._writer.write(frames.encode({**task, "number": self._task_number}))
        try:
            await self._writer.drain()
        except ConnectionError:
            pass  # it is gone; reading says how
        return await self._next_message(None)

    async def _result(self, on_begun: Callable[[], None]) -> dict[str, Any] | ChildDied:
        """The child's last message of a task, or its death."""
        pid = self.pid
        while True:
            answer = await self._next_message(None)
            if isinstance(answer, ChildDied):
                self._tails.end(pid)
            elif answer["kind"] == "log":
                self._tails.begin(pid, answer["path"], answer["target"])
                continue
            elif answer["kind"] == "log-end":
                self._tails.end(pid, answer["path"])
                continue
            elif answer["kind"] == "begun":
                on_begun()
                continue
            return answer

    def _note_use(self, answer: dict[str, Any]) -> None:
        if self._max_tasks and self._tasks_done >= self._max_tasks:
            self._must_replace = True
        if answer.get("left_behind"):
            self._must_replace = True
        if self._max_memory_kib and answer["resident_kib"] > self._max_memory_kib:
            self._must_replace = True

    async def _next_message(self, timeout_seconds: float | None) -> dict[str, Any] | ChildDied:
        """The child's next message, or its death.

        What does not come from our child, or is not about its present task, is a fault of the
        child: a step has forked a copy that speaks for it, or has written into its descriptors.
        """
        assert self._reader is not None
        try:
            message = await asyncio.wait_for(frames.read(self._reader), timeout_seconds)
        except (EOFError, OSError, asyncio.TimeoutError):
            return await self._death()
        except ValueError as error:
            return await self._put_down(f"has sent what is no message ({error})")
        said_by = (message.get("pid"), message.get("task"))
        if said_by != (self.pid, self._task_number):
            return await self._put_down("has sent a message that is not about its task")
        return message

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
        """SIGTERM to the child, for Dagster to end the step; the child is replaced afterwards."""
        self._must_replace = True
        self._signal(signal.SIGTERM)

    def warn(self) -> None:
        """Tell the child that its task's soft time limit is over."""
        self._must_replace = True  # whatever the exception has torn
        self._signal(SOFT_LIMIT_SIGNAL)

    def kill(self) -> None:
        """SIGKILL to the child and everything it has started."""
        self._must_replace = True
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
        """Kill the child and everything it has started, and wait for its end."""
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
