"""For how long something has been so, as far as one process has seen it.

That a server does not have something proves nothing at first. It may have been away, or have
forgotten what it knew, and a process that holds something there needs time to say so again. These
objects only count that time: all times are seconds on one clock of the process that never goes
back.

Their users ask different questions:

* The loop's client believes that a claim is missing when the server has answered in one epoch for
  long enough. It believes that a cancelled task never ran when the epoch alone is old enough, since
  an outage makes a server forget nothing.
* A worker's leases also ask for the age of the epoch alone: a renewal that is not answered ends the
  lease itself.
* The loop counts an absence across epochs, as its client's answer says whether the epoch is old
  enough. The launcher has no such client, so its absences begin anew in a new epoch.
* The loop's ``ClaimWatch`` is none of these: the end of a claim is known from its lease beforehand.
"""

from __future__ import annotations


class EpochWatch:
    """Since when a server has been in its present epoch, and since when it has answered.

    Args:
        address: of the server, for sentences.
        is_complete: whether nothing that depends on the server is older than this watch, so that
            the first epoch counts as seen from its beginning.

    Attributes:
        epoch: the present one; empty before the first.
        trouble: what has last kept the server from answering, or from remembering; a sentence, or
            empty.
        troubled_at: when that was noted.
    """

    def __init__(self, address: str, *, is_complete: bool = False) -> None:
        self._address = address
        self._is_complete = is_complete
        self._epoch_since = float("-inf")
        self.epoch = ""
        self.trouble = ""
        self.troubled_at = float("-inf")

    def note_epoch(self, epoch: str, at: float) -> bool:
        """The server has answered in an epoch; whether another one was known before."""
        if epoch == self.epoch:
            return False
        is_first, self.epoch = not self.epoch, epoch
        if is_first and self._is_complete:
            return False
        self._epoch_since = at
        if is_first:
            return False
        self.note_trouble(f"{self._address} was restarted or emptied.", at)
        return True

    def note_trouble(self, trouble: str, at: float) -> None:
        """The server has not answered, or has forgotten what it knew."""
        self.trouble, self.troubled_at = trouble, at

    def epoch_seconds(self, at: float) -> float:
        """For how long the present epoch has been known; without end where it is complete."""
        return at - self._epoch_since

    def steady_seconds(self, at: float) -> float:
        """For how long the server has answered in the present epoch, without any trouble."""
        return at - max(self._epoch_since, self.troubled_at)


class AbsenceWatch:
    """For how long one thing has been missing wherever it was looked for."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._epoch = ""

    def see(self) -> None:
        """It is there: the absence is over."""
        self._since = None

    def miss(self, at: float, epoch: str = "") -> None:
        """It is missing.

        Args:
            epoch: of the server that misses it; the absence begins anew in another one.
        """
        if self._since is None or epoch != self._epoch:
            self._since, self._epoch = at, epoch

    def seconds(self, at: float) -> float:
        """For how long it has been missing; 0 where it is there, or was missed only now."""
        return 0.0 if self._since is None else at - self._since
