"""What every broker promises: one suite over all of them, and what only one kind can show."""

from __future__ import annotations

import asyncio
import logging
import shutil
import ssl
import struct
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import aio_pika
import pamqp.commands
import pytest
import redis
from taskiq import BrokerMessage

from dagster_taskiq.brokers import Delivery, TaskBroker, open_broker
from dagster_taskiq.brokers.base import Listener
from dagster_taskiq.brokers.redis import RedisTaskBroker
from dagster_taskiq.errors import (
    ConfigError,
    MalformedTaskError,
    RefusedByServerError,
    UnreachableServerError,
)
from dagster_taskiq.messages.envelope import QueueKind, physical_queue
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq.servers.tls import Tls
from dagster_taskiq.servers.urls import normalize_amqp
from dagster_taskiq_tests.server_sources import missing
from dagster_taskiq_tests.servers import (
    PrivateRedis,
    amqp_options,
    is_redis,
    private_redis,
    redis_options,
    valkey_options,
)

T = TypeVar("T")

#: For what must happen, on a loaded machine.
PATIENCE_SECONDS = 20.0

#: For what must happen by push, long before any slow look.
AT_ONCE_SECONDS = 2.0

#: In place of the 15 s that a dead worker's tasks stay in hand on Redis.
IN_HAND_SECONDS = 0.5

SECRET = "opensesame"


@pytest.fixture(params=[redis_options, valkey_options], ids=["redis", "valkey"])
def on_redis(request: pytest.FixtureRequest) -> Iterator[ServerOptions]:
    with request.param() as options:
        yield options


@pytest.fixture
def on_rabbitmq() -> Iterator[ServerOptions]:
    with amqp_options() as options:
        yield options


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 90))


def queue_name(options: ServerOptions, name: str = "q") -> str:
    return physical_queue(options.key_prefix, QueueKind.STEPS, name)


def task(queue: str, text: str = "", **labels: Any) -> BrokerMessage:
    return BrokerMessage(
        task_id=text or str(uuid.uuid4()),
        task_name="execute_plan",
        message=text.encode(),
        labels={"queue_name": queue, **labels},
    )


@asynccontextmanager
async def opened(options: ServerOptions, *queues: str) -> AsyncIterator[TaskBroker]:
    broker = open_broker(options, queues)
    await broker.startup()
    try:
        yield broker
    finally:
        await broker.shutdown()


class Consumer:
    """Asks a broker for one message at a time, as Taskiq's receiver does."""

    def __init__(self, broker: TaskBroker) -> None:
        self.broker = broker
        self.pending: asyncio.Task[Any] | None = None
        self._is_idle = asyncio.Event()
        self._new_listener = broker.listener
        broker.listener = self._listener  # type: ignore[method-assign]
        self._messages = broker.listen()

    def _listener(self) -> Listener:
        """A listener that tells when it has looked in vain."""
        listener = self._new_listener()
        wait = listener.wait

        async def observed_wait() -> None:
            self._is_idle.set()
            try:
                await wait()
            finally:
                self._is_idle.clear()

        listener.wait = observed_wait  # type: ignore[method-assign]
        return listener

    async def until_idle(self) -> None:
        """Ask for a message, and wait until there is none and the listener waits for one."""
        self.ask()
        await asyncio.wait_for(self._is_idle.wait(), PATIENCE_SECONDS)

    def ask(self) -> asyncio.Task[Any]:
        """Begin to wait for the next message."""
        if self.pending is None:
            self.pending = asyncio.ensure_future(anext(self._messages))
        return self.pending

    async def take(self, timeout_seconds: float = PATIENCE_SECONDS) -> Delivery:
        """The next message; the wait goes on in the background when it takes too long."""
        pending = self.ask()
        delivery = await asyncio.wait_for(asyncio.shield(pending), timeout_seconds)
        self.pending = None
        assert isinstance(delivery, Delivery)
        return delivery

    async def finish(self) -> str:
        """Take one message and ack it; returns its text."""
        delivery = await self.take()
        await delivery.ack()
        return delivery.data.decode()

    async def finish_many(self, count: int, timeout_seconds: float) -> list[str]:
        """The texts of so many messages, acked, within a time for all."""

        async def finish() -> list[str]:
            return [await self.finish() for _ in range(count)]

        return await asyncio.wait_for(finish(), timeout_seconds)

    async def stop(self) -> None:
        """Stop as Taskiq's receiver does: cancel the read, close the generator."""
        if self.pending is not None:
            self.pending.cancel()
            await asyncio.wait({self.pending})
            if not self.pending.cancelled() and not self.pending.exception():
                await self.pending.result().release()  # it was too late to cancel
            self.pending = None
        await self._messages.aclose()


@asynccontextmanager
async def consuming(options: ServerOptions, *queues: str) -> AsyncIterator[Consumer]:
    async with opened(options, *queues) as broker:
        consumer = Consumer(broker)
        try:
            yield consumer
        finally:
            await consumer.stop()


async def eventually(check: Callable[[], Awaitable[object]]) -> None:
    """Wait until the check holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not await check():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.02)


class Proxy:
    """A TCP proxy before a server, which fails as networks do."""

    def __init__(self, url: str, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        parts = urlsplit(normalize_amqp(url) if not is_redis(url) else url)
        self._upstream = (parts.hostname, parts.port or (6379 if is_redis(url) else 5672))
        self._parts = parts
        self._port = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()

    @property
    def url(self) -> str:
        login = self._parts.netloc.rpartition("@")[0]
        netloc = f"{login}@127.0.0.1:{self._port}" if login else f"127.0.0.1:{self._port}"
        scheme = self._parts.scheme + ("s" if self._tls else "")
        return self._parts._replace(scheme=scheme, netloc=netloc).geturl()

    async def open(self) -> None:
        """Take connections, on the same port as before."""
        self._server = await asyncio.start_server(
            self._connect, "127.0.0.1", self._port, ssl=self._tls
        )
        self._port = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Break all connections."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    def close(self) -> None:
        """Break all connections and refuse new ones."""
        assert self._server is not None
        self._server.close()
        self.cut()

    def freeze(self) -> None:
        """Let nothing through any more, with the connections up."""
        self._flowing.clear()

    def thaw(self) -> None:
        self._flowing.set()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(*self._upstream)
        self._writers |= {writer, there_writer}
        for source, target in ((reader, there_writer), (there_reader, writer)):
            pump = asyncio.ensure_future(self._pump(source, target))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                await self._flowing.wait()
                target.write(data)
                await target.drain()
        except OSError:
            pass
        finally:
            target.close()


@asynccontextmanager
async def proxied(
    options: ServerOptions, tls: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[ServerOptions, Proxy]]:
    """The same server through a proxy, and with little patience."""
    proxy = Proxy(options.url, tls)
    await proxy.open()
    try:
        yield replace(options, url=proxy.url, connect_timeout_seconds=1), proxy
    finally:
        proxy.thaw()
        proxy.close()


# --- order ---


def test_higher_priority_comes_first_and_then_what_was_sent_first(
    broker_options: ServerOptions,
) -> None:
    async def test() -> None:
        queue = queue_name(broker_options)
        priorities = [0, 5, 10, 5, 1, 10, 9, 0, 5]
        async with consuming(broker_options, queue) as consumer:
            for number, priority in enumerate(priorities):
                await consumer.broker.kick(task(queue, f"{number}", priority=priority))
            seen = [int(await consumer.finish()) for _ in priorities]
        assert seen == sorted(range(len(priorities)), key=lambda number: -priorities[number])

    run(test())


def test_order_holds_across_senders_and_between_kick_and_kick_many(
    broker_options: ServerOptions,
) -> None:
    async def test() -> None:
        queue = queue_name(broker_options)
        async with (
            opened(broker_options) as first,
            opened(broker_options) as second,
            consuming(broker_options, queue) as consumer,
        ):
            for number in range(0, 30, 3):
                await first.kick(task(queue, f"{number}", priority=3))
                await second.kick_many(
                    [task(queue, f"{number + more}", priority=3) for more in (1, 2)]
                )
            assert [int(await consumer.finish()) for _ in range(30)] == list(range(30))

    run(test())


def test_a_missing_priority_is_five_and_others_are_clamped(broker_options: ServerOptions) -> None:
    async def test() -> None:
        queue = queue_name(broker_options)
        async with consuming(broker_options, queue) as consumer:
            await consumer.broker.kick_many(
                [
                    task(queue, "below", priority=-3),
                    task(queue, "four", priority=4),
                    task(queue, "missing"),
                    task(queue, "text", priority="6"),
                    task(queue, "junk", priority="junk"),
                    task(queue, "ten", priority=10),
                    task(queue, "above", priority=99),
                ]
            )
            seen = [await consumer.finish() for _ in range(7)]
        assert seen == ["ten", "above", "text", "missing", "junk", "four", "below"]

    run(test())


def test_queues_are_looked_at_in_turn(broker_options: ServerOptions) -> None:
    """A full queue, even one of higher priority, does not starve the others of a listener."""

    async def test() -> None:
        queues = [queue_name(broker_options, name) for name in "abc"]
        async with consuming(broker_options, *queues) as consumer:
            for queue, priority in zip(queues, (9, 5, 1), strict=True):
                await consumer.broker.kick_many(
                    [task(queue, f"{queue[-1]}{number}", priority=priority) for number in range(3)]
                )
            seen = [await consumer.finish() for _ in range(9)]
        assert [{text[0] for text in seen[first : first + 3]} for first in (0, 3, 6)] == [
            set("abc")
        ] * 3
        assert [text for text in seen if text[0] == "a"] == ["a0", "a1", "a2"]

    run(test())


# --- who gets what ---


def test_a_busy_listener_holds_nothing(broker_options: ServerOptions) -> None:
    """Messages that a listener has not asked for go to those who ask, also after an ack."""

    async def test() -> None:
        queue = queue_name(broker_options)
        async with (
            consuming(broker_options, queue) as busy,
            consuming(broker_options, queue) as idle,
        ):
            await busy.until_idle()
            await busy.broker.kick_many([task(queue, f"{number}") for number in range(5)])
            assert await busy.finish() == "0"  # acked at its claim, and now busy with it
            assert await busy.broker.depth(queue) == 4
            assert [await idle.finish() for _ in range(4)] == ["1", "2", "3", "4"]

    run(test())


def test_an_idle_listener_takes_one_message_of_all_its_queues(
    broker_options: ServerOptions,
) -> None:
    """Messages that arrive at once in several queues do not all stick to the first who wakes."""

    async def test() -> None:
        queues = [queue_name(broker_options, name) for name in "abcd"]
        async with (
            opened(broker_options) as sender,
            consuming(broker_options, *queues) as one,
            consuming(broker_options, *queues) as other,
        ):
            await one.until_idle()
            await sender.kick_many([task(queue, queue[-1]) for queue in queues])
            first = await one.take()
            rest = [await other.finish() for _ in range(3)]
            assert {first.data.decode(), *rest} == set("abcd")

    run(test())


def test_messages_wait_for_the_first_listener(broker_options: ServerOptions) -> None:
    async def test() -> None:
        queue = queue_name(broker_options)
        async with opened(broker_options) as sender:
            await sender.kick(task(queue, "early"))
            assert await sender.depth(queue) == 1
        async with consuming(broker_options, queue) as consumer:
            assert await consumer.finish() == "early"

    run(test())


def test_a_thousand_messages_in_one_go(broker_options: ServerOptions) -> None:
    async def test() -> None:
        queue = queue_name(broker_options)
        async with opened(broker_options) as sender:
            await sender.kick_many([task(queue, f"{number}") for number in range(1000)])
            assert await sender.depth(queue) == 1000
        async with consuming(broker_options, queue) as consumer:
            assert [int(await consumer.finish()) for _ in range(1000)] == list(range(1000))

    run(test())


def test_large_messages_arrive_whole(broker_options: ServerOptions) -> None:
    """Also more of them than are sent in one batch."""

    async def test() -> None:
        queue = queue_name(broker_options)
        texts = [f"{number}" * 700_000 for number in range(10)]
        async with consuming(broker_options, queue) as consumer:
            messages = [task(queue, text) for text in texts]
            for number, message in enumerate(messages):
                message.task_id = f"{number}"
            await consumer.broker.kick_many(messages)
            assert [await consumer.finish() for _ in texts] == texts

    run(test())


def test_every_task_is_done_once_by_several_listeners(broker_options: ServerOptions) -> None:
    """1,000 tasks, 4 queues, 3 listeners, and senders that go on meanwhile."""

    async def test() -> None:
        queues = [queue_name(broker_options, name) for name in "abcd"]
        seen: Counter[str] = Counter()

        async def work() -> None:
            async with consuming(broker_options, *queues) as consumer:
                while sum(seen.values()) < 1000:
                    try:
                        delivery = await consumer.take(0.2)
                    except asyncio.TimeoutError:
                        continue
                    seen[delivery.data.decode()] += 1
                    await delivery.ack()

        async def send(queue: str) -> None:
            async with opened(broker_options) as sender:
                for first in range(0, 250, 50):
                    numbers = range(first, first + 50)
                    await sender.kick_many([task(queue, f"{queue[-1]}{n}") for n in numbers])

        await asyncio.gather(*(work() for _ in range(3)), *(send(queue) for queue in queues))
        assert len(seen) == 1000
        assert set(seen.values()) == {1}
        async with opened(broker_options) as broker:
            assert [await broker.depth(queue) for queue in queues] == [0] * 4

    run(test())


# --- settling ---


def test_an_acked_task_is_forgotten(broker_options: ServerOptions) -> None:
    async def test() -> None:
        queue = queue_name(broker_options)
        async with consuming(broker_options, queue) as consumer:
            await consumer.broker.kick(task(queue, "once"))
            delivery = await consumer.take()
            await delivery.ack()
            await delivery.ack()
            await delivery.release()  # too late, and without effect
            assert delivery.settled
        async with opened(broker_options) as broker:
            assert await broker.depth(queue) == 0
            assert await broker.absent(queue, ["once"]) == {"once"}

    run(test())


def test_ack_and_release_at_once_settle_once(broker_options: ServerOptions) -> None:
    async def test() -> None:
        queue = queue_name(broker_options)
        async with consuming(broker_options, queue) as consumer:
            await consumer.broker.kick(task(queue, "once"))
            delivery = await consumer.take()
            await asyncio.gather(delivery.ack(), delivery.release(), delivery.ack())
            assert await consumer.broker.depth(queue) == 0
            await consumer.broker.kick(task(queue, "next"))
            assert await consumer.finish() == "next"

    run(test())


def test_a_released_task_is_back_in_its_place_at_once(broker_options: ServerOptions) -> None:
    async def test() -> None:
        queue = queue_name(broker_options)
        async with (
            consuming(broker_options, queue) as one,
            consuming(broker_options, queue) as other,
        ):
            await one.broker.kick_many([task(queue, text, priority=5) for text in "abc"])
            first, second = await one.take(), await one.take()
            await one.broker.kick(task(queue, "d", priority=5))
            await one.broker.kick(task(queue, "e", priority=4))
            await second.release()
            await first.release()
            seen = await other.finish_many(5, AT_ONCE_SECONDS)
        assert seen == ["a", "b", "c", "d", "e"]

    run(test())


def test_a_release_wakes_an_idle_listener(broker_options: ServerOptions) -> None:
    async def test() -> None:
        queue = queue_name(broker_options)
        async with (
            consuming(broker_options, queue) as one,
            consuming(broker_options, queue) as idle,
        ):
            await one.broker.kick(task(queue, "a"))
            delivery = await one.take()
            await idle.until_idle()
            await delivery.release()
            assert (await idle.take(AT_ONCE_SECONDS)).data == b"a"

    run(test())


def test_a_dead_listeners_task_goes_back_to_its_place(
    broker_options: ServerOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection breaks between the take and the ack, and the worker is never seen again."""
    monkeypatch.setattr(RedisTaskBroker, "in_hand_seconds", IN_HAND_SECONDS)

    async def test() -> None:
        queue = queue_name(broker_options)
        async with consuming(broker_options, queue) as survivor:
            async with (
                proxied(broker_options) as (options, proxy),
                consuming(options, queue) as victim,
            ):
                await victim.broker.kick_many([task(queue, text) for text in "abc"])
                assert (await victim.take()).data == b"a"
                assert await survivor.finish() == "b"
                proxy.close()

            async def is_back() -> bool:
                # on Redis a look gives back what is overdue
                delivery = await survivor.take()
                await (delivery.ack if delivery.data == b"a" else delivery.release)()
                return delivery.data == b"a"

            await eventually(is_back)
            assert await survivor.finish() == "c"
            assert await survivor.broker.depth(queue) == 0

    run(test())


def test_what_a_living_worker_has_in_hand_stays_there(
    broker_options: ServerOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For as long as it takes: a launched run is acked only when its code is loaded.

    Then it is given back like any other, or does not come again where it is acked.
    """
    monkeypatch.setattr(RedisTaskBroker, "in_hand_seconds", 2.0)
    monkeypatch.setattr(RedisTaskBroker, "hold_every_seconds", 0.1)
    monkeypatch.setattr("dagster_taskiq.brokers.redis.SLOW_LOOK_SECONDS", 0.1)

    async def test() -> None:
        queue = queue_name(broker_options)
        async with (
            consuming(broker_options, queue) as slow,
            consuming(broker_options, queue) as other,
        ):
            await slow.broker.kick_many([task(queue, text) for text in "ab"])
            first, second = await slow.take(), await slow.take()
            with pytest.raises(asyncio.TimeoutError):
                await other.take(3.0)
            await second.ack()
            await first.release()
            assert await other.finish() == "a"
            with pytest.raises(asyncio.TimeoutError):
                await other.take(AT_ONCE_SECONDS)

    run(test())


def test_a_shut_down_listeners_task_goes_back(
    broker_options: ServerOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RedisTaskBroker, "in_hand_seconds", IN_HAND_SECONDS)
    monkeypatch.setattr("dagster_taskiq.brokers.redis.SLOW_LOOK_SECONDS", IN_HAND_SECONDS)

    async def test() -> None:
        queue = queue_name(broker_options)
        async with consuming(broker_options, queue) as consumer:
            await consumer.broker.kick(task(queue, "a"))
            await consumer.take()
        async with consuming(broker_options, queue) as consumer:
            assert await consumer.finish() == "a"

    run(test())


def test_a_listener_that_is_cancelled_leaves_nothing_behind(
    broker_options: ServerOptions,
) -> None:
    """Wherever the cancel meets it: in the look, in the wait, or as a message comes."""

    async def test() -> None:
        queues = [queue_name(broker_options, name) for name in "ab"]
        async with (
            opened(broker_options) as sender,
            consuming(broker_options, *queues) as other,
        ):
            for round_ in range(20):
                async with consuming(broker_options, *queues) as consumer:
                    consumer.ask()
                    await asyncio.sleep(0.001 * round_)
                    sent = asyncio.ensure_future(
                        sender.kick_many([task(queue, f"{round_}") for queue in queues])
                    )
                    await asyncio.sleep(0.0005 * (round_ % 5))
                    await consumer.stop()
                    await sent
                    seen = await other.finish_many(2, AT_ONCE_SECONDS)
                    assert seen == [f"{round_}"] * 2

    run(test())


def test_a_refused_message_is_dropped_and_the_listener_goes_on(
    broker_options: ServerOptions, caplog: pytest.LogCaptureFixture
) -> None:
    def admit(data: bytes) -> None:
        if data.startswith(b"bad"):
            raise MalformedTaskError("it is bad")

    async def test() -> None:
        queue = queue_name(broker_options)
        async with consuming(broker_options, queue) as consumer:
            consumer.broker.admit = admit
            await consumer.broker.kick_many(
                [task(queue, text) for text in ("bad 1", "good 1", "bad 2", "good 2")]
            )
            assert [await consumer.finish() for _ in range(2)] == ["good 1", "good 2"]
            assert consumer.broker.refused_count == 2
            assert await consumer.broker.depth(queue) == 0
            assert await consumer.broker.absent(queue, ["bad 1"]) == {"bad 1"}

    run(test())
    # and no flood of them
    assert sum("it is bad" in record.getMessage() for record in caplog.records) == 1


# --- looking into a queue ---


def test_depth_counts_what_waits(broker_options: ServerOptions) -> None:
    async def test() -> None:
        queue, other = queue_name(broker_options), queue_name(broker_options, "other")
        async with consuming(broker_options, queue) as consumer:
            broker = consumer.broker
            assert await broker.depth(queue) == 0
            assert await broker.depth(other) == 0  # does not exist on RabbitMQ
            await broker.kick_many([task(queue, text) for text in "abc"])
            assert await broker.depth(queue) == 3
            delivery = await consumer.take()
            assert await broker.depth(queue) == 2
            await delivery.release()
            await eventually(lambda: _is(broker.depth(queue), 3))
            await broker.kick(task(other, "d"))
            assert await broker.depth(other) == 1

    run(test())


async def _is(value: Awaitable[T], expected: T) -> bool:
    return await value == expected


def test_absent_is_what_is_certainly_gone(broker_options: ServerOptions) -> None:
    """A broker that can look into its queue knows each task; the other one only an empty queue."""

    async def test() -> None:
        queue = queue_name(broker_options)
        is_exact = is_redis(broker_options.url)
        async with consuming(broker_options, queue) as consumer:
            broker = consumer.broker
            assert await broker.absent(queue, ["a", "b"]) == {"a", "b"}
            assert await broker.absent(queue, []) == set()
            await broker.kick_many([task(queue, text) for text in "ab"])
            assert await broker.absent(queue, ["a", "b", "c"]) == ({"c"} if is_exact else set())
            in_hand = await consumer.take()
            assert await broker.absent(queue, ["a", "b", "c"]) == ({"c"} if is_exact else set())
            await in_hand.ack()
            assert await broker.absent(queue, ["a", "b"]) == ({"a"} if is_exact else set())

    run(test())


def test_withdrawn_tasks_never_run(broker_options: ServerOptions) -> None:
    """Where the broker can: RabbitMQ takes nothing out and says so."""

    async def test() -> None:
        queue = queue_name(broker_options)
        async with consuming(broker_options, queue) as consumer:
            broker = consumer.broker
            await broker.kick_many([task(queue, f"{number}") for number in range(1000)])
            in_hand = await consumer.take()
            wanted = [f"{number}" for number in range(998)] + ["unknown"]
            withdrawn = await broker.withdraw(queue, wanted)
            if not is_redis(broker_options.url):
                assert withdrawn == set()
                return
            assert withdrawn == set(wanted) - {"0", "unknown"}  # not what is in hand
            assert await broker.withdraw(queue, wanted) == set()
            await in_hand.release()
            assert [await consumer.finish() for _ in range(3)] == ["0", "998", "999"]
            assert await broker.absent(queue, wanted) == set(wanted)

    run(test())


# --- waking ---


def test_an_idle_listener_wakes_at_once(broker_options: ServerOptions) -> None:
    async def test() -> None:
        queues = [queue_name(broker_options, name) for name in "abc"]
        async with (
            opened(broker_options) as sender,
            consuming(broker_options, *queues) as consumer,
        ):
            for queue in (queues[2], queues[0]):
                await consumer.until_idle()
                await sender.kick(task(queue, "wake up"))
                await (await consumer.take(AT_ONCE_SECONDS)).ack()

    run(test())


@pytest.mark.parametrize("at_once", [True, False], ids=["kick_many", "kick"])
def test_n_tasks_wake_n_idle_listeners(broker_options: ServerOptions, at_once: bool) -> None:
    async def test() -> None:
        queues = [queue_name(broker_options, name) for name in "ab"]
        async with opened(broker_options) as sender:
            workers = [consuming(broker_options, *queues) for _ in range(8)]
            consumers = [await worker.__aenter__() for worker in workers]
            try:
                for consumer in consumers:
                    await consumer.until_idle()
                messages = [task(queues[number % 2], f"{number}") for number in range(8)]
                if at_once:
                    await sender.kick_many(messages)
                else:
                    await asyncio.gather(*map(sender.kick, messages))
                # nobody acks or asks again, so each must have woken for one of its own
                taken = await asyncio.gather(*(c.take(AT_ONCE_SECONDS) for c in consumers))
                assert {delivery.data for delivery in taken} == {m.message for m in messages}
            finally:
                for worker in workers:
                    await worker.__aexit__(None, None, None)

    run(test())


# --- outages ---


def _unused(options: ServerOptions) -> ServerOptions:
    port = 1  # tcpmux, which nobody runs
    if is_redis(options.url):
        return replace(options, url=f"redis://user:{SECRET}@127.0.0.1:{port}/0")
    return replace(options, url=f"amqp://user:{SECRET}@127.0.0.1:{port}/")


def test_an_unreachable_server_is_reported_quickly(broker_options: ServerOptions) -> None:
    async def test() -> None:
        broker = open_broker(_unused(broker_options))
        for action in (
            broker.startup,
            lambda: broker.kick(task("q", "a")),
            lambda: broker.depth("q"),
            lambda: broker.absent("q", ["a"]),
        ):
            start = time.monotonic()
            with pytest.raises(UnreachableServerError, match=r"127\.0\.0\.1:1") as caught:
                await action()
            assert time.monotonic() - start < AT_ONCE_SECONDS
            assert SECRET not in str(caught.value)
            assert SECRET not in caught.value.address
        await broker.shutdown()

    run(test())


def test_a_server_that_does_not_answer_is_unreachable(broker_options: ServerOptions) -> None:
    async def test() -> None:
        async with proxied(broker_options) as (options, proxy):
            proxy.freeze()
            broker = open_broker(options)
            start = time.monotonic()
            with pytest.raises(UnreachableServerError, match="within 1 s"):
                await broker.startup()
            assert time.monotonic() - start < 1 + AT_ONCE_SECONDS
            await broker.shutdown()

    run(test())


def test_wrong_credentials_are_refused(broker_options: ServerOptions) -> None:
    async def test() -> None:
        parts = urlsplit(broker_options.url)
        host = parts.netloc.rpartition("@")[2]
        url = parts._replace(netloc=f"nobody:{SECRET}@{host}").geturl()
        broker = open_broker(replace(broker_options, url=url))
        start = time.monotonic()
        with pytest.raises(RefusedByServerError, match="nobody") as caught:
            await broker.startup()
        assert time.monotonic() - start < broker_options.connect_timeout_seconds
        assert SECRET not in str(caught.value)
        await broker.shutdown()

    run(test())


def test_a_cut_connection_is_restored(
    broker_options: ServerOptions, caplog: pytest.LogCaptureFixture
) -> None:
    """Idle or just woken, the listener goes on, and the sender hardly notices."""

    async def test() -> None:
        queue = queue_name(broker_options)
        async with (
            proxied(broker_options) as (options, proxy),
            opened(options) as sender,
            consuming(options, queue) as consumer,
        ):
            for round_ in range(5):
                await consumer.until_idle()
                proxy.cut()
                await sender.kick(task(queue, f"{round_}"))
                assert await consumer.finish() == f"{round_}"

    run(test())
    assert SECRET not in caplog.text


def test_an_outage_is_survived_and_logged_once(
    broker_options: ServerOptions, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        queue = queue_name(broker_options)
        async with (
            proxied(broker_options) as (options, proxy),
            opened(options) as sender,
            consuming(options, queue) as consumer,
        ):
            await consumer.until_idle()
            proxy.close()
            start = time.monotonic()
            with pytest.raises(UnreachableServerError, match=r"127\.0\.0\.1"):
                await sender.kick(task(queue, "lost"))
            assert time.monotonic() - start < 1 + AT_ONCE_SECONDS
            with pytest.raises(asyncio.TimeoutError):
                await consumer.take(1.5)  # several tries to connect
            await proxy.open()
            await sender.kick(task(queue, "found"))
            assert await consumer.finish() == "found"

    with caplog.at_level(logging.INFO):
        run(test())
    ours = [r.getMessage() for r in caplog.records if r.name == "dagster_taskiq.brokers.base"]
    assert [text for text in ours if "goes on when it is back" in text] == ours[:1]
    assert [text for text in ours if "again after" in text] == ours[1:]
    assert "error when creating transport" not in caplog.text
    assert "reader exited abnormally" not in caplog.text


def test_a_frozen_server_is_survived(broker_options: ServerOptions) -> None:
    """Nothing answers, with the connections up; calls end in time, and all works afterwards."""

    async def test() -> None:
        queue = queue_name(broker_options)
        async with (
            proxied(broker_options) as (options, proxy),
            opened(options) as sender,
            consuming(options, queue) as consumer,
        ):
            await sender.kick(task(queue, "a"))
            assert await consumer.finish() == "a"
            proxy.freeze()
            start = time.monotonic()
            with pytest.raises(UnreachableServerError):
                await sender.depth(queue)
            with pytest.raises(asyncio.TimeoutError):
                await consumer.take(1.5)
            assert time.monotonic() - start < 3 + AT_ONCE_SECONDS
            proxy.thaw()
            await eventually(lambda: _succeeds(sender.kick(task(queue, "b"))))
            assert await consumer.finish() == "b"

    run(test())


async def _succeeds(call: Awaitable[object]) -> bool:
    try:
        await call
    except UnreachableServerError:
        return False
    return True


# --- TLS ---


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """PEM files of a certificate for 127.0.0.1, and of its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        missing("No openssl on PATH to make a certificate with.")
    directory = tmp_path_factory.mktemp("tls")
    files = (str(directory / "cert.pem"), str(directory / "key.pem"))
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    command += ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, "-out", files[0], "-keyout", files[1]], check=True, timeout=60)
    return files


def test_tls_servers_are_verified(
    broker_options: ServerOptions, certificate: tuple[str, str]
) -> None:
    """By the given authority; not at all where that is asked for; otherwise refused."""

    async def test() -> None:
        queue = queue_name(broker_options)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*certificate)
        async with proxied(broker_options, context) as (options, _):
            for tls in (Tls(ca_file=certificate[0]), Tls(verify=False)):
                async with consuming(replace(options, tls=tls), queue) as consumer:
                    await consumer.broker.kick(task(queue, "secret"))
                    assert await consumer.finish() == "secret"
            unverified = open_broker(options)
            with pytest.raises(RefusedByServerError, match="certificate cannot be trusted"):
                await unverified.startup()
            await unverified.shutdown()
            with pytest.raises(ConfigError, match="/no/such/file"):
                await open_broker(replace(options, tls=Tls(ca_file="/no/such/file"))).startup()

    run(test())


# --- use ---


def test_a_broker_without_queues_cannot_listen(broker_options: ServerOptions) -> None:
    async def test() -> None:
        async with opened(broker_options) as broker:
            with pytest.raises(ConfigError, match="without queues"):
                await anext(broker.listen())

    run(test())


def test_a_task_without_a_queue_is_refused(broker_options: ServerOptions) -> None:
    async def test() -> None:
        async with opened(broker_options) as broker:
            with pytest.raises(ConfigError, match="queue_name"):
                await broker.kick(task("", "a"))

    run(test())


def test_a_listener_ends_with_its_broker(broker_options: ServerOptions) -> None:
    async def test() -> None:
        async with opened(broker_options, queue_name(broker_options)) as broker:
            consumer = Consumer(broker)
            await consumer.until_idle()
            await broker.shutdown()
            with pytest.raises(StopAsyncIteration):
                await consumer.take()

    run(test())


@pytest.mark.parametrize("url", ["redis://127.0.0.1:port/0", "amqp://127.0.0.1:port/"])
def test_a_url_that_cannot_be_read_is_a_config_error(url: str) -> None:
    with pytest.raises(ConfigError, match="port"):
        open_broker(ServerOptions(url=url))


# --- only Redis and Valkey ---


def keys_of(options: ServerOptions) -> set[str]:
    with redis.Redis.from_url(options.url) as client:
        return {key.decode() for key in client.scan_iter(f"{options.key_prefix}*", count=1000)}


def test_empty_queues_leave_no_keys_on_redis(on_redis: ServerOptions) -> None:
    """Whichever way the tasks went; only the count of all tasks stays."""

    async def test() -> None:
        queues = [queue_name(on_redis, name) for name in "ab"]
        async with consuming(on_redis, *queues) as consumer:
            broker = consumer.broker
            for queue in queues:
                ids = [f"{queue[-1]}{number}" for number in range(10)]
                await broker.kick_many([task(queue, task_id) for task_id in ids])
                assert await broker.withdraw(queue, ids[:5]) == set(ids[:5])
            names = keys_of(on_redis) - _count(on_redis)
            assert all(any(name.startswith(queue) for queue in queues) for name in names)
            await (await consumer.take()).release()
            for _ in range(10):
                await consumer.finish()
            assert keys_of(on_redis) == _count(on_redis)
            await broker.kick(task(queues[0], "last"))
            await broker.withdraw(queues[0], ["last"])
            assert keys_of(on_redis) == _count(on_redis)

    run(test())


def _count(options: ServerOptions) -> set[str]:
    return {f"{options.key_prefix}.sequence"}


def test_a_task_sent_again_keeps_its_place_on_redis(on_redis: ServerOptions) -> None:
    """Waiting or in hand: the sender of the second was not sure about the first."""

    async def test() -> None:
        queue = queue_name(on_redis)
        async with consuming(on_redis, queue) as consumer:
            broker = consumer.broker
            await broker.kick_many([task(queue, text) for text in "abc"])
            await broker.kick(task(queue, "a", priority=1))
            in_hand = await consumer.take()
            await broker.kick_many([task(queue, "a"), task(queue, "b", priority=0)])
            assert await broker.depth(queue) == 2
            await in_hand.release()
            assert [await consumer.finish() for _ in range(3)] == ["a", "b", "c"]
            assert await broker.depth(queue) == 0

    run(test())


def test_queues_do_not_share_keys_on_redis(on_redis: ServerOptions) -> None:
    """Not even when one is called like a part of the other."""

    async def test() -> None:
        queues = [queue_name(on_redis, name) for name in ("a", "a:waiting", "a:bell")]
        async with opened(on_redis) as broker:
            for queue in queues:
                await broker.kick(task(queue, queue))
            assert [await broker.depth(queue) for queue in queues] == [1, 1, 1]

    run(test())


def test_a_late_ack_removes_the_copy_on_redis(
    on_redis: ServerOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker stalled, its task went back, and it claimed it all the same."""
    monkeypatch.setattr(RedisTaskBroker, "in_hand_seconds", 0.0)

    async def test() -> None:
        queue = queue_name(on_redis)
        async with (
            consuming(on_redis, queue) as slow,
            consuming(on_redis, queue) as other,
        ):
            await slow.broker.kick(task(queue, "a"))
            late = await slow.take()
            copy = await other.take()
            await copy.release()
            assert await slow.broker.depth(queue) == 1
            await late.ack()
            assert keys_of(on_redis) == _count(on_redis)

    run(test())


def test_a_late_release_leaves_another_workers_task_alone_on_redis(
    on_redis: ServerOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        queue = queue_name(on_redis)
        async with (
            consuming(on_redis, queue) as slow,
            consuming(on_redis, queue) as other,
        ):
            monkeypatch.setattr(RedisTaskBroker, "in_hand_seconds", 0.0)
            await slow.broker.kick(task(queue, "a"))
            late = await slow.take()
            monkeypatch.undo()
            taken = await other.take()
            await late.release()
            assert await slow.broker.depth(queue) == 0
            await taken.release()
            assert await slow.broker.depth(queue) == 1

    run(test())


def test_a_lost_ring_is_healed_on_redis(
    on_redis: ServerOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody took the ring with it into its grave: by the next taker, or by the slow look."""
    monkeypatch.setattr("dagster_taskiq.brokers.redis.SLOW_LOOK_SECONDS", 0.5)

    async def test() -> None:
        queue = queue_name(on_redis)
        with redis.Redis.from_url(on_redis.url) as client:
            async with opened(on_redis) as sender, consuming(on_redis, queue) as consumer:
                await sender.kick_many([task(queue, text) for text in "abc"])
                client.delete(f"{queue}:bell")
                assert await consumer.finish() == "a"
                assert client.llen(f"{queue}:bell") == 1
                assert await consumer.finish() == "b"
                await consumer.finish()
                await consumer.until_idle()
                # a task without a ring
                client.zadd(f"{queue}:waiting", {"d": 1})
                client.hset(f"{queue}:payloads", "d", "d")
                assert await consumer.finish() == "d"

    run(test())


def test_flushed_scripts_are_loaded_again_on_redis(on_redis: ServerOptions) -> None:
    """As after a restart of the server; the flush harms nobody else, who loads them too."""

    async def test() -> None:
        queue = queue_name(on_redis)
        with redis.Redis.from_url(on_redis.url) as client:
            async with consuming(on_redis, queue) as consumer:
                client.script_flush()
                await consumer.broker.kick(task(queue, "a"))
                client.script_flush()
                delivery = await consumer.take()
                client.script_flush()
                await delivery.ack()
                assert keys_of(on_redis) == _count(on_redis)

    run(test())


def test_a_server_that_restarts_during_a_command_is_given_the_scripts_on_redis(
    on_redis: ServerOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection breaks, and whoever answers then has forgotten the scripts."""
    failures = [redis.ConnectionError("the server was killed")]

    async def test() -> None:
        queue = queue_name(on_redis)
        async with opened(on_redis) as broker:
            assert isinstance(broker, RedisTaskBroker)
            whole = broker._pipeline

            async def breaking(commands: Any) -> list[Any]:
                if failures:
                    with redis.Redis.from_url(on_redis.url) as client:
                        client.script_flush()
                    raise failures.pop()
                return await whole(commands)

            monkeypatch.setattr(broker, "_pipeline", breaking)
            await broker.kick(task(queue, "a"))
            assert await broker.depth(queue) == 1

    run(test())


def test_an_error_of_redis_is_a_refusal_without_the_payload(on_redis: ServerOptions) -> None:
    async def test() -> None:
        queue = queue_name(on_redis)
        with redis.Redis.from_url(on_redis.url) as client:
            client.set(f"{queue}:waiting", "of another kind")
            async with opened(on_redis) as broker:
                with pytest.raises(RefusedByServerError, match="WRONGTYPE") as caught:
                    await broker.kick(task(queue, SECRET))
                assert SECRET not in str(caught.value)

    run(test())


def test_a_killed_server_keeps_its_queues_on_redis() -> None:
    """With an append-only file; what was in hand, and with which token, is there too."""

    async def test(server: PrivateRedis) -> None:
        queue = queue_name(server.options)
        async with consuming(server.options, queue) as consumer:
            await consumer.broker.kick_many([task(queue, text) for text in "abc"])
            in_hand = await consumer.take()
            server.kill()
            with pytest.raises(UnreachableServerError):
                await consumer.broker.kick(task(queue, "lost"))
            await asyncio.to_thread(server.restart)
            await in_hand.release()
            assert [await consumer.finish() for _ in range(3)] == ["a", "b", "c"]

    with private_redis() as server:
        run(test(server))


def test_a_password_that_is_missing_is_refused_on_redis() -> None:
    async def test(server: PrivateRedis) -> None:
        async with opened(server.options) as broker:
            assert await broker.depth("q") == 0
        parts = urlsplit(server.url)
        url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        broker = open_broker(replace(server.options, url=url))
        with pytest.raises(RefusedByServerError, match=r"(?i)auth"):
            await broker.startup()
        await broker.shutdown()

    with private_redis(password=SECRET) as server:
        run(test(server))


@pytest.mark.parametrize("kind", ["redis", "valkey"])
def test_a_full_server_takes_nothing_and_still_gives_on_redis(
    kind: Literal["redis", "valkey"],
) -> None:
    """The sender learns it at once, and no script is left half done; workers make room."""

    async def test(server: PrivateRedis) -> None:
        queue = queue_name(server.options)
        async with opened(server.options) as sender:
            await sender.kick_many([task(queue, text) for text in "abc"])
            with server.client() as client:
                client.config_set("maxmemory", 1)
            async with consuming(server.options, queue) as consumer:
                with pytest.raises(UnreachableServerError, match="maxmemory"):
                    await sender.kick(task(queue, "d"))
                assert await sender.absent(queue, "abcd") == {"d"}
                assert await sender.withdraw(queue, ["b"]) == {"b"}
                await (await consumer.take()).release()
                assert [await consumer.finish() for _ in range(2)] == ["a", "c"]
                assert keys_of(server.options) == _count(server.options)

    with private_redis(kind) as server:
        run(test(server))


def test_a_unix_socket_will_do_on_redis() -> None:
    async def test(server: PrivateRedis) -> None:
        queue = queue_name(server.options)
        async with consuming(server.options, queue) as consumer:
            await consumer.until_idle()
            await consumer.broker.kick(task(queue, "a"))
            assert await consumer.finish() == "a"

    with private_redis(unix_socket=True) as server:
        run(test(server))


# --- only RabbitMQ ---


def test_celerys_name_of_the_scheme_will_do_on_rabbitmq(on_rabbitmq: ServerOptions) -> None:
    async def test() -> None:
        url = "py" + on_rabbitmq.url
        async with consuming(replace(on_rabbitmq, url=url), queue_name(on_rabbitmq)) as consumer:
            await consumer.broker.kick(task(queue_name(on_rabbitmq), "a"))
            assert await consumer.finish() == "a"

    run(test())


async def _delete(options: ServerOptions, queue: str) -> None:
    async with await aio_pika.connect(options.url) as connection:
        await (await connection.channel()).queue_delete(queue)


def test_a_queue_of_another_kind_is_refused_on_rabbitmq(on_rabbitmq: ServerOptions) -> None:
    """By sender and listener, who say what to do about it; other queues still work."""

    async def test() -> None:
        queue, other = queue_name(on_rabbitmq), queue_name(on_rabbitmq, "other")
        async with await aio_pika.connect(on_rabbitmq.url) as connection:
            await (await connection.channel()).declare_queue(queue, durable=True)
        try:
            listener = open_broker(on_rabbitmq, [queue])
            with pytest.raises(RefusedByServerError, match="Delete it") as caught:
                await listener.startup()
            assert queue in str(caught.value)
            await listener.shutdown()
            async with opened(on_rabbitmq) as sender:
                with pytest.raises(RefusedByServerError, match="Delete it"):
                    await sender.kick(task(queue, "a"))
                await sender.kick(task(other, "a"))
                assert await sender.depth(other) == 1
        finally:
            await _delete(on_rabbitmq, queue)

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
def test_unreadable_properties_block_no_queue_on_rabbitmq(
    on_rabbitmq: ServerOptions, what: str, is_idle: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Their message is refused, counted and acked, though its body would be admitted."""

    async def test() -> None:
        queue = queue_name(on_rabbitmq)

        async with consuming(on_rabbitmq, queue) as consumer:
            if is_idle:
                await consumer.until_idle()
            async with await aio_pika.connect(on_rabbitmq.url) as connection:
                channel = await (await connection.channel()).get_underlay_channel()
                for _ in range(3):
                    await channel.basic_publish(
                        b"captured", routing_key=queue, properties=UNREADABLE[what]
                    )
                await consumer.broker.kick(task(queue, "good"))
                assert await consumer.finish() == "good"
            assert consumer.broker.refused_count == 3
            assert await consumer.broker.depth(queue) == 0

    run(test())
    assert "Listening goes on when it is back" not in caplog.text
    assert "its AMQP properties cannot be decoded" in caplog.text


def test_an_unknown_virtual_host_is_refused_on_rabbitmq(on_rabbitmq: ServerOptions) -> None:
    async def test() -> None:
        url = urlsplit(on_rabbitmq.url)._replace(path="/no-such-vhost").geturl()
        broker = open_broker(replace(on_rabbitmq, url=url))
        with pytest.raises(RefusedByServerError, match="vhost no-such-vhost not found"):
            await broker.startup()
        await broker.shutdown()

    run(test())


def test_an_ack_over_a_lost_connection_raises_on_rabbitmq(on_rabbitmq: ServerOptions) -> None:
    """The task comes once more, and the worker can know; a release has happened by itself."""

    async def test() -> None:
        queue = queue_name(on_rabbitmq)
        async with (
            proxied(on_rabbitmq) as (options, proxy),
            consuming(options, queue) as consumer,
        ):
            await consumer.broker.kick_many([task(queue, text) for text in "ab"])
            first, second = await consumer.take(), await consumer.take()
            proxy.cut()
            await consumer.broker.depth(queue)  # over a new connection
            with pytest.raises(UnreachableServerError, match="delivered again"):
                await first.ack()
            assert not first.settled
            await second.release()
            assert second.settled
            assert [await consumer.finish() for _ in range(2)] == ["a", "b"]

    run(test())


def test_a_deleted_queue_is_made_again_on_rabbitmq(
    on_rabbitmq: ServerOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the sender that knew it, whose task would be lost, and by the listener, idle or not."""
    monkeypatch.setattr("dagster_taskiq.brokers.amqp.SLOW_LOOK_SECONDS", 0.5)

    async def test() -> None:
        queue = queue_name(on_rabbitmq)
        async with opened(on_rabbitmq) as sender, consuming(on_rabbitmq, queue) as consumer:
            await sender.kick(task(queue, "a"))
            assert await consumer.finish() == "a"
            await _delete(on_rabbitmq, queue)
            await sender.kick(task(queue, "b"))
            assert await consumer.finish() == "b"
            await consumer.until_idle()
            await _delete(on_rabbitmq, queue)
            await sender.kick_many([task(queue, text) for text in "cd"])
            assert [await consumer.finish() for _ in range(2)] == ["c", "d"]
            await consumer.until_idle()
            await _delete(on_rabbitmq, queue)
            await eventually(lambda: _exists(on_rabbitmq, queue))

    run(test())


async def _exists(options: ServerOptions, queue: str) -> bool:
    async with await aio_pika.connect(options.url) as connection:
        try:
            await (await connection.channel()).get_queue(queue)
        except aio_pika.exceptions.ChannelNotFoundEntity:
            return False
    return True


def test_tasks_are_persistent_in_durable_queues_on_rabbitmq(on_rabbitmq: ServerOptions) -> None:
    async def test() -> None:
        queue = queue_name(on_rabbitmq)
        async with opened(on_rabbitmq) as sender:
            await sender.kick(task(queue, "a", priority=7))
        async with await aio_pika.connect(on_rabbitmq.url) as connection:
            channel = await connection.channel()
            arguments: dict[str, Any] = {"x-max-priority": 10, "x-queue-type": "classic"}
            found = await channel.declare_queue(queue, durable=True, arguments=arguments)
            message = await found.get()
            assert message is not None
            assert message.delivery_mode == aio_pika.DeliveryMode.PERSISTENT
            assert (message.priority, message.correlation_id) == (7, "a")
            await message.ack()

    run(test())
