"""What the Redis backend's methods stand on: names of its keys, calls, and connections.

Keys, all under the prefix: ``epoch``; for a run its record ``run:<id>``, the lease of its loop
``run:<id>:loop`` and the mailbox ``run:<id>:mailbox``; for a task ``claim:<id>`` and
``result:<id>``; for a worker its record ``worker:<id>``, which outlives it as ``last:<id>``, what
it executes ``running:<id>`` and its mailbox ``control:<id>``, with all of them in ``workers``. The
history has one list for each ``EndGroup``, ``history:<group>``, the hash ``counts``, and
``batch:<id>`` for a while; ``paused`` has the pauses of queues.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ReadOnlyError

from dagster_taskiq.messages.refusals import Unreadable
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq.servers.redis_calls import SCAN_COUNT, Command, Script, call, literal_pattern
from dagster_taskiq.servers.redis_client import open_redis, server_errors
from dagster_taskiq.servers.redis_rights import check_rights

#: How many tasks one script looks at: it holds up every other client of the server meanwhile.
BATCH = 500

#: Idle connections are not closed below this number.
_IDLE_CONNECTIONS = 4

#: The longest a blocking command may wait, and what its connection allows for the answer.
_LONGEST_WAIT_SECONDS = 20.0
_BLOCKING_TIMEOUT_SECONDS = 30.0


class RedisStore:
    """The keys of one deployment on a server.

    Args:
        options: how to reach the server.

    Errors: see ``Backend``.
    """

    def __init__(self, options: ServerOptions) -> None:
        self.address = options.address
        self._prefix = options.key_prefix + ":"
        self._redis = open_redis(options, timeout_seconds=options.connect_timeout_seconds)
        # a connection that waits for a message must not time out before the wait is over
        self._blocking = open_redis(options, timeout_seconds=_BLOCKING_TIMEOUT_SECONDS)
        self._unreadable = Unreadable(self.address)
        # calls under way at the same time, each on a connection of its own: now, at most since the
        # last heartbeat, at most since idle connections were closed
        self._calls = self._recent_peak = self._peak = 0

    async def check(self, commands: Iterable[str]) -> None:
        """Reach the server, as a user that may use some commands."""
        async with self.reached() as redis:
            await redis.ping()
            await check_rights(redis, self.address, self.key("rights"), commands)

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()
        await self._blocking.aclose()

    async def close_idle_connections(self) -> None:
        """After an outage, in which renewals overlap, there are many more than are of use.

        Called at each heartbeat.
        """
        if self._peak > max(_IDLE_CONNECTIONS, 2 * self._recent_peak):
            await self._redis.connection_pool.disconnect(inuse_connections=False)
            self._peak = self._recent_peak
        self._recent_peak = self._calls

    # --- keys ---

    def key(self, *parts: str) -> str:
        """A key under the prefix."""
        return self._prefix + "".join(parts)

    @property
    def epoch(self) -> str:
        """The key of the epoch."""
        return self.key("epoch")

    @property
    def workers(self) -> str:
        """The key of the list of workers."""
        return self.key("workers")

    def record(self, run_id: str) -> str:
        """The key of a run's record."""
        return self.key("run:", run_id)

    def loop(self, run_id: str) -> str:
        """The key of the lease of a run's loop."""
        return self.key("run:", run_id, ":loop")

    def mailbox(self, run_id: str) -> str:
        """The key of a run's mailbox."""
        return self.key("run:", run_id, ":mailbox")

    def task_keys(self, run_id: str, task_id: str) -> list[str]:
        """The keys of a task: its run's record, its claim, its result."""
        return [self.record(run_id), self.key("claim:", task_id), self.key("result:", task_id)]

    async def run_ids(self) -> list[str]:
        """The runs that have a record. Looks at every key of the database, some at a time."""
        before = self.key("run:")
        async with self.reached() as redis:
            pattern = literal_pattern(before) + "*"
            found = redis.scan_iter(match=pattern, count=SCAN_COUNT, _type="HASH")
            names = {text_of(key).removeprefix(before) async for key in found}
        return sorted(names)

    # --- calls ---

    @asynccontextmanager
    async def reached(self) -> AsyncIterator[Redis]:
        """The server, where every error of it becomes one of ours."""
        self._calls += 1
        self._recent_peak = max(self._recent_peak, self._calls)
        self._peak = max(self._peak, self._calls)
        with server_errors(self.address):
            try:
                yield self._redis
            except ReadOnlyError:
                # after a failover: the address may lead to the new primary, old connections do not
                for client in (self._redis, self._blocking):
                    await client.connection_pool.disconnect(inuse_connections=False)
                raise
            finally:
                self._calls -= 1

    async def run(self, script: Script, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        """What a script returns."""
        (answer,) = await self.run_all([script(keys, *arguments)])
        return answer

    async def run_all(self, commands: Sequence[Command]) -> list[Any]:
        """What several commands return, in one round trip; see ``redis_calls.call``."""
        async with self.reached() as redis:
            return await call(redis, commands)

    async def wait_on(self, mailbox: str, timeout_seconds: float) -> bytes | None:
        """The first element of a list, as soon as there is one; None after the timeout."""
        async with self.reached():
            # to Redis 0 is for ever
            timeout = max(0.001, min(timeout_seconds, _LONGEST_WAIT_SECONDS))
            answer: Any = await self._blocking.blpop([mailbox], timeout=timeout)
        return None if answer is None else answer[1]

    def say_unreadable(self, key: str, problem: str) -> None:
        """Say once of each key that it holds what none of ours has written."""
        self._unreadable.note(f"The key {key}", problem)


def text_of(value: bytes | str) -> str:
    """A reply as text; bytes that are no UTF-8 as escapes."""
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else value


def milliseconds(seconds: float) -> int:
    """The same time for the server, which takes no less than one."""
    return max(1, round(seconds * 1000))
