"""The Redis backend's list of workers, and the messages to them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from dagster_taskiq.backend.base import CONTROL_EXPIRES_SECONDS, ControlBackend
from dagster_taskiq.backend.redis_store import BATCH, RedisStore, milliseconds, text_of
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.messages.worker_records import (
    RunningTask,
    WorkerRecord,
    read_record,
    readable_running,
    write_record,
    write_running,
)


class RedisControl(ControlBackend):
    """See ``ControlBackend``.

    Args:
        store: the keys on the server.
        signer: of workers' records.
    """

    def __init__(self, store: RedisStore, signer: Signer) -> None:
        self._store = store
        self._signer = signer
        self._has_told_running = False

    async def heartbeat(
        self,
        record: WorkerRecord,
        *,
        expires_seconds: float,
        running: Sequence[RunningTask] = (),
    ) -> None:
        """See ``ControlBackend``."""
        expires_ms = milliseconds(expires_seconds)
        async with self._store.reached() as redis, redis.pipeline(transaction=True) as pipeline:
            key = self._store.key("worker:", record.worker_id)
            pipeline.set(key, write_record(self._signer, record), px=expires_ms)
            key = self._store.key("running:", record.worker_id)
            if running:
                tasks = write_running(self._signer, record.worker_id, running)
                pipeline.set(key, tasks, px=expires_ms)
            elif self._has_told_running:
                pipeline.unlink(key)
            self._has_told_running = bool(running)
            pipeline.zadd(self._store.workers, {record.worker_id: time.time() + expires_seconds})
            await pipeline.execute()
        await self._store.close_idle_connections()

    async def goodbye(self, worker_id: str) -> None:
        """See ``ControlBackend``."""
        async with self._store.reached() as redis, redis.pipeline(transaction=True) as pipeline:
            pipeline.zrem(self._store.workers, worker_id)
            parts = ("worker:", "running:", "control:")
            pipeline.unlink(*(self._store.key(part, worker_id) for part in parts))
            await pipeline.execute()

    async def workers(self) -> list[WorkerRecord]:
        """See ``ControlBackend``."""
        stored = await self._of_workers("worker:")
        records = [self._record_of(worker_id, data) for worker_id, data in stored.items()]
        return sorted((it for it in records if it), key=lambda record: record.name)

    async def _of_workers(self, part: str) -> dict[str, bytes]:
        """What the workers have stored under their ids, in keys that begin so."""
        async with self._store.reached() as redis:
            members: Any = await redis.zrange(self._store.workers, 0, -1)
            ids = [text_of(item) for item in members]
            if not ids:
                return {}
            values: Any = await redis.mget([self._store.key(part, item) for item in ids])
        return {worker_id: data for worker_id, data in zip(ids, values, strict=True) if data}

    def _record_of(self, worker_id: str, data: bytes) -> WorkerRecord | None:
        try:
            return read_record(self._signer, worker_id, data, time.time())
        except ValueError as error:
            self._store.say_unreadable(self._store.key("worker:", worker_id), str(error))
            return None

    async def running(self) -> list[RunningTask]:
        """See ``ControlBackend``."""
        return readable_running(self._signer, await self._of_workers("running:"))

    async def tidy(self) -> None:
        """See ``ControlBackend``: keys expire by themselves, but for a name in a set."""
        async with self._store.reached() as redis:
            # hosts whose clocks differ do no harm if what is old is dropped late
            await redis.zremrangebyscore(self._store.workers, 0, time.time() - 3600)

    async def send_control(self, worker_id: str, order: str) -> None:
        """See ``ControlBackend``."""
        mailbox = self._store.key("control:", worker_id)
        async with self._store.reached() as redis, redis.pipeline(transaction=True) as pipeline:
            pipeline.rpush(mailbox, order)
            pipeline.expire(mailbox, CONTROL_EXPIRES_SECONDS)
            await pipeline.execute()

    async def wait_for_control(self, worker_id: str, timeout_seconds: float) -> list[bytes]:
        """See ``ControlBackend``."""
        mailbox = self._store.key("control:", worker_id)
        first = await self._store.wait_on(mailbox, timeout_seconds)
        if first is None:
            return []
        async with self._store.reached() as redis:
            rest: Any = await redis.lpop(mailbox, BATCH)
        return [first, *(rest or [])]
