"""A bell on RabbitMQ, for a backend that had better not wake everybody who listens to it.

A run's loop has a queue of its own for hints, which goes with its last consumer. Nothing is stored
or confirmed: a hint to a queue that is not there is gone, as it should be.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from aio_pika.exceptions import CONNECTION_EXCEPTIONS

from dagster_taskiq.brokers.amqp import AmqpTaskBroker
from dagster_taskiq.brokers.amqp_connection import AmqpConnection
from dagster_taskiq.errors import RefusedByServerError, ServerError
from dagster_taskiq.servers.bell import Bell, Hearing
from dagster_taskiq.servers.kinds import ServerOptions

logger = logging.getLogger(__name__)

#: Of a loop's queue, which has room for so many hints while the loop is frozen. It is durable since
#: newer versions of RabbitMQ take no other queue that several connections may use; after a restart
#: of RabbitMQ it goes in ten minutes if nobody comes back to it.
_QUEUE_ARGUMENTS: dict[str, Any] = {
    "x-queue-type": "classic",
    "x-max-length": 10_000,
    "x-expires": 600_000,
}

#: How many hints wait to be sent at most, and how long none is sent after one that could not be.
_MOST_HINTS = 1_000
_QUIET_SECONDS = 1.0


class AmqpBell(Bell):
    """See ``Bell``; it has a connection of its own, from its first use on.

    Args:
        options: how to reach the server.
    """

    def __init__(self, options: ServerOptions) -> None:
        self._broker = AmqpTaskBroker(options)
        self._prefix = options.key_prefix
        #: By mailbox, what is to be sent with the next message: one for all that came meanwhile.
        self._hints: dict[str, list[str]] = {}
        self._count = 0
        self._ringing: asyncio.Task[None] | None = None
        self._quiet_until = 0.0
        self._sender: tuple[AmqpConnection, AbstractChannel] | None = None

    def _queue(self, mailbox: str) -> str:
        return f"{self._prefix}.hints.{mailbox}"

    def ring(self, mailbox: str, hint: str) -> None:
        """See ``Bell``."""
        if self._count >= _MOST_HINTS or time.monotonic() < self._quiet_until:
            return
        self._count += 1
        self._hints.setdefault(mailbox, []).append(hint)
        if self._ringing is None or self._ringing.done():
            self._ringing = asyncio.create_task(self._ring(), name="ring")

    async def _ring(self) -> None:
        while self._hints:
            hints, self._hints, self._count = self._hints, {}, 0
            await self._send(hints)

    async def _send(self, hints: Mapping[str, Sequence[str]]) -> None:
        async def publish(connection: AmqpConnection) -> None:
            exchange = (await self._sending_channel(connection)).default_exchange
            for mailbox, lines in hints.items():
                message = aio_pika.Message("\n".join(lines).encode())
                await exchange.publish(message, self._queue(mailbox), mandatory=False)

        try:
            await self._broker.run(publish)
        except ServerError as error:
            # the loop looks by itself; whoever listens to tasks there says that the server is away
            self._quiet_until = time.monotonic() + _QUIET_SECONDS
            logger.debug("No hint was sent: %s", error)

    async def _sending_channel(self, connection: AmqpConnection) -> AbstractChannel:
        if self._sender is None or self._sender[0] is not connection or self._sender[1].is_closed:
            self._sender = connection, await connection.channel(confirms=False)
        return self._sender[1]

    async def listen(self, mailbox: str, arrived: asyncio.Event) -> Hearing | None:
        """See ``Bell``."""

        async def consume(connection: AmqpConnection) -> _Consumer:
            channel = await connection.channel()
            # not exclusive: a loop that takes over may come before its predecessor's end is seen
            queue = await channel.declare_queue(
                self._queue(mailbox), durable=True, auto_delete=True, arguments=_QUEUE_ARGUMENTS
            )
            consumer = _Consumer(channel, arrived)
            await queue.consume(consumer.receive, no_ack=True)
            return consumer

        try:
            return await self._broker.run(consume)
        except RefusedByServerError as error:
            self.works = False
            logger.warning(
                "%s Results are looked for several times a second instead of waiting for hints.",
                error,
            )
            return None

    async def close(self) -> None:
        """See ``Bell``; what is on its way may get there."""
        if self._ringing is not None:
            await asyncio.wait({self._ringing}, timeout=_QUIET_SECONDS)
        await self._broker.shutdown()


class _Consumer(Hearing):
    """A channel that hears the hints of one queue."""

    def __init__(self, channel: AbstractChannel, arrived: asyncio.Event) -> None:
        super().__init__(arrived)
        self._channel = channel
        self._closing: asyncio.Task[None] | None = None
        channel.close_callbacks.add(lambda *_: self.lose())

    async def receive(self, message: AbstractIncomingMessage) -> None:
        """Hear the hints of one message, each in a line."""
        for line in message.body.decode(errors="replace").split("\n"):
            self.hear(line)

    def close(self) -> None:
        """See ``Hearing``."""
        if not self.is_lost:
            self._closing = asyncio.ensure_future(self._close())

    async def _close(self) -> None:
        with suppress(*CONNECTION_EXCEPTIONS):  # then it is closed
            await self._channel.close()
