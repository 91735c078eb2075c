"""The worker's end of a template; see ``template_process``."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress

from dagster_taskiq.errors import NoProcessError, UnusableTemplateError
from dagster_taskiq.messages.plain_text import plain_name
from dagster_taskiq.worker import frames
from dagster_taskiq.worker.child_messages import NotReady, TemplateLoads, Word, unpack_word
from dagster_taskiq.worker.fork_server import new_address
from dagster_taskiq.worker.forked_process import ForkedProcess, Forking
from dagster_taskiq.worker.out_of_memory import count_oom_kills
from dagster_taskiq.worker.slot_base import ChildDied
from dagster_taskiq.worker.template_process import TemplateOptions, template_main

#: How long a template may take to load its code; a child may take as long.
LOAD_TIMEOUT_SECONDS = 300.0

#: How long a template may take to fork a process, before it is taken for one that hangs.
_FORK_TIMEOUT_SECONDS = 30.0


class Template:
    """A process that children are forked from.

    Attributes:
        location: the code location that it has loaded; empty for none.
        title: the same for people; empty for none.
        is_old: whether what it has loaded is not to be executed any more.
        address: where it listens.
    """

    def __init__(self, process: ForkedProcess, location: str, address: str) -> None:
        self.location = location
        self.title = ""
        self.address = address
        self._process = process
        self._children: set[ForkedProcess] = set()
        self._is_retired = False
        self.is_old = False
        process.exited.add_done_callback(lambda _: _remove(address))

    @classmethod
    async def start(
        cls, forking: Forking, options: TemplateOptions, base: Template | None
    ) -> Template:
        """Load code in a process.

        Args:
            forking: see there.
            options: what it loads.
            base: to fork it from; None for the fork server.

        Raises:
            NoProcessError: no process can be started now, or it could not listen.
            UnusableTemplateError: the code cannot be loaded, or no process be forked afterwards.
        """
        with ExitStack() as undo, ExitStack() as after:
            try:
                address = new_address("template")
                listener = after.enter_context(socket.socket(socket.AF_UNIX))
                listener.bind(address)
                undo.callback(_remove, address)
                listener.listen()
            # no space for it, no descriptor, or the path is too long
            except OSError as error:
                raise NoProcessError(f"template: cannot listen: {error!r}") from error
            with base.forking() if base else nullcontext():
                process = await ForkedProcess.start(
                    forking,
                    "template",
                    template_main,
                    listener,
                    options,
                    address=base.address if base else "",
                )
            after.close()  # else who calls a template that has died would wait
            template = cls(process, options.location, address)
            try:
                await template._await_ready()
            except BaseException:
                await process.stop()
                raise
            undo.pop_all()
        return template

    async def _await_ready(self) -> None:
        oom_kills = count_oom_kills()
        try:
            word = await asyncio.wait_for(self._last_word(), LOAD_TIMEOUT_SECONDS)
        except asyncio.TimeoutError:
            reason = f"it was not loaded within {LOAD_TIMEOUT_SECONDS:g} seconds"
            raise UnusableTemplateError(reason, self.title) from None
        except (EOFError, OSError, ValueError) as error:
            self._process.kill()  # should it have said nonsense
            exit_code = await self._process.exit_code()
            was_killed = exit_code == -signal.SIGKILL
            died = ChildDied(exit_code, self.pid, was_killed and count_oom_kills() > oom_kills)
            raise UnusableTemplateError(f"while it was loaded {died}", self.title) from error
        if isinstance(word, NotReady):
            raise UnusableTemplateError(word.reason, self.title, is_final=word.is_final)

    async def _last_word(self) -> Word:
        while True:
            values = await frames.read(self._process.reader)
            word = unpack_word({key: values[key] for key in values.keys() - {"pid", "task"}})
            if not isinstance(word, TemplateLoads):
                return word
            self.title = plain_name(word.title)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def is_usable(self) -> bool:
        """Whether new children may be forked from it."""
        return not self._is_retired and not self._process.has_ended

    @property
    def exited(self) -> asyncio.Future[int]:
        """See ``ForkedProcess``."""
        return self._process.exited

    @contextmanager
    def forking(self) -> Iterator[None]:
        """A process is forked from it meanwhile; if it hangs in that it is killed."""
        hanging = asyncio.get_running_loop().call_later(_FORK_TIMEOUT_SECONDS, self.kill)
        try:
            yield
        finally:
            hanging.cancel()

    def keep_for(self, child: ForkedProcess) -> None:
        """A child was forked from it, whose exit code nobody else will know."""
        self._children.add(child)
        child.exited.add_done_callback(lambda _: self._leave(child))

    def retire(self) -> None:
        """Fork no more children, and end when the last one has."""
        self._is_retired = True
        self._end_if_done()

    def kill(self) -> None:
        """End it at once; its children go on."""
        self._process.kill()

    async def stop(self) -> None:
        """End it at once, and wait for that."""
        await self._process.stop()

    def _leave(self, child: ForkedProcess) -> None:
        self._children.discard(child)
        self._end_if_done()

    def _end_if_done(self) -> None:
        if self._is_retired and not self._children:
            self._process.kill()


def _remove(address: str) -> None:
    with suppress(OSError):
        os.unlink(address)  # noqa: PTH108 - it is no file
