"""The time limits of one task: its process is warned at the soft one, killed at the hard one."""

from __future__ import annotations

import asyncio
import logging

from dagster_taskiq.messages.time_limits import TimeLimits
from dagster_taskiq.worker.slot_base import Slot

logger = logging.getLogger(__name__)


class LimitTimers:
    """Runs from ``start`` to ``cancel``.

    Args:
        slot: that executes the task.
        limits: of the task.
    """

    def __init__(self, slot: Slot, limits: TimeLimits) -> None:
        self.limits = limits
        #: Why the process was killed, for the step's page in the UI; empty if it was not.
        self.verdict = ""
        self._slot = slot
        self._timers: list[asyncio.TimerHandle] = []

    def start(self) -> None:
        """The task's process has begun."""
        loop = asyncio.get_running_loop()
        if self.limits.soft_seconds:
            self._timers.append(loop.call_later(self.limits.soft_seconds, self._slot.warn))
        if self.limits.hard_seconds:
            self._timers.append(loop.call_later(self.limits.hard_seconds, self._kill))

    def cancel(self) -> None:
        """The task has ended."""
        for timer in self._timers:
            timer.cancel()

    def _kill(self) -> None:
        self.verdict = f"its time limit of {self.limits.hard_seconds:g} s was over"
        logger.warning("Killing process %d: %s.", self._slot.pid, self.verdict)
        self._slot.kill()
