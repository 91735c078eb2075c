"""What wakes a run's loop: a bell of the broker, in place of the backend's own."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any, cast

import aio_pika
import pytest

from dagster_taskiq.backend import Backend, Claim, ClaimAnswer, open_backend, postgresql_hints
from dagster_taskiq.backend.postgresql import PostgresqlBackend
from dagster_taskiq.brokers import open_bell
from dagster_taskiq.messages.results import NOWHERE
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.servers.bell import Bell, Hearing
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq_tests.proxy import Mode, Proxy, proxied
from dagster_taskiq_tests.servers import amqp_options, postgres_options, redis_options

#: For what must happen, on a loaded machine.
PATIENCE_SECONDS = 20.0

#: More than a loop's pause between two looks that hears no hints, with room for a loaded machine.
OFTEN_SECONDS = 2.0

#: The pause of one that does, here; it is at least seven tenths of this.
SELDOM_SECONDS = 1.5


@pytest.fixture(autouse=True)
def _seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgresql_hints, "_LOOK_SECONDS", SELDOM_SECONDS)


@pytest.fixture
def amqp() -> Iterator[ServerOptions]:
    with amqp_options() as options:
        yield options


@pytest.fixture
def postgres() -> Iterator[ServerOptions]:
    with postgres_options() as options:
        yield options


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


@asynccontextmanager
async def bells(options: ServerOptions, count: int) -> AsyncIterator[list[Bell]]:
    """Of several processes."""
    opened = [open_bell(options, ServerOptions("postgresql://h/d")) for _ in range(count)]
    try:
        yield [bell for bell in opened if bell is not None]
    finally:
        for bell in opened:
            assert bell is not None
            await bell.close()


async def heard(bell: Bell, mailbox: str, arrived: asyncio.Event) -> Hearing:
    hearing = await bell.listen(mailbox, arrived)
    assert hearing is not None
    return hearing


def test_only_a_backend_that_wakes_everybody_has_another_bell(
    amqp: ServerOptions, postgres: ServerOptions
) -> None:
    async def test() -> None:
        with redis_options() as redis:
            assert open_bell(amqp, redis) is None
            assert open_bell(redis, postgres) is None
        assert open_bell(postgres, postgres) is None
        bell = open_bell(amqp, postgres)
        assert bell is not None
        await bell.close()

    run(test())


def test_hints_go_to_who_listens(amqp: ServerOptions) -> None:
    """To nobody else; without a listener they are gone; what is no hint of ours is left out."""

    async def test() -> None:
        async with bells(amqp, 2) as (loop, worker):
            worker.ring("one", "too early")
            arrived, other = asyncio.Event(), asyncio.Event()
            one = await heard(loop, "one", arrived)
            two = await heard(loop, "two", other)
            for hint in ("a", "", "x" * 1001, "b", "\x01é"):
                worker.ring("one", hint)
            await until(lambda: one.hints >= {"a", "b", "\x01é"})
            assert one.hints == {"a", "b", "\x01é"}
            assert arrived.is_set()
            assert not two.has_heard
            assert not other.is_set()

    run(test())


def test_a_loop_that_takes_over_hears_beside_its_predecessor(amqp: ServerOptions) -> None:
    """Each hint comes to one of them; when the first has ended the other has them all."""

    async def test() -> None:
        async with bells(amqp, 3) as (old, new, worker):
            first = await heard(old, "run", asyncio.Event())
            second = await heard(new, "run", asyncio.Event())
            first.close()
            await until(lambda: first.is_lost)
            worker.ring("run", "a")
            await until(lambda: "a" in second.hints)

    run(test())


def test_the_queue_of_a_run_goes_with_its_loop(amqp: ServerOptions) -> None:
    async def test() -> None:
        async with await aio_pika.connect(amqp.url) as connection:
            queue = f"{amqp.key_prefix}.hints.run"
            async with bells(amqp, 1) as (bell,):
                await heard(bell, "run", asyncio.Event())
                channel = await connection.channel()
                await channel.declare_queue(queue, passive=True)
            deadline = time.monotonic() + PATIENCE_SECONDS
            while True:
                channel = await connection.channel()
                try:
                    await channel.declare_queue(queue, passive=True)
                except aio_pika.exceptions.ChannelNotFoundEntity:
                    return
                assert time.monotonic() < deadline, "the queue is still there"

    run(test())


# --- a backend with a bell ---


class Pair:
    """A loop's and a worker's view of a backend with a bell, in an open run."""

    def __init__(self, postgres: ServerOptions, broker: ServerOptions) -> None:
        self.loop, self.worker = (
            open_backend(postgres, Signer(), open_bell(broker, postgres)) for _ in range(2)
        )
        self.run_id = uuid.uuid4().hex
        self.epoch = ""

    async def open(self) -> None:
        self.epoch = await self.loop.open_run(
            self.run_id, generation=0, token="t", is_resumable=False, lease_seconds=60
        )

    async def claimed(self) -> Claim:
        claim = Claim(self.run_id, uuid.uuid4().hex, "w", 60, self.epoch, NOWHERE)
        assert await self.worker.claim(claim, needs_live_run=True) is ClaimAnswer.GRANTED
        return claim

    async def arrival_seconds(self, worker: Backend | None = None) -> float:
        """From the completion of a task to the arrival of its result."""
        claim = await self.claimed()
        waiting = asyncio.ensure_future(self.loop.wait_for_results(self.run_id, 20))
        await asyncio.sleep(0)
        began = time.monotonic()
        assert await (worker or self.worker).complete(claim, b"x", expires_seconds=60)
        assert list(await waiting) == [claim.task_id]
        return time.monotonic() - began


@asynccontextmanager
async def pair(postgres: ServerOptions, broker: ServerOptions) -> AsyncIterator[Pair]:
    opened = Pair(postgres, broker)
    await opened.open()
    try:
        yield opened
    finally:
        await opened.loop.shutdown()
        await opened.worker.shutdown()


async def await_prompt(scene: Pair) -> None:
    """Until results come at once: the loop listens when it has waited for the first time."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while min([await scene.arrival_seconds() for _ in range(5)]) > 0.1:
        assert time.monotonic() < deadline, "no result came at once"


def test_results_come_at_once(postgres: ServerOptions, amqp: ServerOptions) -> None:
    """By hints alone: no session of the database listens, and looks are seldom."""

    async def test() -> None:
        async with pair(postgres, amqp) as scene:
            await await_prompt(scene)
            seconds = sorted([await scene.arrival_seconds() for _ in range(20)])
            assert seconds[10] < 0.1  # looks alone would take half of the pause between them
            # of a worker without the bell, such as one of an older version
            lone = open_backend(postgres, Signer())
            slow = [await scene.arrival_seconds(lone) for _ in range(2)]
            assert max(slow) > SELDOM_SECONDS / 2
            await lone.shutdown()

    run(test())


@pytest.mark.parametrize("is_notified", [False, True], ids=["rabbitmq", "notify"])
def test_a_bell_that_works_is_kept(
    postgres: ServerOptions,
    amqp: ServerOptions,
    monkeypatch: pytest.MonkeyPatch,
    is_notified: bool,
) -> None:
    """However many results a look finds of which the hint is on its way, or was just heard."""
    monkeypatch.setattr(postgresql_hints, "_LOOK_SECONDS", 0.05)

    async def test() -> None:
        async with pair(postgres, postgres if is_notified else amqp) as scene:
            bell = cast("PostgresqlBackend", scene.loop)._bell
            listen, call = bell.listen, cast("PostgresqlBackend", scene.loop)._call
            heard, looks = [], []

            async def counted_listen(*arguments: Any) -> Hearing | None:
                heard.append(await listen(*arguments))
                return heard[-1]

            async def counted_call(function: str, *values: Any, **options: Any) -> Any:
                looks.extend([function] if function == "list_results" else [])
                return await call(function, *values, **options)

            monkeypatch.setattr(bell, "listen", counted_listen)
            monkeypatch.setattr(scene.loop, "_call", counted_call)

            async def work() -> None:
                while True:
                    claim = await scene.claimed()
                    assert await scene.worker.complete(claim, b"x", expires_seconds=60)

            working = asyncio.create_task(work())
            while len(looks) < 60 and not working.done():
                await scene.loop.wait_for_results(scene.run_id, PATIENCE_SECONDS)
            working.cancel()
            await asyncio.wait({working})
            assert working.cancelled()
            assert len(heard) == 1
            assert heard[0] is not None

    run(test())


@pytest.mark.parametrize(("mode", "most_seconds"), [(Mode.REFUSE, OFTEN_SECONDS), (Mode.DROP, 15)])
def test_a_broker_that_is_away_is_no_outage_of_the_backend(
    postgres: ServerOptions, amqp: ServerOptions, mode: Mode, most_seconds: float
) -> None:
    """Results are looked for meanwhile, and come at once when it is back.

    Where nothing says that it is away, they are looked for as seldom as behind hints.
    """

    async def test(proxy: Proxy) -> None:
        async with pair(postgres, proxy.options(amqp)) as scene:
            await await_prompt(scene)
            with proxy.failing(mode):
                await scene.arrival_seconds()
                assert await scene.arrival_seconds() < most_seconds
            await await_prompt(scene)

    with proxied(amqp.url) as proxy:
        run(test(proxy))


def test_a_bell_that_is_refused_is_given_up(
    postgres: ServerOptions, amqp: ServerOptions, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once, and results are looked for often."""

    async def test() -> None:
        async with await aio_pika.connect(amqp.url) as connection:
            channel = await connection.channel()
            async with pair(postgres, amqp) as scene:
                # of another kind than ours
                name = f"{amqp.key_prefix}.hints.{scene.run_id}"
                queue = await channel.declare_queue(name, durable=True)
                seconds = [await scene.arrival_seconds() for _ in range(8)]
                assert max(seconds) < OFTEN_SECONDS
            await queue.delete(if_unused=False, if_empty=False)

    with caplog.at_level(logging.WARNING):
        run(test())
    assert caplog.text.count("several times a second") == 1
