"""What only the broker on RabbitMQ has: kinds of queues, AMQP properties, channels that close."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import aio_pika
import pamqp.commands
import pytest

from dagster_taskiq.brokers import open_broker
from dagster_taskiq.errors import RefusedByServerError, UnreachableServerError
from dagster_taskiq_tests.contract.broker_bench import (
    AmqpHarness,
    Everything,
    consuming,
    eventually,
    opened,
    opened_harness,
    run,
    task,
)


@pytest.fixture
def harness() -> Iterator[AmqpHarness]:
    with opened_harness("rabbitmq") as harness:
        assert isinstance(harness, AmqpHarness)
        yield harness


def test_celerys_name_of_the_scheme_will_do(harness: AmqpHarness) -> None:
    async def test() -> None:
        url = "py" + harness.options.url
        queue = harness.queue()
        async with consuming(AmqpHarness(replace(harness.options, url=url)), queue) as consumer:
            await consumer.broker.kick(task(queue, "a"))
            assert await consumer.finish() == "a"

    run(test())


def test_a_queue_of_another_kind_is_refused(harness: AmqpHarness) -> None:
    """By sender and listener, who say what to do about it; other queues still work."""

    async def test() -> None:
        queue, other = harness.queue(), harness.queue("other")
        async with await aio_pika.connect(harness.options.url) as connection:
            await (await connection.channel()).declare_queue(queue, durable=True)
        try:
            listener = harness.broker(queue)
            with pytest.raises(RefusedByServerError, match="Delete it") as caught:
                await listener.startup()
            assert queue in str(caught.value)
            await listener.shutdown()
            async with opened(harness) as sender:
                with pytest.raises(RefusedByServerError, match="Delete it"):
                    await sender.kick(task(queue, "a"))
                await sender.kick(task(other, "a"))
                assert await sender.depth(other) == 1
        finally:
            await harness.delete(queue)

    run(test())


class RawProperties(pamqp.commands.Basic.Properties):
    """Properties with any bytes on their way."""

    def __init__(self, flags: int, data: bytes) -> None:
        super().__init__()
        self.raw = struct.pack(">H", flags) + data

    def marshal(self) -> bytes:
        return self.raw


def nested_headers(depth: int) -> bytes:
    """Tables in tables."""
    table = b""
    for _ in range(depth):
        table = b"\x01aF" + struct.pack(">I", len(table)) + table
    return struct.pack(">I", len(table)) + table


#: The flag of each property, and after it the best priority.
HEADERS, PRIORITY, CORRELATION_ID, TIMESTAMP = 1 << 13, 1 << 11, 1 << 10, 1 << 6
UNREADABLE = {
    "correlation id": RawProperties(PRIORITY | CORRELATION_ID, b"\x0a\x01\xff"),
    "header key": RawProperties(HEADERS | PRIORITY, b"\x00\x00\x00\x04\x01\xfft\x01\x0a"),
    "timestamp": RawProperties(PRIORITY | TIMESTAMP, b"\x0a" + b"\xff" * 8),
    "nesting": RawProperties(HEADERS | PRIORITY, nested_headers(2000) + b"\x0a"),
}


@pytest.mark.parametrize("is_idle", [False, True])
@pytest.mark.parametrize("what", UNREADABLE)
def test_unreadable_properties_block_no_queue(
    harness: AmqpHarness, what: str, is_idle: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Their message is refused, counted and acked, though its body would be admitted."""
    admission = Everything()

    async def test() -> None:
        queue = harness.queue()
        async with consuming(harness, queue, admission=admission) as consumer:
            if is_idle:
                await consumer.until_idle()
            async with await aio_pika.connect(harness.options.url) as connection:
                channel = await (await connection.channel()).get_underlay_channel()
                for _ in range(3):
                    await channel.basic_publish(
                        b"captured", routing_key=queue, properties=UNREADABLE[what]
                    )
                await consumer.broker.kick(task(queue, "good"))
                assert await consumer.finish() == "good"
            assert len(admission.refusals) == 3
            assert await consumer.broker.depth(queue) == 0

    run(test())
    assert "Listening goes on when it is back" not in caplog.text
    assert all("its AMQP properties cannot be decoded" in it for it in admission.refusals)


def test_an_unknown_virtual_host_is_refused(harness: AmqpHarness) -> None:
    async def test() -> None:
        url = urlsplit(harness.options.url)._replace(path="/no-such-vhost").geturl()
        broker = open_broker(replace(harness.options, url=url))
        with pytest.raises(RefusedByServerError, match="vhost no-such-vhost not found"):
            await broker.startup()
        await broker.shutdown()

    run(test())


def test_an_ack_over_a_lost_connection_raises(harness: AmqpHarness) -> None:
    """The task comes once more, and the worker can know; a release has happened by itself."""

    async def test() -> None:
        queue = harness.queue()
        async with (
            harness.network() as network,
            consuming(network, queue) as consumer,
        ):
            await consumer.broker.kick_many([task(queue, text) for text in "ab"])
            first, second = await consumer.take(), await consumer.take()
            network.cut()
            await consumer.broker.depth(queue)  # over a new connection
            with pytest.raises(UnreachableServerError, match="delivered again"):
                await first.ack()
            assert not first.settled
            await second.release()
            assert second.settled
            assert [await consumer.finish() for _ in range(2)] == ["a", "b"]

    run(test())


def test_a_deleted_queue_is_made_again(
    harness: AmqpHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the sender that knew it, whose task would be lost, and by the listener, idle or not."""
    monkeypatch.setattr("dagster_taskiq.brokers.amqp.SLOW_LOOK_SECONDS", 0.5)

    async def test() -> None:
        queue = harness.queue()
        async with opened(harness) as sender, consuming(harness, queue) as consumer:
            await sender.kick(task(queue, "a"))
            assert await consumer.finish() == "a"
            await harness.delete(queue)
            await sender.kick(task(queue, "b"))
            assert await consumer.finish() == "b"
            await consumer.until_idle()
            await harness.delete(queue)
            await sender.kick_many([task(queue, text) for text in "cd"])
            assert [await consumer.finish() for _ in range(2)] == ["c", "d"]
            await consumer.until_idle()
            await harness.delete(queue)
            await eventually(lambda: harness.has(queue))

    run(test())


def test_tasks_are_persistent_in_durable_queues(harness: AmqpHarness) -> None:
    async def test() -> None:
        queue = harness.queue()
        async with opened(harness) as sender:
            await sender.kick(task(queue, "a", priority=7))
        async with await aio_pika.connect(harness.options.url) as connection:
            channel = await connection.channel()
            arguments: dict[str, Any] = {"x-max-priority": 10, "x-queue-type": "classic"}
            found = await channel.declare_queue(queue, durable=True, arguments=arguments)
            message = await found.get()
            assert message is not None
            assert message.delivery_mode == aio_pika.DeliveryMode.PERSISTENT
            assert (message.priority, message.correlation_id) == (7, "a")
            await message.ack()

    run(test())
