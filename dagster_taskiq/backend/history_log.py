"""What a process has to tell the history: collected from its threads, told every few seconds."""

from __future__ import annotations

import asyncio
import collections
import logging

from dagster_taskiq.backend.history import HistoryBackend
from dagster_taskiq.defaults import HISTORY_ENDS, HISTORY_SECONDS
from dagster_taskiq.errors import ServerError
from dagster_taskiq.messages.attempt_ends import (
    AttemptEnd,
    Counted,
    Counter,
    EndGroup,
    HistoryBatch,
    counters_of,
)

logger = logging.getLogger(__name__)


class HistoryLog:
    """Collects ends and counts, and adds them to the history as it can.

    It is best effort: nothing here raises or makes anybody wait. While the backend is away, the
    last ends of each group wait, as many as the backend would keep, and the counts of all.

    Args:
        backend: that has the history; used in its own event loop, by ``run`` and ``send``.
        seconds: between two batches.
    """

    def __init__(self, backend: HistoryBackend, seconds: float = HISTORY_SECONDS) -> None:
        self._backend = backend
        self._seconds = seconds
        #: Appending is one instruction, so that a thread that is interrupted there breaks nothing.
        self._noted: collections.deque[AttemptEnd | Counter] = collections.deque()
        self._ends: dict[EndGroup, collections.deque[AttemptEnd]] = {}
        self._counts: collections.Counter[Counter] = collections.Counter()
        #: The batch that was sent and has not been answered.
        self._unanswered: HistoryBatch | None = None

    def note_sent(self, queue: str, kind: str) -> None:
        """A task was sent; from any thread.

        Args:
            queue: as people name it.
            kind: the value of its ``QueueKind``.
        """
        self._noted.append(Counter(queue, kind, Counted.SENT))

    def note_end(self, end: AttemptEnd) -> None:
        """An attempt has ended; from any thread."""
        self._noted.append(end)

    async def run(self) -> None:
        """Add what was noted every few seconds, until cancelled; ``send`` adds the rest."""
        while True:
            await asyncio.sleep(self._seconds)
            await self.send()

    async def send(self) -> None:
        """Add what was noted; what the backend does not take waits for the next time."""
        self._gather()
        if self._unanswered is not None and not await self._add(self._unanswered):
            return
        batch = self._new_batch()
        if batch.ends or batch.counts:
            await self._add(batch)

    async def _add(self, batch: HistoryBatch) -> bool:
        """Add a batch; whether that is over."""
        self._unanswered = batch
        try:
            await self._backend.add_history(batch)
        except ServerError as error:
            # the same batch again, which counts once though only its answer may have been lost
            logger.debug("The history waits: %s", error)
            return False
        except Exception:
            # a run or a worker must not end for this, nor try it for ever
            logger.warning("%d ends are missing in the history.", len(batch.ends), exc_info=True)
        self._unanswered = None
        return True

    def _gather(self) -> None:
        while self._noted:
            it = self._noted.popleft()
            if isinstance(it, Counter):
                self._counts[it] += 1
                continue
            kept = self._ends.setdefault(it.group, collections.deque(maxlen=HISTORY_ENDS))
            kept.append(it)
            self._counts.update(counters_of(it))

    def _new_batch(self) -> HistoryBatch:
        ends = [end for kept in self._ends.values() for end in kept]
        batch = HistoryBatch(ends, dict(self._counts))
        self._ends.clear()
        self._counts.clear()
        return batch
