"""Brokers for the tests of their contract: each kind of server, and what may happen to it.

A harness is a server, or a part of one that is nobody else's, with its accidents: it loses its
data, is away, does not answer. The tests of the contract know only this, never how a server keeps
its queues.
"""

from __future__ import annotations

import asyncio
import ssl
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    closing,
    contextmanager,
)
from dataclasses import replace
from typing import Any, Literal, Protocol, get_args
from urllib.parse import urlsplit

import aio_pika
import psycopg2
import pytest
import redis
from taskiq import BrokerMessage

from dagster_taskiq.brokers import Admission, Delivery, TaskBroker, open_broker
from dagster_taskiq.brokers.base import Listener
from dagster_taskiq.brokers.memory import MemoryBroker, MemoryQueues
from dagster_taskiq.brokers.postgresql import PostgresqlTaskBroker
from dagster_taskiq.brokers.redis import RedisTaskBroker
from dagster_taskiq.messages.envelope import QueueKind, physical_queue
from dagster_taskiq.servers.kinds import RABBITMQ, REDIS, ServerOptions
from dagster_taskiq.servers.postgresql_schema import schema_name
from dagster_taskiq_tests.proxy import Mode, Proxy
from dagster_taskiq_tests.servers import (
    amqp_options,
    postgres_options,
    redis_options,
    valkey_options,
)

Kind = Literal["memory", "unsearchable memory", "redis", "valkey", "rabbitmq", "postgres"]

#: Of every kind of server, the quickest first.
KINDS: tuple[Kind, ...] = get_args(Kind)

_OPTIONS: Mapping[str, Callable[[], AbstractContextManager[ServerOptions]]] = {
    "redis": redis_options,
    "valkey": valkey_options,
    "rabbitmq": amqp_options,
    "postgres": postgres_options,
}

#: For what must happen, on a loaded machine.
PATIENCE_SECONDS = 20.0

#: For what must happen by push, long before any slow look.
AT_ONCE_SECONDS = 2.0

#: In place of the 15 s that a dead worker's tasks stay in hand on Redis.
IN_HAND_SECONDS = 0.5

SECRET = "opensesame"


class Brokers(Protocol):
    """Where brokers of one server come from."""

    def broker(self, *queues: str, admission: Admission | None = None) -> TaskBroker:
        """Another process' view of the server, not yet connected."""


class Network(ABC):
    """How some brokers reach a server: it fails as networks do.

    Attributes:
        place: what errors call the server, as a pattern.
    """

    place: str

    @abstractmethod
    def broker(self, *queues: str, admission: Admission | None = None) -> TaskBroker:
        """A broker that reaches the server this way, with little patience; not yet connected."""

    @abstractmethod
    def cut(self) -> None:
        """Break all connections."""

    @abstractmethod
    def close(self) -> None:
        """Break all connections and let no new ones through."""

    @abstractmethod
    async def open(self) -> None:
        """Let connections through."""

    @abstractmethod
    def freeze(self) -> None:
        """Let nothing through any more, with the connections up."""

    @abstractmethod
    def thaw(self) -> None:
        """Undo ``freeze``."""


class Harness(ABC):
    """A server, or a part of one that is nobody else's.

    Attributes:
        is_searchable: whether it finds tasks in a queue by their ids.
    """

    is_searchable: bool

    @abstractmethod
    def queue(self, name: str = "q") -> str:
        """The physical name of a queue of this harness alone."""

    @abstractmethod
    def broker(self, *queues: str, admission: Admission | None = None) -> TaskBroker:
        """Another process' view of the server, not yet connected."""

    @abstractmethod
    def nowhere(self) -> TaskBroker:
        """A broker of such a server that is away, with ``SECRET`` where there are passwords."""

    @abstractmethod
    def network(self) -> AbstractAsyncContextManager[Network]:
        """Another way to the server, open."""

    @abstractmethod
    async def forget(self) -> None:
        """Lose all queues with their tasks."""

    @abstractmethod
    def hasten(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        in_hand_seconds: float,
        hold_every_seconds: float | None = None,
        slow_look_seconds: float | None = None,
    ) -> None:
        """Where time decides what a dead listener had in hand, let less of it pass."""

    def in_vain_seconds(self, on_servers: float) -> float:
        """How long to wait for what does not come."""
        return on_servers


class MemoryHarness(Harness):
    """In this process, where nothing takes time."""

    def __init__(self, *, is_searchable: bool) -> None:
        self.is_searchable = is_searchable
        self.server = MemoryQueues(is_searchable=is_searchable)

    def queue(self, name: str = "q") -> str:
        return name

    def broker(self, *queues: str, admission: Admission | None = None) -> TaskBroker:
        return MemoryBroker(self.server, queues, admission)

    def nowhere(self) -> TaskBroker:
        server = MemoryQueues("nowhere")
        server.freeze()
        return MemoryBroker(server)

    @asynccontextmanager
    async def network(self) -> AsyncIterator[Network]:
        network = MemoryNetwork(self.server)
        try:
            yield network
        finally:
            network.thaw()
            network.close()

    async def forget(self) -> None:
        self.server.forget()

    def hasten(self, monkeypatch: pytest.MonkeyPatch, **_seconds: float | None) -> None:
        """Time decides nothing: what a dead listener had in hand goes back at once."""

    def in_vain_seconds(self, on_servers: float) -> float:
        return min(on_servers, 0.3)


class MemoryNetwork(Network):
    """Its ``freeze`` is that of the server, which is the test's own."""

    def __init__(self, server: MemoryQueues) -> None:
        self.place = server.address
        self._server = server
        self._brokers: list[MemoryBroker] = []

    def broker(self, *queues: str, admission: Admission | None = None) -> TaskBroker:
        self._brokers.append(MemoryBroker(self._server, queues, admission))
        return self._brokers[-1]

    def cut(self) -> None:
        for broker in self._brokers:
            broker.disconnect()
            broker.connect()

    def close(self) -> None:
        for broker in self._brokers:
            broker.disconnect()

    async def open(self) -> None:
        for broker in self._brokers:
            broker.connect()

    def freeze(self) -> None:
        self._server.freeze()

    def thaw(self) -> None:
        self._server.thaw()


class ServerHarness(Harness):
    """A prefix of names on a real server."""

    def __init__(self, options: ServerOptions) -> None:
        self.options = options

    def queue(self, name: str = "q") -> str:
        return physical_queue(self.options.key_prefix, QueueKind.STEPS, name)

    def broker(self, *queues: str, admission: Admission | None = None) -> TaskBroker:
        return open_broker(self.options, queues, admission)

    def nowhere(self) -> TaskBroker:
        # tcpmux, which nobody runs
        scheme = urlsplit(self.options.url).scheme
        url = f"{scheme}://user:{SECRET}@127.0.0.1:1/{'0' if scheme == 'redis' else ''}"
        return open_broker(replace(self.options, url=url))

    @asynccontextmanager
    async def network(self) -> AsyncIterator[Network]:
        with proxied(self.options) as network:
            yield network


class RedisHarness(ServerHarness):
    """On a Redis or Valkey."""

    is_searchable = True

    def keys(self) -> set[str]:
        """All that it keeps."""
        with redis.Redis.from_url(self.options.url) as client:
            found = client.scan_iter(f"{self.options.key_prefix}*", count=1000)
            return {key.decode() for key in found}

    async def forget(self) -> None:
        with redis.Redis.from_url(self.options.url) as client:
            client.delete(*self.keys())

    def hasten(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        in_hand_seconds: float,
        hold_every_seconds: float | None = None,
        slow_look_seconds: float | None = None,
    ) -> None:
        monkeypatch.setattr(RedisTaskBroker, "in_hand_seconds", in_hand_seconds)
        if hold_every_seconds is not None:
            monkeypatch.setattr(RedisTaskBroker, "hold_every_seconds", hold_every_seconds)
        if slow_look_seconds is not None:
            module = "dagster_taskiq.brokers.redis"
            monkeypatch.setattr(f"{module}.SLOW_LOOK_SECONDS", slow_look_seconds)


class AmqpHarness(ServerHarness):
    """On a RabbitMQ."""

    is_searchable = False

    def __init__(self, options: ServerOptions) -> None:
        super().__init__(options)
        self._queues: set[str] = set()

    def queue(self, name: str = "q") -> str:
        queue = super().queue(name)
        self._queues.add(queue)
        return queue

    async def forget(self) -> None:
        for queue in self._queues:
            await self.delete(queue)

    def hasten(self, monkeypatch: pytest.MonkeyPatch, **_seconds: float | None) -> None:
        """Time decides nothing: what a dead listener had in hand goes back at once."""

    async def delete(self, queue: str) -> None:
        """Delete one queue with its tasks."""
        async with await aio_pika.connect(self.options.url) as connection:
            await (await connection.channel()).queue_delete(queue)

    async def has(self, queue: str) -> bool:
        """Whether a queue is there."""
        async with await aio_pika.connect(self.options.url) as connection:
            try:
                await (await connection.channel()).get_queue(queue)
            except aio_pika.exceptions.ChannelNotFoundEntity:
                return False
        return True


class PostgresHarness(ServerHarness):
    """A schema on a PostgreSQL."""

    is_searchable = True

    @property
    def schema(self) -> str:
        """Its name."""
        return schema_name(self.options.key_prefix)

    def execute(self, statement: str, values: Sequence[Any] | None = None) -> list[Any]:
        """The rows of a statement, in which ``{s}`` stands for the schema."""
        statement = statement.replace("{s}", f'"{self.schema}"')
        with (
            closing(psycopg2.connect(self.options.url)) as connection,
            connection,
            connection.cursor() as cursor,
        ):
            cursor.execute(statement, values)
            return cursor.fetchall() if cursor.description else []

    async def forget(self) -> None:
        self.execute("TRUNCATE {s}.messages")

    def hasten(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        in_hand_seconds: float,
        hold_every_seconds: float | None = None,
        slow_look_seconds: float | None = None,
    ) -> None:
        """No look is slow."""
        monkeypatch.setattr(PostgresqlTaskBroker, "in_hand_seconds", in_hand_seconds)
        if hold_every_seconds is not None:
            monkeypatch.setattr(PostgresqlTaskBroker, "hold_every_seconds", hold_every_seconds)


def harness_of(options: ServerOptions) -> ServerHarness:
    """A prefix of names on the server that a URL names."""
    if options.kind is REDIS:
        return RedisHarness(options)
    return AmqpHarness(options) if options.kind is RABBITMQ else PostgresHarness(options)


@contextmanager
def opened_harness(kind: Kind) -> Iterator[Harness]:
    """Of the session's server of that kind, a part that is the test's own."""
    if kind in _OPTIONS:
        with _OPTIONS[kind]() as options:
            yield harness_of(options)
    else:
        yield MemoryHarness(is_searchable=kind == "memory")


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 90))


def task(queue: str, text: str = "", **labels: Any) -> BrokerMessage:
    return BrokerMessage(
        task_id=text or str(uuid.uuid4()),
        task_name="execute_plan",
        message=text.encode(),
        labels={"queue_name": queue, **labels},
    )


@asynccontextmanager
async def opened(
    brokers: Brokers, *queues: str, admission: Admission | None = None
) -> AsyncIterator[TaskBroker]:
    broker = brokers.broker(*queues, admission=admission)
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


class Everything(Admission):
    """Admits every message as it is, and remembers what is refused all the same."""

    def __init__(self) -> None:
        self.refusals: list[str] = []

    def admit(self, data: bytes) -> object:
        return data

    def refused(self, address: str, error: Exception) -> None:
        self.refusals.append(str(error))


@asynccontextmanager
async def consuming(
    brokers: Brokers, *queues: str, admission: Admission | None = None
) -> AsyncIterator[Consumer]:
    async with opened(brokers, *queues, admission=admission) as broker:
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


class ProxyNetwork(Network):
    """Through a TCP proxy.

    Attributes:
        options: the same server through the proxy, and with little patience.
    """

    place = r"127\.0\.0\.1"

    def __init__(self, options: ServerOptions, proxy: Proxy) -> None:
        self.options = replace(options, url=proxy.url, connect_timeout_seconds=1)
        self._proxy = proxy

    def broker(self, *queues: str, admission: Admission | None = None) -> TaskBroker:
        return open_broker(self.options, queues, admission)

    def cut(self) -> None:
        self._proxy.cut()

    def close(self) -> None:
        self._proxy.set(Mode.REFUSE)

    async def open(self) -> None:
        self._proxy.set(Mode.PASS)

    def freeze(self) -> None:
        self._proxy.set(Mode.HOLD)

    def thaw(self) -> None:
        self._proxy.set(Mode.PASS)


@contextmanager
def proxied(options: ServerOptions, tls: ssl.SSLContext | None = None) -> Iterator[ProxyNetwork]:
    """The same server through a proxy, which speaks TLS where it has a context for it."""
    with closing(Proxy(options.client_url, tls=tls)) as proxy:
        yield ProxyNetwork(options, proxy)
