"""The broker on Redis or Valkey.

A physical queue has these keys, and none of them while it is empty:

``<queue>:waiting``
    sorted set of the waiting task ids; the score is the task's place in the queue, made of its
    priority and of the number under which it was sent.
``<queue>:payloads``
    hash of the messages of waiting tasks and of those in hand.
``<queue>:in-hand``
    sorted set of the ids that a worker has taken and not settled; the score is the time (that of
    the server, in microseconds) at which its worker is held to be dead. A living one puts it off.
``<queue>:places``
    hash of the places that the tasks in hand go back to.
``<queue>:bell``
    list that idle workers block on. It has an element, without meaning of its own, for each
    waiting task up to ``BELL_LIMIT``, and at least one while a task waits.

``<key prefix>.sequence`` counts the tasks ever sent. No suffix ends in another one, so that no
name of a queue can make two queues share a key.

The bell is a hint: a worker always looks before it waits, and looks again after
``SLOW_LOOK_SECONDS``. N tasks sent at once ring N times, which wakes N idle workers. A worker that
takes a task while others wait leaves the bell ringing, so that a ring which a worker took with it
into its grave does not keep the others asleep.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Collection, Sequence
from typing import Any, TypeAlias

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoScriptError, ReadOnlyError
from redis.exceptions import ConnectionError as RedisConnectionError
from taskiq import BrokerMessage
from taskiq_redis.redis_broker import BaseRedisBroker

from dagster_taskiq.brokers.base import (
    Admission,
    Delivery,
    Listener,
    TaskBroker,
    batches,
    priority_of,
    queue_of,
)
from dagster_taskiq.brokers.in_hand import Held, InHand
from dagster_taskiq.defaults import IN_HAND_SECONDS, MAX_PRIORITY
from dagster_taskiq.errors import ConfigError, UnreachableServerError
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq.servers.redis_client import connection_arguments, server_errors, use_tls
from dagster_taskiq.servers.redis_rights import check_rights, commands_of

#: How long an idle worker waits for the bell before it looks into its queues all the same.
SLOW_LOOK_SECONDS = 5.0

#: How many rings a bell holds. More idle workers than that are woken by one another.
BELL_LIMIT = 1000

#: Connections of one broker: one for each waiting listener and each call under way.
_CONNECTIONS = 50

#: One command with its arguments, as redis-py's ``execute_command`` takes it.
_Command: TypeAlias = Sequence[Any]


# A server that is full, read-only or cannot write its file refuses the first write of a script or
# none, so no script stops halfway. A script that frees memory begins with a command that a full
# server allows.
#
# A place is exact in a double: (10 - priority) * 2^48 + the number, which stays below 2^52.
_PRELUDE = f"""
local function queue_at(first)
  return {{waiting = KEYS[first], payloads = KEYS[first + 1], in_hand = KEYS[first + 2],
           places = KEYS[first + 3], bell = KEYS[first + 4]}}
end

local function has_place(queue, id)
  return redis.call('ZSCORE', queue.waiting, id) or redis.call('ZSCORE', queue.in_hand, id)
end

-- Ring as often as said, and keep the bell in step with what waits. Blocked workers are served
-- when the script has ended, so what they find is what this leaves.
local function ring(queue, times)
  local depth = redis.call('ZCARD', queue.waiting)
  if depth == 0 then
    redis.call('DEL', queue.bell)
    return
  end
  local limit = math.min(depth, {BELL_LIMIT})
  for _ = 1, math.min(times, limit) do
    redis.call('RPUSH', queue.bell, '')
  end
  redis.call('LTRIM', queue.bell, 0, limit - 1)
  if redis.call('LLEN', queue.bell) == 0 then
    redis.call('RPUSH', queue.bell, '')
  end
end

-- From a worker's hands to where the task was taken from.
local function give_back(queue, id)
  local place = redis.call('HGET', queue.places, id)
  redis.call('ZREM', queue.in_hand, id)
  redis.call('HDEL', queue.places, id)
  if place then
    redis.call('ZADD', queue.waiting, place, id)
  end
end
"""


class _Script:
    """A Lua script, called by its digest. A queue's keys come in the order of ``_keys_of``."""

    def __init__(self, body: str) -> None:
        self.text = _PRELUDE + body
        self.digest = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()

    def __call__(self, keys: Sequence[str], *arguments: str | bytes | int) -> _Command:
        return ("EVALSHA", self.digest, len(keys), *keys, *arguments)


# KEYS: the queue, the sequence. ARGV: id, priority and payload of each task.
# A task that waits or is in hand already stays where it is: the sender was not sure.
_SEND = _Script(f"""
local queue, sent = queue_at(1), 0
for i = 1, #ARGV, 3 do
  local id, priority, payload = ARGV[i], tonumber(ARGV[i + 1]), ARGV[i + 2]
  redis.call('HSETNX', queue.payloads, id, payload)
  if not has_place(queue, id) then
    local place = ({MAX_PRIORITY} - priority) * 2^48 + redis.call('INCR', KEYS[6])
    redis.call('ZADD', queue.waiting, string.format('%.0f', place), id)
    sent = sent + 1
  end
end
ring(queue, sent)
""")

# KEYS: the queues, in the order to look at them. ARGV: microseconds that a task may be in hand.
# Returns which queue had one (from 0), the task's id, its payload, and the token of this delivery.
# Before it looks, it gives back what dead workers of the queue had in hand.
_TAKE = _Script("""
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
for first = 1, #KEYS, 5 do
  local queue = queue_at(first)
  local dead = redis.call('ZRANGEBYSCORE', queue.in_hand, '-inf', now, 'LIMIT', 0, 100)
  for _, id in ipairs(dead) do
    give_back(queue, id)
  end
  local best = redis.call('ZPOPMIN', queue.waiting)
  while best[1] do
    local id, place = best[1], best[2]
    local payload = redis.call('HGET', queue.payloads, id)
    if payload then
      local token = string.format('%.0f', now + ARGV[1])
      redis.call('ZADD', queue.in_hand, token, id)
      redis.call('HSET', queue.places, id, place)
      ring(queue, #dead)
      return {(first - 1) / 5, id, payload, token}
    end
    -- only a server that evicts keys loses a payload; the sender sees the task as absent
    best = redis.call('ZPOPMIN', queue.waiting)
  end
  ring(queue, 0)
end
return false
""")

# KEYS: the queue. ARGV: microseconds that a task may be in hand, then the id and the token of each
# delivery. Returns the deliveries' new tokens, empty for a task that is in other hands by now.
_HOLD = _Script("""
local queue, tokens = queue_at(1), {}
local time = redis.call('TIME')
local token = string.format('%.0f', time[1] * 1000000 + time[2] + ARGV[1])
for i = 2, #ARGV, 2 do
  local known = redis.call('ZSCORE', queue.in_hand, ARGV[i])
  local is_held = known and tonumber(known) == tonumber(ARGV[i + 1])
  if is_held then
    redis.call('ZADD', queue.in_hand, token, ARGV[i])
  end
  table.insert(tokens, is_held and token or '')
end
return tokens
""")

# KEYS: the queue. ARGV: the id. Wherever it is: a worker that was slow to ack has claimed the task,
# so a copy that went back to its queue meanwhile is of no use to anybody.
_ACK = _Script("""
local queue, id = queue_at(1), ARGV[1]
redis.call('ZREM', queue.in_hand, id)
redis.call('HDEL', queue.places, id)
redis.call('HDEL', queue.payloads, id)
if redis.call('ZREM', queue.waiting, id) == 1 then
  ring(queue, 0)
end
""")

# KEYS: the queue. ARGV: the id, the token of the delivery.
# Another token means that the task is in another worker's hands by now.
_RELEASE = _Script("""
local queue, id = queue_at(1), ARGV[1]
local token = redis.call('ZSCORE', queue.in_hand, id)
if token and tonumber(token) == tonumber(ARGV[2]) then
  give_back(queue, id)
  ring(queue, 1)
end
""")

# KEYS: the queue. ARGV: the ids. Returns those that waited.
_WITHDRAW = _Script("""
local queue, withdrawn = queue_at(1), {}
for _, id in ipairs(ARGV) do
  if redis.call('ZREM', queue.waiting, id) == 1 then
    redis.call('HDEL', queue.payloads, id)
    table.insert(withdrawn, id)
  end
end
ring(queue, 0)
return withdrawn
""")

# KEYS: the queue. ARGV: the ids. Returns those that a worker can no longer get.
_ABSENT = _Script("""
local queue, absent = queue_at(1), {}
for _, id in ipairs(ARGV) do
  if not has_place(queue, id) or redis.call('HEXISTS', queue.payloads, id) == 0 then
    table.insert(absent, id)
  end
end
return absent
""")

_SCRIPTS = (_SEND, _TAKE, _HOLD, _ACK, _RELEASE, _WITHDRAW, _ABSENT)

#: The rights that the user of the server needs.
_COMMANDS = commands_of(script.text for script in _SCRIPTS) | {"BLPOP", "EVALSHA", "SCRIPT"}


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
        await self._execute(("PING",), *_loads())
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
                *(_SEND([*_keys_of(queue), *keys], *tasks) for queue, tasks in queues.items())
            )

    async def withdraw(self, queue: str, task_ids: Collection[str]) -> set[str]:
        """Take waiting tasks out; exact. See ``TaskBroker``."""
        # not repeated: a second try would not know what the first has withdrawn
        return await self._ids(_WITHDRAW(_keys_of(queue), *task_ids), is_repeatable=False)

    async def absent(self, queue: str, task_ids: Collection[str]) -> set[str]:
        """Which tasks are neither waiting nor in hand; exact. See ``TaskBroker``."""
        return await self._ids(_ABSENT(_keys_of(queue), *task_ids))

    async def depth(self, queue: str) -> int:
        """How many tasks wait in a queue."""
        (count,) = await self._execute(("ZCARD", _keys_of(queue)[0]))
        return int(count)

    def listener(self) -> Listener:
        """See ``TaskBroker``."""
        return _RedisListener(self)

    async def take(self, queues: Sequence[str]) -> tuple[str, Delivery] | None:
        """The best task of the first of the queues that has one, and that queue.

        A reply that is lost leaves its task in hand until ``in_hand_seconds`` have passed. That is
        why this is not repeated, which would leave it there as well and take another one.
        """
        keys = [key for queue in queues for key in _keys_of(queue)]
        microseconds = round(self.in_hand_seconds * 1_000_000)
        (taken,) = await self._execute(_TAKE(keys, microseconds), is_repeatable=False)
        if not taken:
            return None
        number, task_id, payload, token = taken
        return queues[number], self._delivery(queues[number], task_id, payload, token)

    async def wait_for_bell(self, queues: Sequence[str]) -> str | None:
        """The queue whose bell rang, or None after ``SLOW_LOOK_SECONDS``."""
        bells: dict[bytes | str, str] = {_keys_of(queue)[-1].encode(): queue for queue in queues}
        # on its own, since a cancelled call closes its connection, which frees the server's side
        with server_errors(self.address):
            rung = await self._redis.blpop(list(bells), timeout=SLOW_LOOK_SECONDS)
        return bells[rung[0]] if rung else None

    def _delivery(self, queue: str, task_id: bytes, payload: bytes, token: bytes) -> Delivery:
        held = Held(queue, task_id, token)
        self._in_hand.add(held)

        async def ack() -> None:
            self._in_hand.discard(held)  # whatever comes of it: who acks has claimed the task
            await self._execute(_ACK(_keys_of(queue), task_id))

        async def release() -> None:
            self._in_hand.discard(held)
            async with self._in_hand.tokens_change:
                await self._execute(_RELEASE(_keys_of(queue), task_id, held.token))

        return Delivery(data=payload, ack=ack, release=release)

    async def _hold(self, queue: str, held: Sequence[Held]) -> Sequence[bytes]:
        microseconds = round(self.in_hand_seconds * 1_000_000)
        words = [word for it in held for word in (it.task_id, it.token)]
        (tokens,) = await self._execute(_HOLD(_keys_of(queue), microseconds, *words))
        return list(tokens)

    async def _ids(self, command: _Command, *, is_repeatable: bool = True) -> set[str]:
        (ids,) = await self._execute(command, is_repeatable=is_repeatable)
        return {task_id.decode() for task_id in ids}

    async def _execute(self, *commands: _Command, is_repeatable: bool = True) -> list[Any]:
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
                    self._round_trip(commands, is_repeatable), self._timeout_seconds
                )
            except asyncio.TimeoutError as error:
                message = f"{self.address} did not answer within {self._timeout_seconds:g} s."
                raise UnreachableServerError(self.address, message) from error

    async def _round_trip(self, commands: Sequence[_Command], is_repeatable: bool) -> list[Any]:
        try:
            return await self._pipeline(commands)
        except NoScriptError:
            # the server has been restarted or its scripts flushed, and has run none of these
            return (await self._pipeline([*_loads(), *commands]))[len(_SCRIPTS) :]
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
            return await self._round_trip(commands, is_repeatable=False)

    async def _pipeline(self, commands: Sequence[_Command]) -> list[Any]:
        pipeline = self._redis.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        # not raise_on_error, which would put the command with its payload into the message
        replies: list[Any] = await pipeline.execute(raise_on_error=False)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies


class _RedisListener(Listener):
    """Looks at its queues in turn; after a ring first at the queue that rang.

    If it looked elsewhere first and found a task there, nobody would be awake for the one that
    rang.
    """

    def __init__(self, broker: RedisTaskBroker) -> None:
        self._broker = broker
        self._queues = list(broker.queues)

    async def look(self) -> Delivery | None:
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
            self._begin_with(queue)

    def _begin_with(self, queue: str) -> None:
        first = self._queues.index(queue)
        self._queues = self._queues[first:] + self._queues[:first]


def _keys_of(queue: str) -> tuple[str, ...]:
    return tuple(f"{queue}:{part}" for part in ("waiting", "payloads", "in-hand", "places", "bell"))


def _loads() -> list[_Command]:
    return [("SCRIPT LOAD", script.text) for script in _SCRIPTS]
