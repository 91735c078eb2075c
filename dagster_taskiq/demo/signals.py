"""Signals that end the demo, at moments of its choice."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

#: What ends the demo: Ctrl-C, a plain kill, and the closing of its terminal.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal asks the demo to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Interrupts:
    """Notes the first signal instead of raising at once, which could lose a process just started.

    Those that follow it mean nothing, as the demo is stopping what it started by then.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._may_raise = False

    def __enter__(self) -> Self:
        for number in SIGNALS:
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
        if self._received is not None:
            raise Interrupted(self._received)

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
        if self._received is None:
            self._received = number
            if self._may_raise:
                raise Interrupted(number)
