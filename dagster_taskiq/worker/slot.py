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
from collections.abc import Callable
from dataclasses import replace

from dagster_taskiq.aio.loop_thread import end_tasks
from dagster_taskiq.errors import NoProcessError, SlotError
from dagster_taskiq.worker import frames
from dagster_taskiq.worker.child import ChildOptions, child_main
from dagster_taskiq.worker.child_messages import (
    Answer,
    CodeIsOld,
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
from dagster_taskiq.worker.forked_process import ForkedProcess, Forking
from dagster_taskiq.worker.log_tails import LogTails
from dagster_taskiq.worker.observer import WorkerObserver
from dagster_taskiq.worker.out_of_memory import count_oom_kills
from dagster_taskiq.worker.slot_base import ChildDied, ReplaceReason, Slot
from dagster_taskiq.worker.soft_limit import SOFT_LIMIT_SIGNAL
from dagster_taskiq.worker.template import Template
from dagster_taskiq.worker.templates import Templates

logger = logging.getLogger(__name__)

#: How long a child may take to import the user's modules.
_READY_TIMEOUT_SECONDS = 300.0

#: How long the exit code of a child that hung up may be on its way.
_EXIT_TIMEOUT_SECONDS = 5.0

#: A child that dies before it has begun to execute is replaced and the task given to the new one,
#: so often.
_STARTS_PER_TASK = 3

_NOBODY = WorkerObserver()


class ChildSlot(Slot):
    """One slot of a worker.

    Args:
        forking: see there.
        tails: copies the output of steps.
        options: for the child.
        templates: what children are forked from; None for the fork server.
        max_tasks: after which the child is replaced; 0 is never.
        max_memory_kib: above which it is replaced; 0 is never.
        observer: hears of each child that is replaced.
    """

    def __init__(
        self,
        forking: Forking,
        tails: LogTails,
        options: ChildOptions,
        templates: Templates | None = None,
        *,
        max_tasks: int = 0,
        max_memory_kib: int = 0,
        observer: WorkerObserver = _NOBODY,
    ) -> None:
        self.number = options.slot
        self._observer = observer
        self._forking = forking
        self._tails = tails
        self._options = replace(options, measures_memory=max_memory_kib > 0)
        self._templates = templates
        self._max_tasks = max_tasks
        self._max_memory_kib = max_memory_kib
        self._child: ForkedProcess | None = None
        #: That the child was forked from.
        self._template: Template | None = None
        self._tasks_done = 0
        #: Why the child is replaced before the next task; None if it is not.
        self._spent_by: ReplaceReason | None = None
        self._has_task = False
        self._is_stopped = asyncio.Event()
        self._task_number = 0
        self._preparing = asyncio.Lock()
        self._oom_kills = 0

    @property
    def pid(self) -> int:
        """See ``Slot``."""
        return self._child.pid if self._child else 0

    async def prepare(self, location: str = "") -> None:
        """See ``Slot``."""
        async with self._preparing:
            if self._has_task:
                return
            wanted = location or self.location
            template = await self._templates.ready(wanted) if self._templates else None
            if self._child is not None:
                reason = self._reason_to_replace(location, template)
                if not reason:
                    return
                self._observer.child_replaced(self.number, self.pid, reason)
                await self._end_child()
            await self._start(template)

    def retire(self) -> None:
        """See ``Slot``."""
        self._spent_by = ReplaceReason.FRESH

    def _reason_to_replace(self, location: str, template: Template | None) -> ReplaceReason | None:
        """Why the child must be replaced before a task of a location; None if it need not be.

        Args:
            template: that its successor would be forked from.
        """
        assert self._child is not None
        if self._spent_by:
            return self._spent_by
        if self._child.has_ended:
            return ReplaceReason.ENDED
        if self._template is not None and self._template.is_old:
            return ReplaceReason.OLD_CODE
        if self.location:
            is_other = bool(location) and self.location != location
            return ReplaceReason.OTHER_CODE if is_other else None
        has_code = template is not None and template.location
        return ReplaceReason.LOADS_CODE if has_code else None

    async def _start(self, template: Template | None) -> None:
        self._spent_by = None  # first, so that a `retire` that comes meanwhile counts
        self._oom_kills = count_oom_kills()
        self._child = await self._fork(template)
        self._tasks_done = self._task_number = 0
        answer = await self._next_message(_READY_TIMEOUT_SECONDS)
        if not isinstance(answer, Ready):
            reason = answer.reason if isinstance(answer, NotReady) else str(answer)
            await self._end_child()
            raise SlotError(f"slot {self.number}: {reason}")

    async def _fork(self, template: Template | None) -> ForkedProcess:
        """A child of a template; of the fork server where that fails, or for None."""
        name = f"slot-{self.number}"
        if template is not None:
            try:
                with template.forking():
                    child = await ForkedProcess.start(
                        self._forking, name, child_main, self._options, address=template.address
                    )
            except NoProcessError as error:
                logger.warning("%s; it is tried without the code of %s.", error, template.title)
            else:
                template.keep_for(child)
                self._template, self.location = template, template.location
                return child
        self._template, self.location = None, ""
        return await ForkedProcess.start(self._forking, name, child_main, self._options)

    async def run(
        self,
        order: Order,
        on_child: Callable[[int], None],
        on_order_taken: Callable[[], None] = lambda: None,
        on_run_start_logged: Callable[[], None] = lambda: None,
    ) -> Answer | ChildDied:
        """See ``Slot``."""
        self._is_stopped.clear()
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
        starts_left = _STARTS_PER_TASK
        while True:
            self._has_task = False
            if isinstance(order, Execute):
                await self._load_code_of(order)
            await self.prepare(location)
            if self._is_stopped.is_set():
                return ChildDied(
                    -signal.SIGKILL, self.pid, fault="was told to stop before it began"
                )
            self._has_task = True
            self.location = location or self.location
            on_child(self.pid)
            self._oom_kills = count_oom_kills()
            word = await self._send(order)
            if isinstance(word, CodeIsOld):
                order = self._note_old_code(word, order)
                continue
            if not isinstance(word, ChildDied):
                return None
            starts_left -= 1
            if not starts_left:
                return word
            logger.warning("Slot %d: %s before it had begun a task.", self.number, word)

    async def _load_code_of(self, order: Execute) -> None:
        """Have the template of a task's code ready that the child has not; until told to stop."""
        has_code = self._child is not None and self.location == order.code_location
        if self._templates is None or (has_code and not self._reason_to_replace("", None)):
            return
        loading = asyncio.create_task(self._templates.load(order))
        stopped = asyncio.create_task(self._is_stopped.wait())
        try:
            await asyncio.wait({loading, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await end_tasks([loading, stopped])

    def _note_old_code(self, word: CodeIsOld, order: Order) -> Order:
        """The order as the next child is given it."""
        self._spent_by = ReplaceReason.OLD_CODE
        is_again = isinstance(order, Execute) and order.takes_own_code
        if self._templates is not None and self._template is not None and not word.is_own:
            # a template that is too old for the order that it was loaded for is not worth having
            has_served = word.is_by_age and not is_again
            self._templates.discard(self._template, word.reason, has_served=has_served)
        return replace(order, takes_own_code=True) if isinstance(order, Execute) else order

    async def _send(self, order: Order) -> Word | ChildDied:
        assert self._child is not None
        self._task_number += 1
        writer = self._child.writer
        writer.write(frames.encode({"number": self._task_number, **pack(order)}))
        try:
            await writer.drain()
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
        if self._max_memory_kib and answer.own_kib > self._max_memory_kib:
            self._spent_by = ReplaceReason.MEMORY

    async def _next_message(self, timeout_seconds: float | None) -> Word | ChildDied:
        """The child's next message, or its death.

        What does not come from our child, or is not about its present task, is a fault of the
        child: a step has forked a copy that speaks for it, or has written into its descriptors.
        """
        assert self._child is not None
        try:
            values = await asyncio.wait_for(frames.read(self._child.reader), timeout_seconds)
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
        assert self._child is not None
        exited, pid = self._child.exited, self.pid
        if not exited.done():
            await asyncio.wait({exited}, timeout=_EXIT_TIMEOUT_SECONDS)
        if not exited.done():
            return await self._put_down("does not speak with its worker any more")
        was_killed = exited.result() == -signal.SIGKILL
        return ChildDied(exited.result(), pid, was_killed and count_oom_kills() > self._oom_kills)

    async def _put_down(self, fault: str) -> ChildDied:
        """Kill a child that cannot be relied on."""
        assert self._child is not None
        pid = self.pid
        logger.warning("Slot %d: process %d %s; killing it.", self.number, pid, fault)
        self._spent_by = ReplaceReason.KILLED
        self._child.kill()
        return ChildDied(await self._child.exit_code(), pid, fault=fault)

    def interrupt(self) -> None:
        """See ``Slot``."""
        self._is_stopped.set()
        self._spent_by = ReplaceReason.INTERRUPTED
        if self._child is not None:
            self._child.send_signal(signal.SIGTERM)

    def warn(self) -> None:
        """See ``Slot``."""
        self._spent_by = ReplaceReason.SOFT_LIMIT  # the exception may have torn it
        if self._child is not None:
            self._child.send_signal(SOFT_LIMIT_SIGNAL)

    def kill(self) -> None:
        """See ``Slot``."""
        self._is_stopped.set()
        self._spent_by = ReplaceReason.KILLED
        if self._child is not None:
            self._child.kill()

    async def stop(self) -> None:
        """See ``Slot``."""
        self.kill()
        await self._end_child()

    async def _end_child(self) -> None:
        if self._child is not None:
            await self._child.stop()
        self._child = self._template = None
        self.location = ""
