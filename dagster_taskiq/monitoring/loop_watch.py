"""How late an event loop is, which another thread can ask while the loop hangs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from dagster_taskiq.monitoring.peaks import Peak

#: How often the event loop says that it goes round.
TICK_SECONDS = 0.5


class LoopWatch:
    """Has an event loop tick, and knows when a tick was late or is overdue.

    Args:
        now: a monotonic clock, in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._due_at: float | None = None
        self._lags = Peak(now)
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to watch the event loop that runs in this thread."""
        self._schedule(asyncio.get_running_loop())

    def stop(self) -> None:
        """Stop, in the same thread."""
        if self._timer is not None:
            self._timer.cancel()
        self._due_at = None

    @property
    def lag_seconds(self) -> float:
        """For how long the loop has been overdue; 0 when it is in time, or not watched."""
        due_at = self._due_at
        return 0.0 if due_at is None else max(0.0, self._now() - due_at)

    @property
    def worst_seconds(self) -> float:
        """The longest lag of the last minute, the present one included."""
        return max(self.lag_seconds, self._lags.largest() or 0.0)

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        self._due_at = self._now() + TICK_SECONDS
        self._timer = loop.call_later(TICK_SECONDS, self._tick, loop)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self._lags.note(self.lag_seconds)
        self._schedule(loop)
