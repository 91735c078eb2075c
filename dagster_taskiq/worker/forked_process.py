"""A process of a worker that was forked by the fork server or a template, and the line to it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

from dagster_taskiq.aio.loop_thread import to_its_end
from dagster_taskiq.errors import NoProcessError
from dagster_taskiq.worker.fork_server import start_deaf
from dagster_taskiq.worker.guard import kill_group
from dagster_taskiq.worker.guard_client import GuardClient
from dagster_taskiq.worker.slot_base import UNKNOWN_EXIT_CODE

#: How long the last message of a process that has ended may be in the socket.
_LAST_MESSAGE_SECONDS = 0.1

#: What the standard library says of a process whose exit code it cannot know, as the process is
#: gone that has forked it. A process may also end with it.
_PERHAPS_UNKNOWN = 255


@dataclass(frozen=True)
class Forking:
    """What it takes to fork processes.

    Attributes:
        context: see ``fork_server``.
        guard: is told of every process.
    """

    context: ForkServerContext
    guard: GuardClient


class ForkedProcess:
    """A process that runs, or has ended. It leads a process group of its own.

    Attributes:
        pid: of it.
        reader: of what it says.
        writer: to it.
        exited: its exit code, once it has ended. Not to be awaited itself: who is cancelled there
            would cancel it for all others.
    """

    def __init__(
        self,
        process: ForkServerProcess,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        exited: asyncio.Future[int],
    ) -> None:
        assert process.pid is not None
        self.pid = process.pid
        self.reader = reader
        self.writer = writer
        self.exited = exited
        self._process = process

    @classmethod
    async def start(
        cls,
        forking: Forking,
        name: str,
        target: Callable[..., None],
        *arguments: Any,
        address: str = "",
    ) -> ForkedProcess:
        """Fork one. Who is cancelled meanwhile waits until it is there, and has ended.

        Else the request would break off, and with it what it is forked from would end.

        Args:
            forking: see there.
            name: of it, for people.
            target: what it runs; its first argument is its end of the line.
            arguments: the others.
            address: of the template to fork it from; empty for the fork server.

        Raises:
            NoProcessError: none can be started now.
        """
        starting = asyncio.ensure_future(cls._start(forking, name, target, arguments, address))
        try:
            return await to_its_end(starting)
        except asyncio.CancelledError:
            with suppress(NoProcessError):
                await to_its_end(starting.result().stop())
            raise

    @classmethod
    async def _start(
        cls,
        forking: Forking,
        name: str,
        target: Callable[..., None],
        arguments: tuple[Any, ...],
        address: str,
    ) -> ForkedProcess:
        process, ours = await _fork(forking.context, name, target, arguments, address)
        guard = forking.guard
        guard.watch(process.pid or 0)
        exited = _watch_exit(process, guard)
        reader, writer = await asyncio.open_connection(sock=ours)
        # a grandchild that has inherited the other side would keep the line open
        exited.add_done_callback(
            lambda it: it.get_loop().call_later(_LAST_MESSAGE_SECONDS, writer.transport.abort)
        )
        return cls(process, reader, writer, exited)

    @property
    def has_ended(self) -> bool:
        """Whether it has."""
        return self.exited.done()

    async def exit_code(self) -> int:
        """Wait for its end."""
        await asyncio.wait({self.exited})
        return self.exited.result()

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it runs."""
        if not self.has_ended:
            # the guard may have killed it, and nobody have told us yet
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL to it and everything it has started."""
        if not self.has_ended:
            kill_group(self.pid)
            # it leads the group only a moment after its start
            self.send_signal(signal.SIGKILL)

    async def stop(self) -> None:
        """Kill it and everything it has started, and wait for its end."""
        self.kill()
        await self.exit_code()
        self.writer.close()
        self._process.close()


async def _fork(
    context: ForkServerContext,
    name: str,
    target: Callable[..., None],
    arguments: tuple[Any, ...],
    address: str,
) -> tuple[ForkServerProcess, socket.socket]:
    """Start a process; it, and our end of the line to it."""
    with ExitStack() as undo, ExitStack() as after:
        try:
            ours, theirs = socket.socketpair()
            after.callback(theirs.close)
            undo.callback(ours.close)
            process = context.Process(target=target, args=(theirs, *arguments), name=name)
            # the standard library keeps the fork server's state behind a lock and may wait
            await asyncio.to_thread(start_deaf, process, address)
        # the last one where no thread can be started
        except (OSError, EOFError, RuntimeError) as error:
            raise NoProcessError(f"{name}: cannot start a process: {error!r}") from error
        undo.pop_all()
        return process, ours


def _watch_exit(process: ForkServerProcess, guard: GuardClient) -> asyncio.Future[int]:
    """The exit code of a process, as soon as it has ended.

    What has forked it tells its end. Where that has ended first the kernel does, and nobody knows
    the exit code; on a system that cannot tell, the process counts as ended with what forked it.
    """
    loop = asyncio.get_running_loop()
    exited: asyncio.Future[int] = loop.create_future()
    pid = process.pid or 0

    def end(exit_code: int) -> None:
        # at once, while the number cannot yet be that of another group: what it had started
        kill_group(pid)
        guard.forget(pid)
        exited.set_result(exit_code)

    def note() -> None:
        loop.remove_reader(process.sentinel)
        process.join()
        handle = _handle(pid) if process.exitcode == _PERHAPS_UNKNOWN else -1
        if handle < 0:
            end(process.exitcode or 0)
            return

        def note_later() -> None:
            loop.remove_reader(handle)
            os.close(handle)
            end(UNKNOWN_EXIT_CODE)

        loop.add_reader(handle, note_later)

    loop.add_reader(process.sentinel, note)
    return exited


def _handle(pid: int) -> int:
    """What can be read once the process has ended; negative if there is no such process."""
    if hasattr(os, "pidfd_open"):
        with suppress(OSError):
            return os.pidfd_open(pid)
    return -1
