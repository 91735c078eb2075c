"""The Redis backend's list of workers, and the messages to them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from dagster_taskiq.backend.base import CONTROL_EXPIRES_SECONDS, ControlBackend
from dagster_taskiq.backend.redis_store import BATCH, RedisStore, milliseconds, text_of
from dagster_taskiq.defaults import LOST_WORKER_SECONDS
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.messages.worker_records import (
    RunningTask,
    WorkerRecord,
    as_lost,
    readable_records,
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
            data = write_record(self._signer, record)
            pipeline.set(key, data, px=expires_ms)
            # a key of its own, since versions that know no lost workers take the other for life
            key = self._store.key("last:", record.worker_id)
            pipeline.set(key, data, px=expires_ms + milliseconds(LOST_WORKER_SECONDS))
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
            parts = ("worker:", "last:", "running:", "control:")
            pipeline.unlink(*(self._store.key(part, worker_id) for part in parts))
            await pipeline.execute()

    async def workers(self) -> list[WorkerRecord]:
        """See ``ControlBackend``."""
        (stored,) = await self._of_workers("worker:")
        return self._readable("worker:", stored)

    async def lost_workers(self) -> list[WorkerRecord]:
        """See ``ControlBackend``."""
        live, stored = await self._of_workers("worker:", "last:")
        lost = {worker_id: data for worker_id, data in stored.items() if worker_id not in live}
        return as_lost(self._readable("last:", lost))

    async def _of_workers(self, *parts: str) -> list[dict[str, bytes]]:
        """What the workers have stored under their ids, in keys that begin so; at one moment."""
        async with self._store.reached() as redis:
            members: Any = await redis.zrange(self._store.workers, 0, -1)
            ids = [text_of(item) for item in members]
            if not ids:
                return [{} for _ in parts]
            names = [self._store.key(part, item) for part in parts for item in ids]
            values: Any = await redis.mget(names)
        rows = [values[start : start + len(ids)] for start in range(0, len(values), len(ids))]
        return [{it: data for it, data in zip(ids, row, strict=True) if data} for row in rows]

    def _readable(self, part: str, stored: Mapping[str, bytes]) -> list[WorkerRecord]:
        def note(worker_id: str, problem: str) -> None:
            self._store.say_unreadable(self._store.key(part, worker_id), problem)

        return readable_records(self._signer, stored, note)

    async def running(self) -> list[RunningTask]:
        """See ``ControlBackend``."""
        (stored,) = await self._of_workers("running:")
        return readable_running(self._signer, stored)

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
