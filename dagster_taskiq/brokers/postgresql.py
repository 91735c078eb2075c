"""The broker on PostgreSQL.

Its tables are in the schema of the deployment, beside the backend's where both are one server, and
each method is one call of one function there (``postgresql_functions.sql``).

Nothing wakes an idle listener: it looks. A NOTIFY would hold a lock of the whole cluster through
the commit of every message that is sent, and wake every session of the database that listens.
Listeners with the same queues know how many they are and share out the looks; one that has just
taken a message looks sooner, since where one was there are often more.
"""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections.abc import Collection, Sequence
from typing import Any

from dagster_taskiq._taskiq import BrokerMessage
from dagster_taskiq.aio.loop_thread import end_tasks
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
from dagster_taskiq.brokers.postgresql_floors import Floors, Row
from dagster_taskiq.defaults import IN_HAND_SECONDS, MAX_PRIORITY
from dagster_taskiq.errors import ServerError
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq.servers.postgresql_client import Connections, server_errors
from dagster_taskiq.servers.postgresql_pool import Connection
from dagster_taskiq.servers.postgresql_schema import FUNCTION_SETS, Part, Schema, read_sql

logger = logging.getLogger(__name__)

#: After how many acks a worker has the queue vacuumed. Autovacuum looks once a minute, and until
#: then each look walks over what is gone.
_VACUUM_ACKS = 5000

#: How often the idle listeners of the same queues look, all together and each by itself.
_LOOKS_PER_SECOND = 50.0
_LOOK_SECONDS = 0.05

#: The first pause of a listener that has taken something; each one after it is twice as long.
_FIRST_LOOK_SECONDS = 0.005

#: The longest pause, of one of very many listeners.
_LONGEST_LOOK_SECONDS = 5.0

#: How often an idle listener says that it is there, and after which silence it counts no more.
_COUNT_SECONDS = 10.0
_LISTENER_EXPIRES_SECONDS = 25.0

#: The farthest place in a queue that is counted.
_MOST_BEFORE = 10_000

_FRAGMENTS = {
    "give_back": """\
    v_rows := ARRAY(SELECT ctid FROM {s}.messages WHERE holder IS NOT NULL AND held_until <= v_now
      ORDER BY held_until LIMIT 100 FOR UPDATE SKIP LOCKED);
    IF cardinality(v_rows) > 0 THEN
      UPDATE {s}.messages SET holder = NULL, held_until = NULL WHERE ctid = ANY (v_rows);
    END IF;""",
    "highest": str(MAX_PRIORITY),
}

PART = Part(
    version_table="broker_version",
    enter="enter_broker",
    migrations=(
        read_sql(str(__package__), "tables"),
        FUNCTION_SETS,
        read_sql(str(__package__), "notes"),
    ),
    oldest=1,
    functions=read_sql(str(__package__), "functions", _FRAGMENTS),
)


class PostgresqlTaskBroker(TaskBroker):
    """Queues with priority, withdrawal and safe recovery on PostgreSQL; see ``TaskBroker``.

    Args:
        options: how to reach the server.
        queues: the physical queues to listen on; none for a sender.
        admission: decides which messages are handed on; None for all.

    Raises:
        ConfigError: libpq cannot read the URL.
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
        super().__init__()
        self.address = options.address
        self.queues = tuple(queues)
        self.admission = admission
        #: Set when the broker is shut down, so that no listener sleeps on.
        self.closing = asyncio.Event()
        self._schema = Schema(options.key_prefix, PART)
        self._connections = Connections(options, self._greet, is_listener=bool(queues))
        self._floors = Floors(self._find_floors)
        self._in_hand = InHand(self._hold, self.hold_every_seconds)
        self._acks = 0
        self._vacuuming: asyncio.Task[None] | None = None

    async def startup(self) -> None:
        """Reach the server and find the tables there, or make them."""
        await self._call("enter_broker")
        self._is_shut_down = False
        self.closing.clear()
        await super().startup()

    async def shutdown(self) -> None:
        """Close the connections; what is in hand goes back after ``in_hand_seconds``."""
        await self._in_hand.close()
        await super().shutdown()
        self.closing.set()
        if self._vacuuming is not None:
            await end_tasks([self._vacuuming])
        self._connections.close()

    async def kick(self, message: BrokerMessage) -> None:
        """Send one message; see ``TaskBroker``."""
        await self.kick_many([message])

    async def kick_many(self, messages: Sequence[BrokerMessage]) -> None:
        """Send several messages; a task that is waiting or in hand already is left alone."""
        for batch in batches(messages):
            await self._call(
                "send",
                [queue_of(message) for message in batch],
                [message.task_id for message in batch],
                [priority_of(message) for message in batch],
                [message.message for message in batch],
            )

    async def withdraw(self, queue: str, task_ids: Collection[str]) -> set[str]:
        """Take waiting tasks out; exact. See ``TaskBroker``."""
        # not repeated: a second try would not know what the first has withdrawn
        rows = await self._call("withdraw", queue, list(task_ids), is_repeatable=False)
        return {task_id for (task_id,) in rows}

    async def absent(self, queue: str, task_ids: Collection[str]) -> set[str]:
        """Which tasks are neither waiting nor in hand; exact. See ``TaskBroker``."""
        return {task_id for (task_id,) in await self._call("absent", queue, list(task_ids))}

    async def depth(self, queue: str) -> int:
        """How many tasks wait in a queue."""
        ((count,),) = await self._call("depth", queue)
        return int(count)

    async def queues_with_tasks(self) -> set[str]:
        """See ``TaskBroker``."""
        return {name for (name,) in await self._call("list_queues")}

    async def peek(self, queue: str, limit: int) -> list[WaitingTask]:
        """See ``TaskBroker``."""
        rows = await self._call("peek", queue, limit, MAX_PEEK_BYTES)
        return [WaitingTask(task_id, priority, data) for task_id, priority, data in rows]

    async def places(self, queue: str, task_ids: Collection[str]) -> dict[str, int]:
        """See ``TaskBroker``; one behind more than ``_MOST_BEFORE`` tasks has no place."""
        return dict(await self._call("places", queue, list(task_ids), _MOST_BEFORE))

    async def by_priority(self, queue: str) -> list[PriorityGroup]:
        """See ``TaskBroker``."""
        rows = await self._call("by_priority", queue, MAX_PEEK_BYTES)
        return [PriorityGroup(count, WaitingTask(*first)) for count, *first in rows]

    async def product(self) -> str:
        """See ``TaskBroker``."""
        with server_errors(self.address):
            return await self._connections.product()

    async def leave_note(self, run_id: str, note: bytes) -> None:
        """See ``TaskBroker``."""
        await self._call("leave_note", run_id, note, float(NOTE_EXPIRES_SECONDS))

    async def take_note(self, run_id: str) -> bytes | None:
        """See ``TaskBroker``."""
        ((note,),) = await self._call("take_note", run_id)
        return None if note is None else bytes(note)

    def listener(self) -> Listener:
        """See ``TaskBroker``."""
        return _PostgresqlListener(self)

    # --- for the listener ---

    async def take(self, queues: Sequence[str]) -> tuple[str, Delivery] | None:
        """The best task of the first of the queues that has one, and that queue.

        An answer that is lost leaves its task in hand until ``in_hand_seconds`` have passed.
        """
        floors = await self._floors.of(queues)
        values = (list(queues), float(self.in_hand_seconds), floors)
        ((number, task_id, payload, holder, seconds),) = await self._call("take", *values)
        if floors is None:
            self._floors.looked(seconds)
        if not number:
            return None
        queue = queues[number - 1]
        return queue, self._delivery(queue, task_id, payload, holder)

    async def count_listeners(self, listener: uuid.UUID) -> int:
        """How many listeners there are of the broker's queues, with this one."""
        queues = "\n".join(sorted(self.queues))
        values = (listener, queues, _LISTENER_EXPIRES_SECONDS)
        ((count,),) = await self._call("count_listeners", *values)
        return int(count)

    def _delivery(self, queue: str, task_id: str, payload: bytes, holder: uuid.UUID) -> Delivery:
        held = Held(queue, task_id, holder)
        self._in_hand.add(held)

        async def ack() -> None:
            self._in_hand.discard(held)  # whatever comes of it: who acks has claimed the task
            await self._call("ack", queue, task_id)
            self._acks += 1
            if self._acks % _VACUUM_ACKS == 0:
                self._vacuuming = asyncio.create_task(self._vacuum(), name="vacuum")

        async def release() -> None:
            self._in_hand.discard(held)
            await self._call("release", queue, task_id, holder)
            self._floors.doubt()

        return Delivery(data=payload, ack=ack, release=release)

    async def _hold(self, queue: str, held: Sequence[Held]) -> Sequence[uuid.UUID]:
        holders = [it.token for it in held]
        values = (queue, [it.task_id for it in held], holders, float(self.in_hand_seconds))
        await self._call("hold", *values, is_urgent=True)
        return holders

    async def _find_floors(
        self, queues: Sequence[str], floors: Sequence[Row] | None
    ) -> tuple[Sequence[Row], float]:
        ((found, seconds),) = await self._call("floors", list(queues), floors)
        return found, seconds

    async def _vacuum(self) -> None:
        statement = f"VACUUM (SKIP_LOCKED, TRUNCATE off) {self._schema.table('messages')}"
        try:
            with server_errors(self.address):
                # a user who does not own the table is only warned
                await self._connections.call(statement, is_urgent=True)
        except ServerError as error:
            # autovacuum will, later
            logger.debug("The queue at %s was not vacuumed: %s", self.address, error)

    # --- calls ---

    async def _call(
        self, function: str, *values: Any, is_urgent: bool = False, is_repeatable: bool = True
    ) -> list[tuple[Any, ...]]:
        """One function of the schema; every error of the server becomes one of ours."""
        statement = self._schema.statement(function, len(values))
        with server_errors(self.address):
            return await self._connections.call(
                statement, values, is_urgent=is_urgent, is_repeatable=is_repeatable
            )

    async def _greet(self, connection: Connection) -> None:
        await self._schema.greet(connection, self.address)


class _PostgresqlListener(Listener):
    """Looks at its queues in turn, the less often the more listeners there are."""

    def __init__(self, broker: PostgresqlTaskBroker) -> None:
        self._broker = broker
        self._queues = list(broker.queues)
        self._id = uuid.uuid4()
        self._share_seconds = _LOOK_SECONDS
        self._pause_seconds = _LOOK_SECONDS
        self._counts_at = 0.0

    async def look(self) -> Delivery | None:
        taken = await self._broker.take(self._queues)
        if taken is None:
            return None
        queue, delivery = taken
        self._pause_seconds = _FIRST_LOOK_SECONDS
        after = self._queues.index(queue) + 1  # it is the others' turn
        self._queues = self._queues[after:] + self._queues[:after]
        return delivery

    async def wait(self) -> None:
        loop = asyncio.get_running_loop()
        if loop.time() >= self._counts_at:
            self._counts_at = loop.time() + _COUNT_SECONDS
            share = await self._broker.count_listeners(self._id) / _LOOKS_PER_SECOND
            self._share_seconds = min(max(_LOOK_SECONDS, share), _LONGEST_LOOK_SECONDS)
        pause = min(self._pause_seconds, self._share_seconds)
        self._pause_seconds = 2 * pause
        try:
            await asyncio.wait_for(self._broker.closing.wait(), pause * random.uniform(0.5, 1.5))
        except asyncio.TimeoutError:
            pass

    async def turn_to(self, queues: Sequence[str]) -> None:
        self._queues = list(queues)
        self._pause_seconds = _FIRST_LOOK_SECONDS
        self._counts_at = 0.0
