"""Signals that end a command with processes of its own, at moments of its choice."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

#: What ends the command: Ctrl-C, a plain kill, and the closing of its terminal.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal asks the command to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Interrupts:
    """Notes the first signal instead of raising at once, which could lose a process just started.

    A second one means that what is being stopped must end at once, see ``is_forced``.
    """

    def __init__(self) -> None:
        self._received: list[int] = []
        self._may_raise = False

    def __enter__(self) -> Self:
        for number in SIGNALS:
            # under nohup the command is meant to outlive its terminal
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # the process ends here: what is left of it has no use for a signal
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def check(self) -> None:
        """Raise Interrupted if there was a signal."""
        if self._received:
            raise Interrupted(self._received[0])

    def is_forced(self) -> bool:
        """Whether there was a second signal."""
        return len(self._received) > 1

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """In here a signal raises Interrupted immediately; for what waits and starts nothing."""
        self._may_raise = True
        try:
            self.check()
            yield
        finally:
            self._may_raise = False

    def _note(self, number: int, _: FrameType | None) -> None:
        self._received.append(number)
        if self._may_raise and len(self._received) == 1:
            raise Interrupted(number)
