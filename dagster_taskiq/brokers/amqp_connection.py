"""One connection to RabbitMQ, with the channels on which queues are made, asked and sent to."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection
from aio_pika.exceptions import CONNECTION_EXCEPTIONS
from aiormq import exceptions
from pamqp.exceptions import PAMQPException

from dagster_taskiq._taskiq import BrokerMessage
from dagster_taskiq.brokers.amqp_errors import our_message_is_enough, words_of_close
from dagster_taskiq.brokers.base import NOTE_EXPIRES_SECONDS
from dagster_taskiq.brokers.outgoing import priority_of, queue_of
from dagster_taskiq.defaults import MAX_PRIORITY
from dagster_taskiq.servers.kinds import ServerOptions

#: Arguments of every queue of ours. RabbitMQ refuses them for a queue that has others already.
_QUEUE_ARGUMENTS: dict[str, Any] = {"x-max-priority": MAX_PRIORITY, "x-queue-type": "classic"}

#: Arguments of a queue for one note, which is kept as long as the queue if nobody asks.
_NOTE_ARGUMENTS: dict[str, Any] = {
    "x-queue-type": "classic",
    "x-max-length": 1,
    "x-expires": 1000 * NOTE_EXPIRES_SECONDS,
    "x-message-ttl": 1000 * NOTE_EXPIRES_SECONDS,
}


async def connect(options: ServerOptions) -> AmqpConnection:
    """A new connection; errors are those of the library, for ``amqp_errors``."""
    arguments: dict[str, Any] = {}
    if options.heartbeat_seconds is not None:
        arguments["heartbeat"] = options.heartbeat_seconds
    if options.uses_tls:
        arguments["ssl_context"] = options.tls.context()
    with our_message_is_enough():
        try:
            connection = await aio_pika.connect(options.client_url, **arguments)
        except (exceptions.InvalidFrameError, PAMQPException) as error:
            # what aiormq 7 and 6 make of RabbitMQ's refusal to open a virtual host
            raise exceptions.ConnectionNotAllowed(
                words_of_close(error)
                or "its virtual host does not exist, or the user has no access to it"
            ) from error
    return AmqpConnection(connection)


class AmqpConnection:
    """A connection with its channels, and what was done on it once."""

    def __init__(self, connection: AbstractConnection) -> None:
        self._connection = connection
        self._is_lost = False
        connection.close_callbacks.add(self._lose)
        self._declared: set[str] = set()
        self._sending: AbstractChannel | None = None
        self._asking: AbstractChannel | None = None
        self._turn = asyncio.Lock()

    @property
    def is_alive(self) -> bool:
        """Whether it may be used, as far as is known."""
        # aio-pika's own is_closed stays False when the other side went away
        return not self._is_lost and self._connection.connected.is_set()

    @property
    def product(self) -> str:
        """Name and version of the server, as it has greeted us."""
        transport = self._connection.transport
        said = {} if transport is None else transport.connection.server_properties
        return " ".join(_word(said, key) for key in ("product", "version"))

    def _lose(self, *_: Any) -> None:
        self._is_lost = True

    async def close(self) -> None:
        """Close it, which takes its time where the other side is gone."""
        with suppress(*CONNECTION_EXCEPTIONS):
            await self._connection.close()

    async def channel(self, *, confirms: bool = True) -> AbstractChannel:
        """A new channel.

        Args:
            confirms: whether RabbitMQ confirms what is sent there.
        """
        # aio-pika's default would take a message that no queue took for sent
        channel = self._connection.channel(publisher_confirms=confirms, on_return_raises=confirms)
        await channel.initialize()
        return channel

    async def declare(self, queue: str, *, again: bool = False) -> None:
        """Make a queue unless this connection has done so already."""
        async with self._turn:
            if again or queue not in self._declared:
                channel = await self._asking_channel()
                await channel.declare_queue(queue, durable=True, arguments=_QUEUE_ARGUMENTS)
                self._declared.add(queue)

    async def depth(self, queue: str) -> int:
        """How many messages wait in a queue."""
        async with self._turn:
            channel = await self._asking_channel()
            try:
                found = await channel.declare_queue(queue, passive=True)
            except exceptions.ChannelNotFoundEntity:
                self._declared.discard(queue)
                return 0
            return found.declaration_result.message_count or 0

    async def publish(self, messages: Sequence[BrokerMessage]) -> None:
        """Send messages in their order, and wait until all are confirmed."""
        unroutable = await self._publish(messages)
        if unroutable:  # somebody has deleted the queue since we made it
            self._declared.difference_update(queue_of(message) for message in unroutable)
            if await self._publish(unroutable):
                raise exceptions.ChannelNotFoundEntity("the queue is deleted again and again")

    async def _publish(self, messages: Sequence[BrokerMessage]) -> list[BrokerMessage]:
        """Send messages; returns those that no queue took."""
        for queue in {queue_of(message): None for message in messages}:
            await self.declare(queue)
        async with self._turn:
            if self._sending is None or self._sending.is_closed:
                self._sending = await self.channel()
        exchange = self._sending.default_exchange
        # they keep their order: each starts in its turn and waits in turn for the channel
        results = await asyncio.gather(
            *(
                exchange.publish(_to_amqp(message), routing_key=queue_of(message), mandatory=True)
                for message in messages
            ),
            return_exceptions=True,
        )
        unroutable = []
        for message, result in zip(messages, results, strict=True):
            if isinstance(result, exceptions.PublishError):
                unroutable.append(message)
            elif isinstance(result, BaseException):
                raise result
        return unroutable

    async def leave(self, queue: str, note: bytes) -> None:
        """Put a note in place of an older one into a queue that ``take_left`` has made."""
        async with self._turn:
            if self._sending is None or self._sending.is_closed:
                self._sending = await self.channel()
        exchange = self._sending.default_exchange
        await exchange.publish(aio_pika.Message(note), queue, mandatory=False)

    async def take_left(self, queue: str) -> bytes | None:
        """The note in a queue that goes when nobody has asked for a while."""
        async with self._turn:
            channel = await self._asking_channel()
            made = await channel.declare_queue(queue, durable=True, arguments=_NOTE_ARGUMENTS)
            message = await made.get(no_ack=True, fail=False)
        return None if message is None else message.body

    async def _asking_channel(self) -> AbstractChannel:
        """The channel for declarations; a refused one closes it, so nothing else is done there."""
        if self._asking is None or self._asking.is_closed:
            self._asking = await self.channel()
        return self._asking


def _word(properties: Mapping[str, Any], key: str) -> str:
    value = properties.get(key, "?")
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _to_amqp(message: BrokerMessage) -> aio_pika.Message:
    return aio_pika.Message(
        message.message,
        content_type="application/json",
        # not the message id, which aiormq takes for unique among what is on its way
        correlation_id=message.task_id,
        type=message.task_name,
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        priority=priority_of(message),
    )
