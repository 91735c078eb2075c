"""What only the broker on PostgreSQL has: its tables, what a crash leaves of them, its looks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack, closing, contextmanager
from dataclasses import replace
from typing import cast
from urllib.parse import urlsplit

import psycopg2
import pytest

from dagster_taskiq.backend import open_backend
from dagster_taskiq.backend.postgresql_schema import PART as BACKEND_PART
from dagster_taskiq.brokers.postgresql import PART, PostgresqlTaskBroker
from dagster_taskiq.errors import RefusedByServerError
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq_tests.contract.broker_bench import (
    IN_HAND_SECONDS,
    PostgresHarness,
    consuming,
    eventually,
    opened,
    opened_harness,
    run,
    task,
)
from dagster_taskiq_tests.server_nodes import execute_sql
from dagster_taskiq_tests.servers import crashable_postgres, unique_prefix
from dagster_taskiq_tests.tls_servers import certificates


@pytest.fixture
def harness() -> Iterator[PostgresHarness]:
    with opened_harness("postgres") as harness:
        yield cast("PostgresHarness", harness)


# --- the schema ---


def test_brokers_and_backends_start_at_once_where_there_is_no_schema(
    harness: PostgresHarness,
) -> None:
    """Each makes its own part of it once."""

    async def test() -> None:
        backends = [open_backend(harness.options, Signer()) for _ in range(4)]
        brokers = [harness.broker() for _ in range(4)]
        await asyncio.gather(*(server.startup() for server in (*backends, *brokers)))
        await asyncio.gather(*(server.shutdown() for server in (*backends, *brokers)))

    run(test())
    for table, part in (("broker_version", PART), ("version", BACKEND_PART)):
        assert harness.execute(f"SELECT number FROM {{s}}.{table}") == [(len(part.migrations),)]


def test_a_newer_broker_is_refused_and_the_backend_goes_on(harness: PostgresHarness) -> None:
    """Each part of the schema has a version of its own."""

    async def test() -> None:
        async with opened(harness) as broker:
            await broker.kick(task(harness.queue(), "a"))
        harness.execute("UPDATE {s}.broker_version SET oldest = %s", [len(PART.migrations) + 1])
        with pytest.raises(RefusedByServerError, match="newer version") as caught:
            await harness.broker().startup()
        assert caught.value.is_final
        backend = open_backend(harness.options, Signer())
        await backend.startup()
        await backend.shutdown()

    run(test())


# --- what is kept ---


def test_what_was_sent_survives_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where commits are asynchronous by default; what was in hand comes again."""
    monkeypatch.setattr(PostgresqlTaskBroker, "in_hand_seconds", IN_HAND_SECONDS)

    async def test(harness: PostgresHarness) -> None:
        queue = harness.queue()
        async with consuming(harness, queue) as consumer:
            await consumer.broker.kick_many([task(queue, text) for text in "ab"])
            assert (await consumer.take()).data == b"a"
            await consumer.broker.kick(task(queue, "c"))
            node.kill()
            node.restart()
        async with consuming(harness, queue) as consumer:
            seen = {await consumer.finish() for _ in range(3)}
            assert seen == set("abc")

    with crashable_postgres() as (node, options):
        name = urlsplit(options.url).path[1:]
        execute_sql(options.url, f'ALTER DATABASE "{name}" SET synchronous_commit TO off')
        try:
            run(test(PostgresHarness(options)))
        finally:
            execute_sql(options.url, f'ALTER DATABASE "{name}" RESET synchronous_commit')


def test_settled_tasks_leave_nothing(harness: PostgresHarness) -> None:
    async def test() -> None:
        queue = harness.queue()
        async with consuming(harness, queue) as consumer:
            await consumer.broker.kick_many([task(queue, text) for text in "abc"])
            assert await consumer.broker.withdraw(queue, ["b"]) == {"b"}
            assert [await consumer.finish() for _ in range(2)] == ["a", "c"]

    run(test())
    assert harness.execute("SELECT count(*) FROM {s}.messages") == [(0,)]


def test_deployments_on_one_server_do_not_meet(harness: PostgresHarness) -> None:
    """Each has a schema of its own, so also the same name of a queue."""

    async def test() -> None:
        other = PostgresHarness(replace(harness.options, key_prefix=unique_prefix()))
        queue = harness.queue()
        try:
            async with opened(harness) as mine, opened(other) as theirs:
                await mine.kick(task(queue, "a"))
                assert await mine.depth(queue) == 1
                assert await theirs.depth(queue) == 0
                assert await theirs.queues_with_tasks() == set()
        finally:
            other.execute("DROP SCHEMA {s} CASCADE")

    run(test())


# --- looks ---


def test_listeners_of_the_same_queues_share_the_looks(
    harness: PostgresHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that have died count no more after a while."""
    module = "dagster_taskiq.brokers.postgresql"
    monkeypatch.setattr(f"{module}._COUNT_SECONDS", 0.1)

    async def pause(broker: object) -> float:
        listener = cast("PostgresqlTaskBroker", broker).listener()
        await asyncio.wait_for(listener.wait(), 5)
        return float(listener._share_seconds)  # type: ignore[attr-defined]

    async def test() -> None:
        queues = [harness.queue(name) for name in "ab"]
        async with AsyncExitStack() as stack:
            brokers = [await stack.enter_async_context(opened(harness, *queues)) for _ in range(6)]
            other = await stack.enter_async_context(opened(harness, queues[0]))
            pauses = await asyncio.gather(*map(pause, brokers))
            assert min(pauses) >= 0.05
            assert await pause(other) == 0.05
            monkeypatch.setattr(f"{module}._LOOKS_PER_SECOND", 10.0)
            assert await pause(brokers[0]) == pytest.approx(0.7)
            assert await pause(other) == pytest.approx(0.2)
            harness.execute("UPDATE {s}.listeners SET expires_at = 'epoch'")
            assert await pause(brokers[0]) == pytest.approx(0.1)

    run(test())


def test_a_table_that_was_never_analyzed_is_read_by_its_indexes(harness: PostgresHarness) -> None:
    """Some clusters have no autovacuum, and their planner knows nothing of a queue's length."""

    async def test() -> None:
        queue = harness.queue()
        async with opened(harness) as broker:
            await broker.kick(task(queue, "first", priority=9))
            harness.execute(
                "INSERT INTO {s}.messages (queue, task_id, priority, payload) "
                "SELECT %s, n::text, 5, '' FROM generate_series(1, 20000) AS n",
                [queue],
            )
            taken = await cast("PostgresqlTaskBroker", broker).take([queue])
            assert taken is not None
            assert taken[1].data == b"first"

            async def is_counted() -> bool:
                rows = harness.execute(
                    "SELECT seq_tup_read FROM pg_stat_user_tables WHERE relname = 'messages' "
                    "AND schemaname = %s AND idx_scan > 0",
                    [harness.schema],
                )
                return rows == [(0,)]

            await eventually(is_counted)

    run(test())


def test_a_busy_worker_has_the_queue_vacuumed(
    harness: PostgresHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or each look would walk over all that has passed through since autovacuum was there."""
    monkeypatch.setattr("dagster_taskiq.brokers.postgresql._VACUUM_ACKS", 10)

    async def is_vacuumed() -> bool:
        rows = harness.execute(
            "SELECT vacuum_count FROM pg_stat_user_tables WHERE relname = 'messages' "
            "AND schemaname = %s",
            [harness.schema],
        )
        return rows == [(1,)]

    async def test() -> None:
        queue = harness.queue()
        async with consuming(harness, queue) as consumer:
            await consumer.broker.kick_many([task(queue) for _ in range(15)])
            await consumer.finish_many(15, 20)
            await eventually(is_vacuumed)

    run(test())


# --- a transaction that stays open, and keeps what is gone from being vacuumed ---


@contextmanager
def open_snapshot(harness: PostgresHarness) -> Iterator[None]:
    """As a dump of the database has it."""
    with closing(psycopg2.connect(harness.options.url)) as connection:
        connection.set_session(isolation_level="REPEATABLE READ")
        connection.cursor().execute("SELECT 1")
        yield


@pytest.fixture
def floors(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Each look counts as slow, and floors are raised by each take; the fixture changes more."""
    module = "dagster_taskiq.brokers.postgresql_floors"
    monkeypatch.setattr(f"{module}._SLOW_SECONDS", -1.0)
    monkeypatch.setattr(f"{module}._RAISE_SECONDS", 0.0)
    return monkeypatch


async def take(broker: object, queue: str) -> str | None:
    """Take the next task and ack it."""
    taken = await cast("PostgresqlTaskBroker", broker).take([queue])
    if taken is None:
        return None
    await taken[1].ack()
    return taken[1].data.decode()


@pytest.mark.usefixtures("floors")
def test_what_is_gone_is_not_walked_over_by_each_look(harness: PostgresHarness) -> None:
    gone, tasks = 3000, 30

    async def test() -> None:
        queue = harness.queue()
        async with opened(harness) as broker:
            harness.execute(
                "INSERT INTO {s}.messages (queue, task_id, priority, payload) "
                "SELECT %s, n::text, 5, '' FROM generate_series(1, %s) AS n",
                [queue, gone],
            )
            with open_snapshot(harness):
                harness.execute("DELETE FROM {s}.messages")
                await broker.kick_many([task(queue, f"t{n}") for n in range(tasks)])
                assert [await take(broker, queue) for _ in range(tasks)] == [
                    f"t{n}" for n in range(tasks)
                ]

        async def is_counted() -> bool:
            rows = harness.execute(
                "SELECT n_tup_del FROM pg_stat_user_tables WHERE relname = 'messages' "
                "AND schemaname = %s",
                [harness.schema],
            )
            return rows == [(gone + tasks,)]

        await eventually(is_counted)

    run(test())
    ((walked,),) = harness.execute(
        "SELECT idx_tup_read FROM pg_stat_user_indexes WHERE indexrelname = 'messages_waiting' "
        "AND schemaname = %s",
        [harness.schema],
    )
    assert walked < gone * tasks / 4


@pytest.mark.usefixtures("floors")
def test_the_first_message_of_all_is_found_from_floors(harness: PostgresHarness) -> None:
    """Nothing has a number before it."""

    async def test() -> None:
        queue = harness.queue()
        async with opened(harness) as broker:
            for _ in range(4):
                assert await take(broker, queue) is None
            await broker.kick(task(queue, "first"))
            assert await take(broker, queue) == "first"

    run(test())


@pytest.mark.parametrize("is_dead", [False, True])
def test_what_others_give_back_is_found_from_the_front(
    harness: PostgresHarness, floors: pytest.MonkeyPatch, is_dead: bool
) -> None:
    """Which is looked from every few seconds; here within one. It comes in its old place."""
    floors.setattr("dagster_taskiq.brokers.postgresql_floors._LONGEST_SECONDS", 1.0)
    floors.setattr(PostgresqlTaskBroker, "in_hand_seconds", IN_HAND_SECONDS)

    async def test() -> None:
        queue = harness.queue()
        async with opened(harness) as other, opened(harness) as broker:
            await other.kick_many([task(queue, text) for text in "abc"])
            given_back = await cast("PostgresqlTaskBroker", other).take([queue])
            assert given_back is not None
            if is_dead:
                await other.shutdown()
            assert [await take(broker, queue) for _ in range(3)] == ["b", "c", None]
            if not is_dead:
                await given_back[1].release()

            async def is_found() -> bool:
                return await take(broker, queue) == "a"

            await eventually(is_found)

    run(test())


def test_what_is_being_sent_is_not_passed_over(
    harness: PostgresHarness, floors: pytest.MonkeyPatch
) -> None:
    """Though what was sent after it is there before it, and nobody looks from the front."""
    module = "dagster_taskiq.brokers.postgresql_floors"
    floors.setattr(f"{module}._SHORTEST_SECONDS", 60.0)
    floors.setattr(f"{module}._LONGEST_SECONDS", 60.0)

    async def test() -> None:
        queue = harness.queue()
        async with opened(harness) as broker:
            for _ in range(4):
                assert await take(broker, queue) is None
            with closing(psycopg2.connect(harness.options.url)) as slow, slow.cursor() as cursor:
                cursor.execute(
                    f'INSERT INTO "{harness.schema}".messages (queue, task_id, priority, payload) '
                    "VALUES (%s, 'slow', 5, 'slow')",
                    [queue],
                )
                await broker.kick(task(queue, "quick"))
                assert await take(broker, queue) == "quick"
                slow.commit()
            assert await take(broker, queue) == "slow"

    run(test())


# --- connections ---


def test_lost_connections_are_replaced_without_a_word(
    harness: PostgresHarness, caplog: pytest.LogCaptureFixture
) -> None:
    """As where the server closes what is idle."""

    async def test() -> None:
        queue = harness.queue()
        async with opened(harness) as sender, consuming(harness, queue) as consumer:
            await consumer.until_idle()
            await sender.kick(task(queue, "a"))
            assert await consumer.finish() == "a"
            harness.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name = %s",
                [harness.options.key_prefix],
            )
            await sender.kick(task(queue, "b"))
            assert await consumer.finish() == "b"

    run(test())
    assert caplog.text == ""


def test_tls_is_libpqs() -> None:
    """By the parameters of the URL; what cannot be verified is final."""
    files = certificates()

    async def works(options: ServerOptions) -> None:
        there = PostgresHarness(options)
        queue = there.queue()
        async with consuming(there, queue) as consumer:
            await consumer.broker.kick(task(queue, "secret"))
            assert await consumer.finish() == "secret"

    async def test(options: ServerOptions) -> None:
        local = options.url.replace("127.0.0.1", "localhost")
        verified = f"?sslmode=verify-full&sslrootcert={files.ca}"
        await works(replace(options, url=local + verified))
        with pytest.raises(RefusedByServerError, match="certificate") as caught:
            await works(replace(options, url=options.url + verified))
        assert caught.value.is_final

    with crashable_postgres() as (node, options):
        node.use_tls(files.server, files.server_key)
        node.restart()
        run(test(options))
