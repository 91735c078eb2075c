"""The broker on Redis or Valkey; ``redis_scripts`` has its keys and what must happen at once.

The bell is a hint: a worker always looks before it waits, and looks again after
``SLOW_LOOK_SECONDS``. N tasks sent at once ring N times, which wakes N idle workers. A worker that
takes a task while others wait leaves the bell ringing, so that a ring which a worker took with it
into its grave does not keep the others asleep.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, ReadOnlyError
from redis.exceptions import ConnectionError as RedisConnectionError
from taskiq_redis.redis_broker import BaseRedisBroker

from dagster_taskiq._taskiq import BrokerMessage
from dagster_taskiq.brokers import redis_scripts as scripts
from dagster_taskiq.brokers.base import (
    NOTE_EXPIRES_SECONDS,
    Admission,
    Delivery,
    Listener,
    TaskBroker,
)
from dagster_taskiq.brokers.in_hand import Held, InHand
from dagster_taskiq.brokers.looks import MAX_PEEK_BYTES, PriorityGroup, WaitingTask
from dagster_taskiq.brokers.outgoing import batches, priority_of, queue_of
from dagster_taskiq.defaults import IN_HAND_SECONDS, MAX_PRIORITY, MIN_PRIORITY
from dagster_taskiq.errors import ConfigError, UnreachableServerError
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq.servers.redis_calls import SCAN_COUNT, Command, call, literal_pattern
from dagster_taskiq.servers.redis_client import (
    connection_arguments,
    product_of,
    server_errors,
    use_tls,
)
from dagster_taskiq.servers.redis_rights import check_rights, commands_of

#: How long an idle worker waits for the bell before it looks into its queues all the same.
SLOW_LOOK_SECONDS = 5.0

#: Connections of one broker: one for each waiting listener and each call under way.
_CONNECTIONS = 50

#: The rights that the user of the server needs.
_COMMANDS = {
    *commands_of(script.text for script in scripts.ALL),
    *"BLPOP EVALSHA GET SCRIPT SET".split(),
}


class RedisTaskBroker(TaskBroker, BaseRedisBroker):
    """Queues with priority, withdrawal and safe recovery on Redis or Valkey; see ``TaskBroker``.

    Every change is one Lua script, so a task is always in exactly one place. "Durable" is what
    the server's append-only file makes of it.

    Args:
        options: how to reach the server.
        queues: the physical queues to listen on; none for a sender.
        admission: decides which messages are handed on; None for all.

    Raises:
        ConfigError: the URL cannot be read.
    """

    #: How long a taken task stays out of reach after its worker was last heard of.
    in_hand_seconds: float = IN_HAND_SECONDS

    #: How often a worker says that it still has what it has taken and not settled.
    hold_every_seconds: float = IN_HAND_SECONDS / 3

    def __init__(
        self,
        options: ServerOptions,
        queues: Sequence[str] = (),
        admission: Admission | None = None,
    ) -> None:
        self.address = options.address
        self.options = options
        self.queues = tuple(queues)
        self.admission = admission
        self._timeout_seconds = options.connect_timeout_seconds
        # redis-py's own limit must not end a wait for the bell; _execute has a shorter one
        read_seconds = SLOW_LOOK_SECONDS + self._timeout_seconds
        arguments = connection_arguments(options, timeout_seconds=read_seconds)
        # repeated here where that is harmless, in redis-py it would be for every command
        arguments["retry"] = Retry(NoBackoff(), 0)
        try:
            super().__init__(options.client_url, max_connection_pool_size=_CONNECTIONS, **arguments)
        except ValueError as error:
            raise ConfigError(f"Cannot use {self.address} as a server: {error}") from None
        # whatever the URL says, which redis-py prefers to its arguments
        self.connection_pool.connection_kwargs["socket_timeout"] = read_seconds
        use_tls(self.connection_pool, options)
        self._redis: Redis = Redis(connection_pool=self.connection_pool)
        self._sequence = f"{options.key_prefix}.sequence"
        self._in_hand = InHand(self._hold, self.hold_every_seconds)

    async def startup(self) -> None:
        """Reach the server.

        Raises:
            ServerError: it is away or refuses; raised within the connect timeout.
            ConfigError: a TLS file cannot be loaded.
        """
        await self._execute(("PING",))
        await check_rights(
            self._redis, self.address, f"{self.options.key_prefix}.rights", _COMMANDS
        )
        self._is_shut_down = False
        await super().startup()

    async def shutdown(self) -> None:
        """Close the connections; what is in hand goes back after ``in_hand_seconds``."""
        await self._in_hand.close()
        await super().shutdown()

    async def kick(self, message: BrokerMessage) -> None:
        """Send one message; see ``TaskBroker``."""
        await self.kick_many([message])

    async def kick_many(self, messages: Sequence[BrokerMessage]) -> None:
        """Send several messages; a task that is waiting or in hand already is left alone."""
        keys = [self._sequence]
        for batch in batches(messages):
            queues: dict[str, list[str | bytes | int]] = {}
            for message in batch:
                task = (message.task_id, priority_of(message), message.message)
                queues.setdefault(queue_of(message), []).extend(task)
            await self._execute(
                *(
                    scripts.SEND([*scripts.keys_of(queue), *keys], *tasks)
                    for queue, tasks in queues.items()
                )
            )

    async def withdraw(self, queue: str, task_ids: Collection[str]) -> set[str]:
        """Take waiting tasks out; exact. See ``TaskBroker``."""
        # not repeated: a second try would not know what the first has withdrawn
        return await self._ids(
            scripts.WITHDRAW(scripts.keys_of(queue), *task_ids), is_repeatable=False
        )

    async def absent(self, queue: str, task_ids: Collection[str]) -> set[str]:
        """Which tasks are neither waiting nor in hand; exact. See ``TaskBroker``."""
        return await self._ids(scripts.ABSENT(scripts.keys_of(queue), *task_ids))

    async def depth(self, queue: str) -> int:
        """How many tasks wait in a queue."""
        (count,) = await self._execute(("ZCARD", scripts.keys_of(queue)[0]))
        return int(count)

    async def queues_with_tasks(self) -> set[str]:
        """See ``TaskBroker``; looks at every key of the database, some at a time."""
        end = ":waiting"
        pattern = f"{literal_pattern(self.options.key_prefix)}.*{end}"
        with server_errors(self.address):
            keys = self._redis.scan_iter(match=pattern, count=SCAN_COUNT, _type="ZSET")
            return {key.decode().removesuffix(end) async for key in keys}

    async def peek(self, queue: str, limit: int) -> list[WaitingTask]:
        """See ``TaskBroker``. The data of what is taken and ends meanwhile is empty."""
        waiting, *_ = scripts.keys_of(queue)
        (answer,) = await self._execute(("ZRANGE", waiting, 0, limit - 1, "WITHSCORES"))
        return await self._shown(queue, dict(zip(answer[::2], answer[1::2], strict=True)))

    async def places(self, queue: str, task_ids: Collection[str]) -> dict[str, int]:
        """See ``TaskBroker``."""
        waiting, *_ = scripts.keys_of(queue)
        found = await self._of_each("ZRANK", waiting, [it.encode() for it in task_ids])
        return {it.decode(): 1 + rank for it, rank in found.items() if rank is not None}

    async def by_priority(self, queue: str) -> list[PriorityGroup]:
        """See ``TaskBroker``."""
        waiting, *_ = scripts.keys_of(queue)
        counts: list[int] = []
        places: dict[bytes, bytes] = {}
        ranges = [scripts.places_of(it) for it in range(MAX_PRIORITY, MIN_PRIORITY - 1, -1)]
        first = ("WITHSCORES", "LIMIT", 0, 1)
        replies = await self._execute(
            *(("ZCOUNT", waiting, *ends) for ends in ranges),
            *(("ZRANGEBYSCORE", waiting, *ends, *first) for ends in ranges),
        )
        for count, found in zip(replies[: len(ranges)], replies[len(ranges) :], strict=True):
            if count and found:  # a worker may have taken the last one in between
                counts.append(int(count))
                places[found[0]] = found[1]
        firsts = await self._shown(queue, places)
        return [PriorityGroup(*group) for group in zip(counts, firsts, strict=True)]

    async def product(self) -> str:
        """See ``TaskBroker``."""
        (answer,) = await self._execute(("INFO", "server"))
        return product_of(answer)

    async def _shown(self, queue: str, places: Mapping[bytes, Any]) -> list[WaitingTask]:
        """Tasks with their messages.

        Args:
            places: of each, by its id.
        """
        payloads = scripts.keys_of(queue)[1]
        lengths = await self._of_each("HSTRLEN", payloads, list(places))
        short = [task_id for task_id, length in lengths.items() if length <= MAX_PEEK_BYTES]
        data = await self._of_each("HGET", payloads, short)
        return [
            WaitingTask(
                task_id.decode(), scripts.priority_at(float(place)), data.get(task_id) or b""
            )
            for task_id, place in places.items()
        ]

    async def _of_each(self, command: str, key: str, fields: Sequence[bytes]) -> dict[bytes, Any]:
        """What a command says of each of some fields."""
        if not fields:
            return {}
        replies = await self._execute(*((command, key, field) for field in fields))
        return dict(zip(fields, replies, strict=True))

    async def leave_note(self, run_id: str, note: bytes) -> None:
        """See ``TaskBroker``."""
        await self._execute(("SET", self._notes_of(run_id), note, "EX", NOTE_EXPIRES_SECONDS))

    async def take_note(self, run_id: str) -> bytes | None:
        """See ``TaskBroker``."""
        (note,) = await self._execute(("GET", self._notes_of(run_id)))
        return None if note is None else bytes(note)

    def _notes_of(self, run_id: str) -> str:
        return f"{self.options.key_prefix}.notes.{run_id}"

    def listener(self) -> Listener:
        """See ``TaskBroker``."""
        return _RedisListener(self)

    async def take(self, queues: Sequence[str]) -> tuple[str, Delivery] | None:
        """The best task of the first of the queues that has one, and that queue.

        A reply that is lost leaves its task in hand until ``in_hand_seconds`` have passed. That is
        why this is not repeated, which would leave it there as well and take another one.
        """
        keys = [key for queue in queues for key in scripts.keys_of(queue)]
        microseconds = round(self.in_hand_seconds * 1_000_000)
        (taken,) = await self._execute(scripts.TAKE(keys, microseconds), is_repeatable=False)
        if not taken:
            return None
        number, task_id, payload, token = taken
        return queues[number], self._delivery(queues[number], task_id, payload, token)

    async def wait_for_bell(self, queues: Sequence[str]) -> str | None:
        """The queue whose bell rang, or None after ``SLOW_LOOK_SECONDS``."""
        bells: dict[bytes | str, str] = {
            scripts.keys_of(queue)[-1].encode(): queue for queue in queues
        }
        # on its own, since a cancelled call closes its connection, which frees the server's side
        with server_errors(self.address):
            rung = await self._redis.blpop(list(bells), timeout=SLOW_LOOK_SECONDS)
        return bells[rung[0]] if rung else None

    async def ring(self, queue: str) -> None:
        """Have the bell of a queue ring where tasks wait; a ring may have been taken in vain."""
        await self._execute(scripts.WITHDRAW(scripts.keys_of(queue)))

    def _delivery(self, queue: str, task_id: bytes, payload: bytes, token: bytes) -> Delivery:
        held = Held(queue, task_id, token)
        self._in_hand.add(held)

        async def ack() -> None:
            self._in_hand.discard(held)  # whatever comes of it: who acks has claimed the task
            await self._execute(scripts.ACK(scripts.keys_of(queue), task_id))

        async def release() -> None:
            self._in_hand.discard(held)
            async with self._in_hand.tokens_change:
                await self._execute(scripts.RELEASE(scripts.keys_of(queue), task_id, held.token))

        return Delivery(data=payload, ack=ack, release=release)

    async def _hold(self, queue: str, held: Sequence[Held]) -> Sequence[bytes]:
        microseconds = round(self.in_hand_seconds * 1_000_000)
        words = [word for it in held for word in (it.task_id, it.token)]
        (tokens,) = await self._execute(scripts.HOLD(scripts.keys_of(queue), microseconds, *words))
        return list(tokens)

    async def _ids(self, command: Command, *, is_repeatable: bool = True) -> set[str]:
        (ids,) = await self._execute(command, is_repeatable=is_repeatable)
        return {task_id.decode() for task_id in ids}

    async def _execute(self, *commands: Command, is_repeatable: bool = True) -> list[Any]:
        """Run commands in one round trip; where every error of the server becomes one of ours.

        Args:
            commands: each a list of words.
            is_repeatable: whether to try again when the connection broke, not knowing whether the
                server has got them.

        Raises:
            UnreachableServerError: no answer within the connect timeout.
            RefusedByServerError: one of the commands was refused.
        """
        with server_errors(self.address):
            try:
                return await asyncio.wait_for(
                    self._call(commands, is_repeatable), self._timeout_seconds
                )
            except asyncio.TimeoutError as error:
                message = f"{self.address} did not answer within {self._timeout_seconds:g} s."
                raise UnreachableServerError(self.address, message) from error

    async def _call(self, commands: Sequence[Command], is_repeatable: bool) -> list[Any]:
        try:
            return await call(self._redis, commands)
        except ReadOnlyError:
            # after a failover: the address may lead to the new primary, old connections do not
            await self.connection_pool.disconnect(inuse_connections=False)
            raise
        except AuthenticationError:  # a kind of the next one in redis-py
            raise
        except RedisConnectionError:
            if not is_repeatable:
                raise
            # what answers now may be another life of the server, without our scripts
            return await self._call(commands, is_repeatable=False)


class _RedisListener(Listener):
    """Looks at its queues in turn; after a ring first at the queue that rang.

    If it looked elsewhere first and found a task there, nobody would be awake for the one that
    rang.
    """

    def __init__(self, broker: RedisTaskBroker) -> None:
        self._broker = broker
        self._queues = list(broker.queues)
        self._rung: str | None = None

    async def look(self) -> Delivery | None:
        self._rung = None
        taken = await self._broker.take(self._queues)
        if taken is None:
            return None
        queue, delivery = taken
        self._begin_with(queue)
        self._queues.append(self._queues.pop(0))  # it is the others' turn
        return delivery

    async def wait(self) -> None:
        queue = await self._broker.wait_for_bell(self._queues)
        if queue is not None:
            self._rung = queue
            self._begin_with(queue)

    async def turn_to(self, queues: Sequence[str]) -> None:
        rung, self._rung = self._rung, None
        self._queues = list(queues)
        if rung is not None:
            await self._broker.ring(rung)  # for another worker: we do not look there any more

    def _begin_with(self, queue: str) -> None:
        first = self._queues.index(queue)
        self._queues = self._queues[first:] + self._queues[:first]
