"""The largest of what was noted in the last minute: a scrape now and then would miss it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

#: For how long a value counts: longer than most scrape intervals.
WINDOW_SECONDS = 60.0


class Peak:
    """Remembers the largest value of the last minute.

    One thread notes, any other may ask.

    Args:
        now: a monotonic clock, in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        #: Of when and how large; each is larger than those behind it.
        self._values: deque[tuple[float, float]] = deque()

    def note(self, value: float) -> None:
        """Note a value of now."""
        now = self._now()
        while self._values and self._values[-1][1] <= value:
            self._values.pop()
        self._values.append((now, value))
        while self._values[0][0] < now - WINDOW_SECONDS:
            self._values.popleft()

    def largest(self) -> float | None:
        """The largest value; None where none was noted in the last minute."""
        since = self._now() - WINDOW_SECONDS
        return next((value for at, value in list(self._values) if at >= since), None)
