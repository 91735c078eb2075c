"""The pauses of queues on PostgreSQL: a table."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from dagster_taskiq.backend.pauses import PauseBackend
from dagster_taskiq.messages.queue_pauses import QueuePause, readable_pauses, write_pause
from dagster_taskiq.messages.signing import Signer


class PostgresqlPauses(PauseBackend):
    """See ``PauseBackend``."""

    _signer: Signer

    @abstractmethod
    async def _call(
        self, function: str, *values: Any, is_urgent: bool = False
    ) -> list[tuple[Any, ...]]: ...

    async def pause_queue(self, pause: QueuePause) -> None:
        """See ``PauseBackend``."""
        await self._call("pause_queue", pause.queue, write_pause(self._signer, pause))

    async def resume_queue(self, queue: str) -> bool:
        """See ``PauseBackend``."""
        ((was_paused,),) = await self._call("resume_queue", queue)
        return bool(was_paused)

    async def paused_queues(self) -> dict[str, QueuePause]:
        """See ``PauseBackend``."""
        rows = await self._call("list_pauses")
        return readable_pauses(self._signer, {queue: bytes(data) for queue, data in rows})
