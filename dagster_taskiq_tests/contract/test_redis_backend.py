"""What only the backend on Redis and Valkey has: its keys, how long they live, its connections."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import cast

import pytest
import redis

from dagster_taskiq.backend import TaskState, open_backend
from dagster_taskiq.defaults import CLOSED_RECORD_EXPIRES_SECONDS, LOST_WORKER_SECONDS
from dagster_taskiq.errors import RefusedByServerError, UnreachableServerError
from dagster_taskiq.messages.attempt_ends import Counted, Counter, HistoryBatch
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq_tests.contract.backend_bench import (
    Bench,
    Kind,
    PrivateRedisHarness,
    RedisHarness,
    an_end,
    record,
    shared_bench,
)
from dagster_taskiq_tests.servers import PrivateRedis, private_redis

SECRET = "opensesame"


@pytest.fixture(scope="module", params=["redis", "valkey"])
def kind(request: pytest.FixtureRequest) -> Kind:
    return cast("Kind", request.param)


@pytest.fixture
def empty(kind: Kind) -> Iterator[Bench]:
    """No run is open."""
    with shared_bench(kind) as bench:
        yield bench


@pytest.fixture
def bench(empty: Bench) -> Bench:
    """With an open run."""
    empty.open_run()
    return empty


@pytest.fixture
def server(empty: Bench) -> RedisHarness:
    """What keeps the keys of ``bench``."""
    assert isinstance(empty.harness, RedisHarness)
    return empty.harness


# --- how long keys live ---


def test_the_record_of_a_run_that_is_over_goes_soon(bench: Bench, server: RedisHarness) -> None:
    """Also after last words of others; a loop that comes back has it for long again."""
    key = server.key(f"run:{bench.run_id}")
    held = bench.claimed()
    assert server.ttls()[key] > CLOSED_RECORD_EXPIRES_SECONDS
    bench.close_run()
    last_words: list[Callable[[], object]] = [
        lambda: None,
        lambda: bench.renew(held),
        lambda: bench.complete(held),
        lambda: bench.claim(bench.new_claim()),
        lambda: bench.cancel("never sent"),
        lambda: bench.condemn("never sent either"),
        bench.disown_run,
    ]
    for say in last_words:
        say()
        assert 0 < server.ttls()[key] <= CLOSED_RECORD_EXPIRES_SECONDS
    bench.open_run()
    assert server.ttls()[key] > CLOSED_RECORD_EXPIRES_SECONDS
    bench.claimed()
    assert server.ttls()[key] > CLOSED_RECORD_EXPIRES_SECONDS


def test_every_key_but_the_epoch_expires(bench: Bench, server: RedisHarness) -> None:
    """Runs, results, claims and workers leave nothing for ever; the counters are for ever."""
    held, done, lost = bench.claimed(), bench.claimed(), bench.claimed()
    bench.complete(done)
    bench.expire(lost)
    bench.condemn(lost.task_id)
    bench.cancel(held.task_id, "task")
    bench.call(bench.backend.heartbeat(record("w"), expires_seconds=30))
    bench.call(bench.backend.send_control("w", "x"))
    counts = {Counter("queue", "steps", Counted.SENT): 1}
    bench.call(bench.backend.add_history(HistoryBatch([an_end("task")], counts)))
    forever = {key.rpartition(":")[2] for key, ttl in server.ttls().items() if ttl < 0}
    assert forever <= {"epoch", "workers", "counts"}


@pytest.mark.parametrize("judge", ["cancel", "condemn"])
def test_a_tombstone_without_a_record_expires_too(
    empty: Bench, server: RedisHarness, judge: str
) -> None:
    """After a flush the loop may cancel or condemn before it has renewed its lease."""
    empty.cancel("task") if judge == "cancel" else empty.condemn("task")
    assert all(ttl > 0 for key, ttl in server.ttls().items() if ":run:" in key)


def test_a_result_outlives_the_record_of_its_run(bench: Bench, server: RedisHarness) -> None:
    """A server that is short of memory may drop the record: the task is done all the same."""
    claim = bench.claimed()
    assert bench.complete(claim)
    server.client.delete(server.key(f"run:{bench.run_id}"))
    assert bench.state(claim.task_id) is TaskState.DONE
    assert bench.cancel(claim.task_id) == [TaskState.DONE]
    assert not bench.condemn(claim.task_id)
    assert not bench.reopen(claim.task_id)


# --- connections ---


def test_a_replica_is_an_outage_and_its_connections_are_given_up() -> None:
    """After a failover the address may lead to another server, where new connections go."""
    with private_redis() as server, closing(Bench(PrivateRedisHarness(server))) as bench:
        bench.open_run()
        claim = bench.claimed()
        with server.client() as client:
            before = {item["id"] for item in client.client_list()}
            client.execute_command("REPLICAOF", "127.0.0.1", "1")
            with pytest.raises(UnreachableServerError, match="takes nothing now"):
                bench.renew_run()
            with pytest.raises(UnreachableServerError, match="takes nothing now"):
                bench.renew(claim)
            client.execute_command("REPLICAOF", "NO", "ONE")
            bench.renew_run()
            kept = [item for item in client.client_list() if item["id"] in before]
            assert len(kept) == 1, "only the test's own connection is an old one"
        assert bench.claimed()


def test_a_wrong_password_is_refused_without_showing_it() -> None:
    """The server answers, and refuses."""
    with private_redis(password="right") as server:
        options = replace(server.options, url=server.url.replace("right", SECRET))
        with pytest.raises(RefusedByServerError) as caught:
            Bench(RedisHarness(options))
        assert SECRET not in str(caught.value)
        assert caught.value.address in str(caught.value)


def test_a_crowd_of_connections_is_closed_when_it_is_over() -> None:
    """Calls that overlapped, as in an outage, leave no connections that nobody needs."""

    async def scenario(server: PrivateRedis) -> None:
        backend = open_backend(ServerOptions(url=server.url), Signer())
        await backend.startup()
        try:
            await asyncio.gather(*(backend.workers() for _ in range(20)))
            assert clients_of(server) > 15
            for _ in range(2):
                await backend.heartbeat(record("w"), expires_seconds=30)
            assert clients_of(server) < 5
        finally:
            await backend.shutdown()

    def clients_of(server: PrivateRedis) -> int:
        with redis.Redis.from_url(server.url) as client:
            return len(client.client_list()) - 1

    with private_redis() as server:
        asyncio.run(scenario(server))


def test_older_versions_take_no_lost_worker_for_a_live_one(
    bench: Bench, server: RedisHarness
) -> None:
    """They ask for the key of its record alone, which has the short life that it always had."""
    bench.call(bench.backend.heartbeat(record("a"), expires_seconds=30))
    assert 25 <= server.client.ttl(server.key("worker:a")) <= 30
    kept = server.client.ttl(server.key("last:a"))
    assert LOST_WORKER_SECONDS + 25 <= kept <= LOST_WORKER_SECONDS + 30
    server.client.delete(server.key("last:a"), server.key("worker:a"))
    assert bench.call(bench.backend.lost_workers()) == []


# --- what none of ours has written ---


def test_unreadable_workers_affect_nobody_else(
    bench: Bench, server: RedisHarness, caplog: pytest.LogCaptureFixture
) -> None:
    """They are left out of the list, and said once with the names of their keys."""
    bench.call(bench.backend.heartbeat(record("a"), expires_seconds=30))
    for worker_id in (b"\xff\xfe", b"odd", b"deep", b"list", b"gone"):
        server.client.zadd(server.key("workers"), {worker_id: time.time() + 30})
    server.client.set(server.key("worker:odd"), b"\xff")
    server.client.set(server.key("worker:deep"), b"[" * 60_000)
    server.client.rpush(server.key("worker:list"), "x")
    for _ in range(2):
        assert bench.call(bench.backend.workers()) == [record("a")]
    assert caplog.text.count(server.key("worker:odd")) == 1
    assert caplog.text.count(server.key("worker:deep")) == 1


@pytest.mark.parametrize("garbage", [b"\xff\xfe", b"", b"a\nb"])
def test_an_unreadable_epoch_is_a_new_life(
    bench: Bench, server: RedisHarness, garbage: bytes
) -> None:
    """New runs begin, and workers keep their leases: they assert them again."""
    bench.open_run()
    claim = bench.claimed()
    server.client.hset(server.key("epoch"), "id", garbage)
    renewal = bench.renew(claim)
    assert renewal.is_held
    assert renewal.epoch != claim.epoch
    server.client.set(server.key("epoch"), garbage)
    assert bench.renew(claim).is_held
    assert bench.renew_run() == bench.renew(claim).epoch


@pytest.mark.parametrize("garbage", [b"\xff\xfe", b"", b"unheard-of", b"1"])
def test_an_unreadable_state_is_unknown(
    bench: Bench, server: RedisHarness, garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once with its key; the task can be claimed, cancelled or reopened as if new."""
    bench.open_run()
    tasks = [uuid.uuid4().hex for _ in range(3)]
    for task in tasks:
        server.client.hset(server.key(f"run:{bench.run_id}"), f"t:{task}", garbage)
    server.client.hset(server.key(f"run:{bench.run_id}"), "generation", b"\xff")
    for _ in range(2):
        assert [bench.state(task) for task in tasks] == [TaskState.UNKNOWN] * 3
    assert caplog.text.count(server.key(f"run:{bench.run_id} ")) == 1
    assert bench.complete(bench.claimed(tasks[0]))
    assert bench.cancel(tasks[1]) == [TaskState.CANCELLED]
    assert bench.reopen(tasks[2])
    assert bench.renew_run() is not None


def test_an_unreadable_mailbox_or_place_stops_nothing(bench: Bench, server: RedisHarness) -> None:
    """Results arrive, and a cancel is kept for the next renewal."""
    bench.open_run()
    claim, other = bench.claimed(), bench.claimed()
    mailbox = server.key(f"run:{bench.run_id}:mailbox")
    server.client.rpush(mailbox, b"\xff\xfe", b"", b"no-task")
    server.client.set(server.key("result:").encode() + b"\xff\xfe", "x")
    server.client.hset(server.key(f"claim:{claim.task_id}"), "place", b"\xff[")
    server.client.hset(server.key(f"claim:{other.task_id}"), "place", "[]")
    assert bench.complete(other)
    assert bench.results()[other.task_id] == b"result"
    report = bench.report(claim.task_id)
    assert (report.state, report.place) == (TaskState.CLAIMED, None)
    assert bench.cancel(claim.task_id) == [TaskState.CLAIMED]
    assert bench.renew(claim).cancel_order == "enough"
