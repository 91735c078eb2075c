"""The fourth role of a backend: the attempts that ended last, and counters of all.

It is for people and metrics, and says which code a new worker loads ahead. What becomes of a task
does not depend on it, so it is outside the epoch. What is stored here is lost with the server's
data, and nothing is written again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dagster_taskiq.defaults import HISTORY_ENDS, HISTORY_EXPIRES_SECONDS
from dagster_taskiq.messages.attempt_ends import AttemptEnd, Counter, EndGroup, HistoryBatch

#: How long a batch is known by its id, so that it counts once though it is sent again.
BATCH_EXPIRES_SECONDS = 600


class HistoryBackend(ABC):
    """The history of ended attempts, and the counters.

    Of each ``EndGroup`` the last ``HISTORY_ENDS`` are kept, for ``HISTORY_EXPIRES_SECONDS``. A
    counter lives as long as the server keeps its data, and begins again at 0 after a flush.
    """

    @abstractmethod
    async def add_history(self, batch: HistoryBatch) -> None:
        """Add ends and make counters grow, in one atomic step and one round trip."""

    @abstractmethod
    async def ended(self, most: int = HISTORY_ENDS) -> list[AttemptEnd]:
        """The attempts that ended last, the newest first.

        It is for people; what is not signed as it must be, or cannot be read, is left out.

        Args:
            most: of each group.
        """

    @abstractmethod
    async def counts(self) -> dict[Counter, int]:
        """The counters that have grown since the server has its data; they are not signed."""


@dataclass(frozen=True)
class _Kept:
    """Data with the end of its time, by the server's clock."""

    data: bytes
    ends_at: float


@dataclass(frozen=True)
class History:
    """What a server keeps of it, and what each operation does to that, as pure functions.

    Attributes:
        ends: of each group, the newest first.
        counts: by the names of the counters.
        batches: until when each is known, by the server's clock.
    """

    ends: Mapping[EndGroup, Sequence[_Kept]] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    batches: Mapping[str, float] = field(default_factory=dict)

    def at(self, now: float) -> History:
        """The same without what has expired; ``now`` is by the server's clock."""
        ends = {group: [it for it in kept if it.ends_at > now] for group, kept in self.ends.items()}
        batches = {key: ends_at for key, ends_at in self.batches.items() if ends_at > now}
        return History(ends, self.counts, batches)

    def with_batch(
        self,
        batch_id: str,
        ends: Sequence[tuple[EndGroup, bytes]],
        counts: Mapping[str, int],
        now: float,
    ) -> History:
        """See ``HistoryBackend.add_history``."""
        before = self.at(now)
        if batch_id in before.batches:
            return before
        after = dict(before.ends)
        for group, data in ends:
            newest = _Kept(data, now + HISTORY_EXPIRES_SECONDS)
            after[group] = [newest, *after.get(group, ())][:HISTORY_ENDS]
        names = {*before.counts, *counts}
        return History(
            after,
            {name: before.counts.get(name, 0) + counts.get(name, 0) for name in names},
            {**before.batches, batch_id: now + BATCH_EXPIRES_SECONDS},
        )

    def newest(self, most: int, now: float) -> list[bytes]:
        """See ``HistoryBackend.ended``."""
        return [it.data for kept in self.at(now).ends.values() for it in kept[:most]]
