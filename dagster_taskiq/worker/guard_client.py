"""The worker's end of its guard.

The worker tells the guard what it changes, without ever waiting for it, and asks it from time to
time whether it has heard so far. A guard that has ended, or does not answer (it is stopped, by a
debugger or a freezer), is replaced by one that is told everything. Meanwhile the worker does what
the last guard that answered would do: it kills a group at the last deadline that was acknowledged.
"""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from dagster_taskiq.errors import SlotError
from dagster_taskiq.worker import guard
from dagster_taskiq.worker.guard import clock, kill_group

logger = logging.getLogger(__name__)

#: How long a new guard may take to answer: it is a new interpreter, perhaps on a busy machine.
_START_SECONDS = 10.0

#: Pause before another guard is tried when one could not be started, and between two tries to
#: write to one whose pipe is full.
_RETRY_SECONDS = 0.5

#: How long a guard may take to kill what is left when the worker ends.
_CLOSE_SECONDS = 5.0


@dataclass
class _Question:
    """Whether the guard has obeyed everything until now.

    Attributes:
        due_at: when it must have been answered, by ``guard.clock``.
        deadlines: that it knows when it answers.
        is_sent: whether it is in the pipe.
    """

    due_at: float
    deadlines: dict[int, float]
    is_sent: bool = False


class GuardClient:
    """Starts the guard and tells it which process groups to kill, and when."""

    def __init__(self) -> None:
        self._deadlines: dict[int, float | None] = {}
        #: Until when a group may live: the last deadline that a guard has acknowledged, or the
        #: first one if none has.
        self._limits: dict[int, float] = {}
        self._untold: dict[int, None] = {}
        self._question: _Question | None = None
        self._patience_seconds = _START_SECONDS
        self._process: subprocess.Popen[bytes] | None = None
        self._ended: list[subprocess.Popen[bytes]] = []
        self._pipe = self._answers = -1
        self._is_closed = False
        self._cannot_start = False
        self._is_due = asyncio.Event()
        self._looks_at = float("inf")

    def start(self) -> None:
        """Start the guard process.

        Raises:
            SlotError: no process can be started.
        """
        try:
            with ExitStack() as theirs:
                reader, self._pipe = _pipe(theirs, 0)
                self._answers, writer = _pipe(theirs, 1)
                # not "-m": that would import the package, and with it Dagster
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(Path(guard.__file__))],
                    stdin=reader,
                    stdout=writer,
                    start_new_session=True,
                    cwd="/",
                )
        except OSError as error:
            self._hang_up()
            raise SlotError(f"the guard process cannot be started: {error}") from error
        self._is_closed = False
        self._untold = dict.fromkeys(self._deadlines)
        self._question = None
        self._ask(max(self._patience_seconds, _START_SECONDS))

    @property
    def pid(self) -> int:
        """Of the guard process; 0 before ``start``."""
        return self._process.pid if self._process else 0

    @property
    def groups(self) -> list[int]:
        """Process groups of the children that there are; any thread may ask."""
        return list(self._deadlines)

    async def monitor(self, on_unguarded: Callable[[int], None] = kill_group) -> None:
        """Replace a guard that ended or does not answer; nothing is killed by its end.

        Args:
            on_unguarded: called with a process group whose last deadline that a guard has
                acknowledged is over: kill it.
        """
        loop = asyncio.get_running_loop()
        while not self._is_closed:
            self._look(on_unguarded)
            # when to look again is known now; only what is new from here on is due at once
            self._is_due.clear()
            answers = self._answers
            if answers >= 0:
                loop.add_reader(answers, self._is_due.set)
            # not wait_for, which before Python 3.12 loses a cancellation
            due = asyncio.ensure_future(self._is_due.wait())
            try:
                await asyncio.wait({due}, timeout=max(0.0, self._looks_at - clock()))
            finally:
                due.cancel()
                if answers >= 0:
                    loop.remove_reader(answers)

    def watch(self, group: int) -> None:
        """A child's process group exists: kill it when the worker is gone."""
        self._deadlines[group] = None
        self._limits.pop(group, None)
        self._tell(group)

    def set_deadline(self, group: int, when: float) -> None:
        """Kill the group at a time of ``guard.clock``, unless a later call moves it."""
        self._deadlines[group] = when
        self._look_at(self._limits.setdefault(group, when))
        self._tell(group)

    def lift_deadline(self, group: int) -> None:
        """The group may live as long as the worker."""
        self.watch(group)

    def forget(self, group: int) -> None:
        """The group is gone."""
        self._deadlines.pop(group, None)
        self._limits.pop(group, None)
        self._tell(group)

    def ask(self, patience_seconds: float) -> None:
        """Have the guard answer within that time, or be replaced.

        Nothing is asked anew before the last answer has come.
        """
        self._patience_seconds = patience_seconds
        if self._question is None:
            self._ask(patience_seconds)

    def close(self) -> None:
        """End the guard; it kills what it still watches."""
        has_heard_all = not self._untold
        self._is_closed = True
        self._hang_up()
        self._is_due.set()
        if self._process is None:
            return
        try:
            self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:  # it is stopped
            self._process.kill()
            has_heard_all = False
        if not has_heard_all:
            for group in self._deadlines:
                kill_group(group)

    # --- what the guard is told ---

    def _tell(self, group: int) -> None:
        self._untold[group] = None
        self._flush()

    def _ask(self, patience_seconds: float) -> None:
        deadlines = {it: when for it, when in self._deadlines.items() if when is not None}
        self._question = _Question(clock() + patience_seconds, deadlines)
        self._look_at(self._question.due_at)
        self._flush()

    def _flush(self) -> None:
        """Write what there is room for; a line is written as a whole or not at all."""
        if self._pipe < 0:
            return
        try:
            for group in list(self._untold):
                os.write(self._pipe, self._line(group))
                del self._untold[group]
            if self._question is not None and not self._question.is_sent:
                os.write(self._pipe, b"ask\n")
                self._question.is_sent = True
        except BlockingIOError:
            if self._question is None:  # it must have room before long
                self._question = _Question(clock() + self._patience_seconds, {})
            self._look_at(clock() + _RETRY_SECONDS)
        except BrokenPipeError:
            pass  # it has died; `monitor` starts another, which is told everything

    def _line(self, group: int) -> bytes:
        if group not in self._deadlines:
            return b"forget %d\n" % group
        when = self._deadlines[group]
        return (f"watch {group}\n" if when is None else f"deadline {group} {when}\n").encode()

    # --- looking after the guard ---

    def _look_at(self, when: float) -> None:
        """Have `monitor` look again at that time at the latest."""
        if when < self._looks_at:
            self._looks_at = when
            self._is_due.set()

    def _look(self, on_unguarded: Callable[[int], None]) -> None:
        """Do what is due, and note when there is more."""
        now = clock()
        self._looks_at = float("inf")
        if self._pipe < 0:
            self._replace()
        elif not self._hear():
            assert self._process is not None
            code = self._process.wait()
            logger.warning("The guard process ended with exit code %s; starting another.", code)
            self._replace()
        elif self._question is not None and now >= self._question.due_at:
            logger.warning(
                "The guard process %d does not answer (is it stopped?); replacing it.", self.pid
            )
            self._replace()
        self._flush()
        for group in [group for group, limit in self._limits.items() if limit <= now]:
            del self._limits[group]
            on_unguarded(group)
        self._look_at(min(self._limits.values(), default=float("inf")))
        if self._question is not None:
            self._look_at(self._question.due_at)

    def _hear(self) -> bool:
        """Read an answer, if there is one; whether the guard lives."""
        try:
            answer = os.read(self._answers, 64)
        except BlockingIOError:
            return True
        if answer and self._question is not None:
            for group, when in self._question.deadlines.items():
                if group in self._limits:
                    self._limits[group] = max(self._limits[group], when)
            self._question = None
        return bool(answer)

    def _replace(self) -> None:
        """Start another guard in place of this one, which must not see the end of its pipe."""
        if self._process is not None:
            self._process.kill()
            self._ended.append(self._process)
            self._process = None
        self._ended = [process for process in self._ended if process.poll() is None]
        self._hang_up()
        try:
            self.start()
        except SlotError as error:
            if not self._cannot_start:
                logger.error("No guard: %s. Trying again; steps are killed in time.", error)
            self._cannot_start = True
            self._look_at(clock() + _RETRY_SECONDS)
            return
        self._cannot_start = False

    def _hang_up(self) -> None:
        for descriptor in {self._pipe, self._answers} - {-1}:
            os.close(descriptor)
        self._pipe = self._answers = -1


def _pipe(theirs: ExitStack, their_end: int) -> tuple[int, int]:
    """A pipe whose end for the guard is closed with the stack; ours does not block."""
    ends = os.pipe()
    theirs.callback(os.close, ends[their_end])
    os.set_blocking(ends[1 - their_end], False)
    return ends
