"""The PostgreSQL backend's history of ended attempts, and its counters."""

from __future__ import annotations

import time
from abc import abstractmethod
from typing import Any

from dagster_taskiq.backend.history import HistoryBackend
from dagster_taskiq.defaults import HISTORY_ENDS
from dagster_taskiq.messages.attempt_ends import (
    AttemptEnd,
    Counter,
    EndGroup,
    HistoryBatch,
    readable_counts,
    readable_ends,
    write_counter,
    write_end,
)
from dagster_taskiq.messages.signing import Signer


class PostgresqlHistory(HistoryBackend):
    """See ``HistoryBackend``; its functions are in ``postgresql_history.sql``."""

    _signer: Signer

    @abstractmethod
    async def _call(
        self, function: str, *values: Any, is_urgent: bool = False
    ) -> list[tuple[Any, ...]]:
        """One function of the schema."""

    async def add_history(self, batch: HistoryBatch) -> None:
        """See ``HistoryBackend``."""
        await self._call(
            "add_history",
            batch.batch_id,
            [write_counter(counter) for counter in batch.counts],
            list(batch.counts.values()),
            [end.group.value for end in batch.ends],
            [write_end(self._signer, end) for end in batch.ends],
        )

    async def ended(self, most: int = HISTORY_ENDS) -> list[AttemptEnd]:
        """See ``HistoryBackend``."""
        rows = await self._call("list_history", [group.value for group in EndGroup], most)
        return readable_ends(self._signer, [data for (data,) in rows], time.time())

    async def counts(self) -> dict[Counter, int]:
        """See ``HistoryBackend``."""
        return readable_counts(dict(await self._call("list_counts")))
