"""How long an attempt of a step may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TimeLimits:
    """Seconds from when a step's process begins with it; None is not said, 0 is no limit.

    Attributes:
        soft_seconds: after which ``SoftTimeLimitError`` is raised in the step's code.
        hard_seconds: after which its process is killed.
    """

    soft_seconds: float | None = None
    hard_seconds: float | None = None

    def or_else(self, defaults: TimeLimits) -> TimeLimits:
        """These limits, with what they do not say from others."""
        return TimeLimits(
            defaults.soft_seconds if self.soft_seconds is None else self.soft_seconds,
            defaults.hard_seconds if self.hard_seconds is None else self.hard_seconds,
        )
