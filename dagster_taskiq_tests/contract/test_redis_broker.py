"""What only the broker on Redis and Valkey has: its keys, its bell, its scripts, its files."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, cast
from urllib.parse import urlsplit

import pytest
import redis

from dagster_taskiq.brokers import open_broker
from dagster_taskiq.brokers import redis as redis_broker
from dagster_taskiq.brokers.redis import RedisTaskBroker
from dagster_taskiq.errors import RefusedByServerError, UnreachableServerError
from dagster_taskiq_tests.contract.broker_bench import (
    SECRET,
    Kind,
    RedisHarness,
    consuming,
    opened,
    opened_harness,
    run,
    task,
)
from dagster_taskiq_tests.servers import PrivateRedis, private_redis


@pytest.fixture(params=["redis", "valkey"])
def harness(request: pytest.FixtureRequest) -> Iterator[RedisHarness]:
    with opened_harness(cast("Kind", request.param)) as harness:
        assert isinstance(harness, RedisHarness)
        yield harness


def test_empty_queues_leave_no_keys(harness: RedisHarness) -> None:
    """Whichever way the tasks went; only the count of all tasks stays."""

    async def test() -> None:
        queues = [harness.queue(name) for name in "ab"]
        async with consuming(harness, *queues) as consumer:
            broker = consumer.broker
            for queue in queues:
                ids = [f"{queue[-1]}{number}" for number in range(10)]
                await broker.kick_many([task(queue, task_id) for task_id in ids])
                assert await broker.withdraw(queue, ids[:5]) == set(ids[:5])
            names = harness.keys() - _count(harness)
            assert all(any(name.startswith(queue) for queue in queues) for name in names)
            await (await consumer.take()).release()
            for _ in range(10):
                await consumer.finish()
            assert harness.keys() == _count(harness)
            await broker.kick(task(queues[0], "last"))
            await broker.withdraw(queues[0], ["last"])
            assert harness.keys() == _count(harness)

    run(test())


def _count(harness: RedisHarness) -> set[str]:
    return {f"{harness.options.key_prefix}.sequence"}


def test_queues_do_not_share_keys(harness: RedisHarness) -> None:
    """Not even when one is called like a part of the other."""

    async def test() -> None:
        queues = [harness.queue(name) for name in ("a", "a:waiting", "a:bell")]
        async with opened(harness) as broker:
            for queue in queues:
                await broker.kick(task(queue, queue))
            assert [await broker.depth(queue) for queue in queues] == [1, 1, 1]

    run(test())


def test_a_late_ack_removes_the_copy(
    harness: RedisHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker stalled, its task went back, and it claimed it all the same."""
    monkeypatch.setattr(RedisTaskBroker, "in_hand_seconds", 0.0)

    async def test() -> None:
        queue = harness.queue()
        async with (
            consuming(harness, queue) as slow,
            consuming(harness, queue) as other,
        ):
            await slow.broker.kick(task(queue, "a"))
            late = await slow.take()
            copy = await other.take()
            await copy.release()
            assert await slow.broker.depth(queue) == 1
            await late.ack()
            assert harness.keys() == _count(harness)

    run(test())


def test_a_lost_ring_is_healed(harness: RedisHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody took the ring with it into its grave: by the next taker, or by the slow look."""
    monkeypatch.setattr("dagster_taskiq.brokers.redis.SLOW_LOOK_SECONDS", 0.5)

    async def test() -> None:
        queue = harness.queue()
        with redis.Redis.from_url(harness.options.url) as client:
            async with opened(harness) as sender, consuming(harness, queue) as consumer:
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


def test_flushed_scripts_are_loaded_again(harness: RedisHarness) -> None:
    """As after a restart of the server; the flush harms nobody else, who loads them too."""

    async def test() -> None:
        queue = harness.queue()
        with redis.Redis.from_url(harness.options.url) as client:
            async with consuming(harness, queue) as consumer:
                client.script_flush()
                await consumer.broker.kick(task(queue, "a"))
                client.script_flush()
                delivery = await consumer.take()
                client.script_flush()
                await delivery.ack()
                assert harness.keys() == _count(harness)

    run(test())


def test_a_server_that_restarts_during_a_command_is_given_the_scripts(
    harness: RedisHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection breaks, and whoever answers then has forgotten the scripts."""
    failures = [redis.ConnectionError("the server was killed")]

    async def test() -> None:
        queue = harness.queue()
        async with opened(harness) as broker:
            whole = redis_broker.call

            async def breaking(client: Any, commands: Any) -> list[Any]:
                if failures:
                    with redis.Redis.from_url(harness.options.url) as other:
                        other.script_flush()
                    raise failures.pop()
                return await whole(client, commands)

            monkeypatch.setattr(redis_broker, "call", breaking)
            await broker.kick(task(queue, "a"))
            assert await broker.depth(queue) == 1

    run(test())


def test_an_error_of_redis_is_a_refusal_without_the_payload(harness: RedisHarness) -> None:
    async def test() -> None:
        queue = harness.queue()
        with redis.Redis.from_url(harness.options.url) as client:
            client.set(f"{queue}:waiting", "of another kind")
            async with opened(harness) as broker:
                with pytest.raises(RefusedByServerError, match="WRONGTYPE") as caught:
                    await broker.kick(task(queue, SECRET))
                assert SECRET not in str(caught.value)

    run(test())


def test_a_killed_server_keeps_its_queues() -> None:
    """With an append-only file; what was in hand, and with which token, is there too."""

    async def test(server: PrivateRedis) -> None:
        harness = RedisHarness(server.options)
        queue = harness.queue()
        async with consuming(harness, queue) as consumer:
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


def test_a_password_that_is_missing_is_refused() -> None:
    async def test(server: PrivateRedis) -> None:
        async with opened(RedisHarness(server.options)) as broker:
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
def test_a_full_server_takes_nothing_and_still_gives(
    kind: Literal["redis", "valkey"],
) -> None:
    """The sender learns it at once, and no script is left half done; workers make room."""

    async def test(server: PrivateRedis) -> None:
        harness = RedisHarness(server.options)
        queue = harness.queue()
        async with opened(harness) as sender:
            await sender.kick_many([task(queue, text) for text in "abc"])
            with server.client() as client:
                client.config_set("maxmemory", 1)
            async with consuming(harness, queue) as consumer:
                with pytest.raises(UnreachableServerError, match="maxmemory"):
                    await sender.kick(task(queue, "d"))
                assert await sender.absent(queue, "abcd") == {"d"}
                assert await sender.withdraw(queue, ["b"]) == {"b"}
                await (await consumer.take()).release()
                assert [await consumer.finish() for _ in range(2)] == ["a", "c"]
                assert harness.keys() == _count(harness)

    with private_redis(kind) as server:
        run(test(server))


def test_a_unix_socket_will_do() -> None:
    async def test(server: PrivateRedis) -> None:
        harness = RedisHarness(server.options)
        queue = harness.queue()
        async with consuming(harness, queue) as consumer:
            await consumer.until_idle()
            await consumer.broker.kick(task(queue, "a"))
            assert await consumer.finish() == "a"

    with private_redis(unix_socket=True) as server:
        run(test(server))
