"""The pauses of queues on Redis: a hash."""

from __future__ import annotations

from typing import Any

from dagster_taskiq.backend.pauses import PauseBackend
from dagster_taskiq.backend.redis_store import RedisStore, text_of
from dagster_taskiq.messages.queue_pauses import QueuePause, readable_pauses, write_pause
from dagster_taskiq.messages.signing import Signer


class RedisPauses(PauseBackend):
    """See ``PauseBackend``."""

    _store: RedisStore
    _signer: Signer

    @property
    def _paused(self) -> str:
        return self._store.key("paused")

    async def pause_queue(self, pause: QueuePause) -> None:
        """See ``PauseBackend``."""
        async with self._store.reached() as redis:
            await redis.hset(self._paused, pause.queue, write_pause(self._signer, pause))

    async def resume_queue(self, queue: str) -> bool:
        """See ``PauseBackend``."""
        async with self._store.reached() as redis:
            removed: Any = await redis.hdel(self._paused, queue)
        return bool(removed)

    async def paused_queues(self) -> dict[str, QueuePause]:
        """See ``PauseBackend``."""
        async with self._store.reached() as redis:
            stored: Any = await redis.hgetall(self._paused)
        return readable_pauses(self._signer, {text_of(key): stored[key] for key in stored})
