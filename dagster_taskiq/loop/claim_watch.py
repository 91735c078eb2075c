"""When the loop may believe that a claim is over: by its own clock, whatever the server's says.

A claim ends before its time when the server's clock steps forward, or when somebody deletes its
key. Its worker executes on then, until it notices that it cannot renew the claim.
"""

from __future__ import annotations

from dagster_taskiq.defaults import KILL_AFTER_LEASE_SHARE

#: Share of a lease that is left, at most, when the guard has killed what was not renewed.
_STOPPED_SHARE = 1 - KILL_AFTER_LEASE_SHARE

#: The shortest pause between two looks at a claim that is about to end.
_SHORTEST_PAUSE_SECONDS = 0.1


class ClaimWatch:
    """What one loop has seen of the claim on one task. All times are monotonic seconds.

    A claim is overdue when so little of its lease is left that the guard has killed the task; its
    end is believed at once. Any other claim must be seen gone for a whole lease: its worker has
    stopped by then.

    Args:
        lease_seconds: how long the claim holds without renewal.
    """

    def __init__(self, lease_seconds: float) -> None:
        self._lease_seconds = lease_seconds
        self._ends_at = float("-inf")
        self._is_overdue = False
        self._gone_since: float | None = None
        self._is_expired = False
        #: When it was last seen held; minus infinity if it never was.
        self.seen_at = float("-inf")

    def see(self, asked_at: float, left_seconds: float) -> None:
        """It is held.

        Args:
            asked_at: before the server was asked.
            left_seconds: of its lease, by the server's clock.
        """
        self._gone_since, self._is_expired = None, False
        self.seen_at = asked_at
        # a seen end never moves forward: only a step of the server's clock would do that
        self._ends_at = max(self._ends_at, asked_at + min(left_seconds, self._lease_seconds))
        left = self._ends_at - asked_at
        self._is_overdue = left <= self._lease_seconds * _STOPPED_SHARE

    def miss(self, answered_at: float, *, is_expired: bool) -> None:
        """It is not held.

        Args:
            answered_at: after the server has answered.
            is_expired: whether the server says that it was.
        """
        # the first claim on a task that had waited may come and go between two looks
        if self._gone_since is None or (is_expired and not self._is_expired):
            self._gone_since = answered_at
        self._is_expired = is_expired

    def is_over(self, now: float) -> bool:
        """Whether it is gone, and its worker has stopped what it executed."""
        return self._gone_since is not None and now >= self._believed_at

    @property
    def was_seen(self) -> bool:
        """Whether it has ever been seen held."""
        return self.seen_at > float("-inf")

    @property
    def has_vanished(self) -> bool:
        """Whether it was gone before its lease can have ended."""
        return self._gone_since is not None and self._gone_since < self._ends_at

    @property
    def _believed_at(self) -> float:
        assert self._gone_since is not None
        return self._ends_at if self._is_overdue else self._gone_since + self._lease_seconds

    def next_look_at(self, now: float) -> float:
        """When the next look would tell something new; infinity if none would."""
        if self._gone_since is not None:
            at = self._believed_at
        elif self._is_overdue:
            at = max(self._ends_at, now)
        else:
            # in the middle of the last part of the lease, in which the worker counts as overdue
            at = self._ends_at - self._lease_seconds * _STOPPED_SHARE / 2
        return max(at, now + _SHORTEST_PAUSE_SECONDS) if at >= now else float("inf")
