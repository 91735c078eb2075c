"""The broker on RabbitMQ.

Classic durable queues with ten priorities, read by pull: a listener that is asked for a message
gets one from its queues in turn. Only where all of them are empty does it consume, with a
prefetch of one, and stops at the first message, giving back what else came. A consumer that went
on would hoard, since our acks, sent at the claim, free its prefetch while the task still runs.

The connection is our own affair and not aio-pika's "robust" one, which would restore consumers
that we have meant to be gone. A lost connection is opened anew by the next call that needs it.
The messages that it had delivered are then RabbitMQ's again: an ``ack`` raises, since the message
will come once more, and a ``release`` has nothing left to do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from aio_pika.abc import (
    AbstractChannel,
    AbstractIncomingMessage,
    AbstractQueue,
)
from aio_pika.exceptions import CONNECTION_EXCEPTIONS
from aiormq import exceptions
from taskiq_aio_pika import AioPikaBroker

from dagster_taskiq._taskiq import AsyncBroker, BrokerMessage
from dagster_taskiq.brokers.amqp_connection import AmqpConnection, connect
from dagster_taskiq.brokers.amqp_errors import amqp_errors
from dagster_taskiq.brokers.amqp_properties import UNREADABLE
from dagster_taskiq.brokers.base import (
    Admission,
    Delivery,
    Listener,
    TaskBroker,
)
from dagster_taskiq.brokers.outgoing import batches
from dagster_taskiq.errors import ServerError, UnreachableServerError
from dagster_taskiq.servers.kinds import ServerOptions

#: How long an idle listener consumes before it looks into its queues all the same: a queue may
#: have been deleted and made anew, or the connection be dead without a word.
SLOW_LOOK_SECONDS = 10.0

#: How many messages may be on their way to RabbitMQ unconfirmed.
_UNCONFIRMED = 500

_T = TypeVar("_T")


class AmqpTaskBroker(TaskBroker, AioPikaBroker):
    """Queues with priority on RabbitMQ; see ``TaskBroker``.

    RabbitMQ cannot look into a queue: ``withdraw`` takes nothing out, and ``absent`` knows only
    empty queues. A task may come twice, which its claim is there for: it is sent again when the
    confirmation was lost, and RabbitMQ does not confirm an ``ack`` at all, so one on a connection
    that is just breaking returns and is lost.

    Args:
        options: how to reach the server.
        queues: the physical queues to listen on; none for a sender.
        admission: decides which messages are handed on; None for all.

    Raises:
        ConfigError: the URL cannot be read.
    """

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
        super().__init__(options.client_url)
        self._timeout_seconds = options.connect_timeout_seconds
        self._current: AmqpConnection | None = None
        self._connecting = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()

    async def startup(self) -> None:
        """Reach the server, and make the queues to listen on.

        Raises:
            ServerError: it is away or refuses; raised within the connect timeout.
            ConfigError: a TLS file cannot be loaded.
        """

        async def declare(connection: AmqpConnection) -> None:
            for queue in self.queues:
                await connection.declare(queue)

        await self.run(declare)
        self._is_shut_down = False
        # not super(), which would make exchanges and a queue for dead letters
        await AsyncBroker.startup(self)

    async def shutdown(self) -> None:
        """Close the connection; RabbitMQ takes back what was not settled."""
        await super().shutdown()
        self._drop(self._current)
        if self._closing:
            await asyncio.wait(self._closing, timeout=self._timeout_seconds)

    async def kick(self, message: BrokerMessage) -> None:
        """Send one message; see ``TaskBroker``."""
        await self.kick_many([message])

    async def kick_many(self, messages: Sequence[BrokerMessage]) -> None:
        """Send several messages; returns when RabbitMQ has confirmed them."""
        for batch in batches(messages):
            for first in range(0, len(batch), _UNCONFIRMED):
                await self._send(batch[first : first + _UNCONFIRMED])

    async def _send(self, messages: Sequence[BrokerMessage]) -> None:
        await self.run(lambda connection: connection.publish(messages))

    async def withdraw(self, queue: str, task_ids: Collection[str]) -> set[str]:
        """Do nothing: RabbitMQ cannot take a message out of the middle of a queue."""
        return set()

    async def absent(self, queue: str, task_ids: Collection[str]) -> set[str]:
        """All the tasks where none waits in the queue, otherwise none; see ``TaskBroker``."""
        return set() if await self.depth(queue) else set(task_ids)

    async def depth(self, queue: str) -> int:
        """How many tasks wait in a queue; 0 for one that does not exist."""
        return await self.run(lambda connection: connection.depth(queue))

    async def product(self) -> str:
        """See ``TaskBroker``."""

        async def ask(connection: AmqpConnection) -> str:
            return connection.product

        return await self.run(ask)

    async def leave_note(self, run_id: str, note: bytes) -> None:
        """See ``TaskBroker``: a note for which nobody has asked is gone."""
        queue = self._notes_of(run_id)
        await self.run(lambda connection: connection.leave(queue, note))

    async def take_note(self, run_id: str) -> bytes | None:
        """See ``TaskBroker``."""
        queue = self._notes_of(run_id)
        return await self.run(lambda connection: connection.take_left(queue))

    def _notes_of(self, run_id: str) -> str:
        return f"{self.options.key_prefix}.notes.{run_id}"

    def listener(self) -> Listener:
        """See ``TaskBroker``."""
        return _AmqpListener(self)

    async def run(self, action: Callable[[AmqpConnection], Awaitable[_T]]) -> _T:
        """Do something with a live connection, again with a new one where it turns out dead.

        Every call to the server goes through here or ``guard``.

        Raises:
            UnreachableServerError: it was not done within the connect timeout.
            RefusedByServerError: the server refused.
        """

        async def attempts() -> _T:
            connection = await self._connection()
            try:
                return await action(connection)
            except (exceptions.AMQPChannelError, exceptions.DeliveryError):
                raise  # the server's answer
            except CONNECTION_EXCEPTIONS:
                return await action(await self._connection())

        return await self.guard(attempts())

    async def guard(self, operation: Awaitable[_T]) -> _T:
        """Wait for an operation for a limited time; where aio-pika's errors become ours.

        It is not cancelled when the caller is: a call that is cancelled halfway closes its
        channel, and with it all that this channel has delivered.
        """
        task = asyncio.ensure_future(operation)
        task.add_done_callback(_retrieve)
        # not wait_for, which would wait for the end of what it cancels
        await asyncio.wait({task}, timeout=self._timeout_seconds)
        if not task.done():
            task.cancel()
            self._drop(self._current)
            raise UnreachableServerError(
                self.address,
                f"{self.address} did not answer within {self._timeout_seconds:g} s. (A RabbitMQ "
                "that is short of memory or disk space takes no messages.)",
            )
        with amqp_errors(self.address):
            return task.result()

    async def _connection(self) -> AmqpConnection:
        async with self._connecting:
            if self._current is None or not self._current.is_alive:
                self._drop(self._current)
                self._current = await connect(self.options)
            return self._current

    def _drop(self, connection: AmqpConnection | None) -> None:
        """Forget a connection and close it behind the back, since a dead one takes its time."""
        if connection is not None:
            self._current = None
            task = asyncio.ensure_future(connection.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
            task.add_done_callback(_retrieve)


class _AmqpListener(Listener):
    """Looks at its queues in turn, on a channel of its own."""

    def __init__(self, broker: AmqpTaskBroker) -> None:
        self._broker = broker
        self._connection: AmqpConnection | None = None
        self._channel: AbstractChannel | None = None
        #: In the order to look at them, and as they are on the channel.
        self._names = list(broker.queues)
        self._queues: list[AbstractQueue] = []
        self._arrived: AbstractIncomingMessage | None = None

    async def look(self) -> Delivery | None:
        message, self._arrived = self._arrived, None
        if message is None:
            message = await self._broker.run(self._get)
        return None if message is None else self._delivery(message)

    async def _get(self, connection: AmqpConnection) -> AbstractIncomingMessage | None:
        # a connection that was given up may still take a while to close its channels
        if self._connection is not connection or self._is_closed or not self._queues:
            await self._open(connection)
        for _ in self._queues:
            queue = self._queues.pop(0)  # whatever it has, it is the others' turn then
            self._queues.append(queue)
            self._names.append(self._names.pop(0))
            message = await queue.get(fail=False)
            if message is not None:
                return message
        return None

    @property
    def _is_closed(self) -> bool:
        return self._channel is None or self._channel.is_closed

    async def _open(self, connection: AmqpConnection) -> None:
        for name in self._names:
            await connection.declare(name, again=True)  # it may be gone, which closed our channel
        channel = self._channel
        if channel is None or self._connection is not connection or channel.is_closed:
            channel = await connection.channel()
            await channel.set_qos(prefetch_count=1)
        self._queues = [await channel.get_queue(name, ensure=False) for name in self._names]
        self._connection, self._channel = connection, channel

    async def wait(self) -> None:
        """Consume until the first message comes, which the next ``look`` returns."""
        idle = _Consumption(self._queues)
        task = asyncio.ensure_future(self._consume(idle))
        try:
            self._arrived = await asyncio.shield(task)
        except asyncio.CancelledError:
            idle.end()
            with suppress(ServerError):
                message = await task
                if message is not None:
                    await self._delivery(message).release()
            raise

    async def _consume(self, idle: _Consumption) -> AbstractIncomingMessage | None:
        if self._channel is None or self._channel.is_closed:
            return None
        self._channel.close_callbacks.add(idle.end)
        try:
            await self._broker.guard(idle.start())
            await idle.ended(SLOW_LOOK_SECONDS)
            await self._broker.guard(idle.stop())
        finally:
            self._channel.close_callbacks.discard(idle.end)
        return idle.first

    async def turn_to(self, queues: Sequence[str]) -> None:
        # messages of the old ones may be in work on the channel, which so stays
        self._names, self._queues = list(queues), []
        message, self._arrived = self._arrived, None
        if message is not None:
            await self._delivery(message).release()

    def _delivery(self, message: AbstractIncomingMessage) -> Delivery:
        async def ack() -> None:
            try:
                await self._broker.guard(message.ack())
            except UnreachableServerError as error:
                raise UnreachableServerError(
                    error.address, f"{error} The task was not acked and will be delivered again."
                ) from error

        async def release() -> None:
            with suppress(UnreachableServerError):  # RabbitMQ has taken it back already
                await self._broker.guard(message.reject(requeue=True))

        flaw = "its AMQP properties cannot be decoded" if message.type == UNREADABLE else ""
        return Delivery(data=message.body, ack=ack, release=release, flaw=flaw)


class _Consumption:
    """Consumers on several queues that between them are to take one message."""

    def __init__(self, queues: Sequence[AbstractQueue]) -> None:
        self.first: AbstractIncomingMessage | None = None
        self._queues = queues
        self._tags: list[tuple[AbstractQueue, str]] = []
        self._surplus: list[AbstractIncomingMessage] = []
        self._is_stopped = False
        self._end = asyncio.Event()

    async def start(self) -> None:
        for queue in self._queues:
            if not self._end.is_set():
                self._tags.append((queue, await queue.consume(self._receive)))

    async def ended(self, timeout_seconds: float) -> None:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._end.wait(), timeout_seconds)

    def end(self, *_: Any) -> None:
        self._end.set()

    async def stop(self) -> None:
        """Cancel the consumers, then give back the surplus.

        In this order, since a message that goes back to a queue that we consume returns at once.
        """
        for queue, tag in self._tags:
            await queue.cancel(tag)
        self._is_stopped = True
        for message in self._surplus:
            await message.reject(requeue=True)

    async def _receive(self, message: AbstractIncomingMessage) -> None:
        if self._is_stopped:  # aio-pika calls back in a task, which may come after the cancel
            await message.reject(requeue=True)
        elif self.first is None:
            self.first = message
        else:
            self._surplus.append(message)
        self._end.set()


def _retrieve(task: asyncio.Future[Any]) -> None:
    """Look at the error of a task that nobody may be waiting for any more."""
    if not task.cancelled():
        task.exception()
