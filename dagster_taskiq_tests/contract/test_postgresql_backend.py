"""What only the backend on PostgreSQL has: its schema, its rights, its wake-ups, its clean-up."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import psycopg
import pytest

from dagster_taskiq.backend import Claim, ClaimAnswer, TaskState, open_backend
from dagster_taskiq.backend.postgresql import PostgresqlBackend
from dagster_taskiq.backend.postgresql_hints import channel_of
from dagster_taskiq.backend.postgresql_schema import PART
from dagster_taskiq.defaults import LOST_WORKER_SECONDS
from dagster_taskiq.errors import ConfigError, RefusedByServerError, UnreachableServerError
from dagster_taskiq.messages.results import NOWHERE
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.messages.worker_records import write_record
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq.servers.postgresql_schema import Schema, schema_name
from dagster_taskiq_tests.contract.backend_bench import (
    LONG_LEASE,
    PATIENCE_SECONDS,
    Bench,
    PostgresHarness,
    private_bench,
    record,
    shared_bench,
)
from dagster_taskiq_tests.database_setup import as_role, database_and_role
from dagster_taskiq_tests.server_nodes import PostgresNode, execute_sql
from dagster_taskiq_tests.server_processes import free_port
from dagster_taskiq_tests.servers import (
    crashable_postgres,
    postgres_database,
    postgres_options,
    unique_prefix,
)
from dagster_taskiq_tests.tls_servers import certificates

SECRET = "opensesame"

#: What a run's loop says of itself.
LOOP: dict[str, Any] = {
    "generation": 0,
    "token": "t",
    "is_resumable": False,
    "lease_seconds": LONG_LEASE,
}


@pytest.fixture
def bench() -> Iterator[Bench]:
    """With an open run."""
    with shared_bench("postgres") as bench:
        bench.open_run()
        yield bench


@pytest.fixture
def server(bench: Bench) -> PostgresHarness:
    return cast("PostgresHarness", bench.harness)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


def backend_of(options: ServerOptions) -> PostgresqlBackend:
    return cast("PostgresqlBackend", open_backend(options, Signer()))


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


def end_sessions(server: PostgresHarness) -> int:
    """End every other session that has used the schema; how many there were."""
    rows = server.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE application_name = %s AND pid <> pg_backend_pid()",
        [server.options.key_prefix],
    )
    return len(rows)


# --- the schema ---


def test_many_start_at_once_where_there_is_no_schema() -> None:
    """One makes it, the others find it."""

    async def test(options: ServerOptions) -> None:
        backends = [backend_of(options) for _ in range(8)]
        await asyncio.gather(*(backend.startup() for backend in backends))
        epochs = [(await backend.inspect("run", []))[0] for backend in backends]
        assert len(set(epochs)) == 1
        for backend in backends:
            await backend.shutdown()

    with postgres_options() as options:
        run(test(options))


def test_who_makes_the_schema_is_waited_for() -> None:
    """For longer than a change of its tables may wait for who reads them."""

    async def test(options: ServerOptions) -> None:
        lock = Schema(options.key_prefix, PART).lock
        with psycopg.connect(options.url, autocommit=True) as maker:
            maker.execute(f"SELECT pg_advisory_lock({lock})")
            backend = backend_of(options)
            starting = asyncio.create_task(backend.startup())

            def has_waited() -> bool:
                found = maker.execute(
                    "SELECT FROM pg_stat_activity WHERE application_name = %s "
                    "AND wait_event_type = 'Lock' "
                    "AND clock_timestamp() - query_start > interval '1 s'",
                    [options.key_prefix],
                )
                return found.rowcount == 1

            await until(lambda: starting.done() or has_waited())
            assert not starting.done()
        await starting
        await backend.shutdown()

    with postgres_options() as options:
        run(test(options))


def test_no_two_prefixes_share_a_schema() -> None:
    """Also where the names are too long for PostgreSQL, which would cut them."""
    long = "x" * 60
    prefixes = ["dagster-taskiq", "dagster_taskiq", "a-b", "a_b", long, long + "x", 'a"b', "%s"]
    names = [schema_name(prefix) for prefix in prefixes]
    assert len(set(names)) == len(prefixes)
    assert names[0] == "dagster_taskiq"
    assert all(len(name.encode()) <= 63 for name in names)


@pytest.mark.parametrize("prefix", ['a"b', "100 %s %", "ä" * 40])
def test_any_prefix_works(prefix: str) -> None:
    async def test(options: ServerOptions) -> None:
        backend = backend_of(replace(options, key_prefix=prefix + unique_prefix()))
        await backend.startup()
        assert (await backend.inspect("run", ["task"]))[1]["task"].state is TaskState.UNKNOWN
        await backend.shutdown()

    with postgres_database() as url:
        run(test(ServerOptions(url)))


def test_a_schema_that_vanishes_is_made_again(bench: Bench, server: PostgresHarness) -> None:
    """In a new life, of course."""
    server.execute("DROP SCHEMA {s} CASCADE")
    epoch = bench.renew_run()
    assert epoch not in (None, bench.epoch)
    assert bench.claim(replace(bench.new_claim(), epoch=str(epoch))) is ClaimAnswer.GRANTED


def test_versions_share_a_schema_until_one_cannot(bench: Bench, server: PostgresHarness) -> None:
    """What a later version has added does no harm, unless it says so."""
    server.execute("ALTER TABLE {s}.tasks ADD COLUMN later int")
    server.execute("UPDATE {s}.version SET number = 99")
    assert bench.complete(bench.claimed())
    other = bench.open()
    assert bench.call(other.inspect("run", []))[0] == bench.epoch
    server.execute("UPDATE {s}.version SET oldest = %s", [len(PART.migrations) + 1])
    with pytest.raises(RefusedByServerError, match="newer version") as caught:
        bench.open()
    assert caught.value.is_final


def test_a_schema_without_a_version_says_what_to_do(bench: Bench, server: PostgresHarness) -> None:
    """Somebody has emptied all tables of it."""
    server.execute("TRUNCATE {s}.version")
    with pytest.raises(RefusedByServerError, match=r"was emptied.*drop the schema") as caught:
        bench.open()
    assert caught.value.is_final


def test_another_version_adds_its_functions(bench: Bench, server: PostgresHarness) -> None:
    """Where the tables are there, and the functions of the former version too."""
    rows = server.execute(
        "SELECT proname FROM pg_proc WHERE pronamespace = %s::regnamespace "
        "AND proname LIKE 'enter%%'",
        [f'"{server.name}"'],
    )
    server.execute(f'DROP FUNCTION {{s}}."{rows[0][0]}"()')
    bench.open()
    assert bench.renew_run() == bench.epoch


# --- URLs ---


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda parts: parts._replace(path="/nowhere"), "does not exist"),
        (lambda parts: parts._replace(netloc="nobody:opensesame@" + parts.netloc), "Check the URL"),
    ],
)
def test_a_wrong_url_is_refused_without_its_password(
    change: Callable[[Any], Any], named: str
) -> None:
    async def test(options: ServerOptions) -> None:
        parts = urlsplit(options.url)
        bare = parts._replace(netloc=parts.netloc.rpartition("@")[2])
        login = parts.netloc.rpartition("@")[0] + ":" + SECRET + "@"
        changed = change(bare)
        if "@" not in changed.netloc:
            changed = changed._replace(netloc=login + changed.netloc)
        backend = backend_of(replace(options, url=changed.geturl()))
        with pytest.raises(RefusedByServerError, match=named) as caught:
            await backend.startup()
        assert SECRET not in str(caught.value)
        assert not caught.value.is_final

    with postgres_options() as options:
        run(test(options))


@pytest.mark.parametrize("query", ["?nonsense=1", "?port=x&connect_timeout=y", "?password=%zz"])
def test_a_url_that_libpq_cannot_read_is_a_mistake_in_the_settings(query: str) -> None:
    with pytest.raises((ConfigError, RefusedByServerError, UnreachableServerError)) as caught:
        run(backend_of(ServerOptions(f"postgresql://u:{SECRET}@h/d{query}")).startup())
    assert SECRET not in str(caught.value)


def test_tls_is_libpqs() -> None:
    """By the parameters of the URL; hints arrive too; what cannot be verified is final."""
    files = certificates()

    async def works(options: ServerOptions) -> None:
        backend, other = backend_of(options), backend_of(options)
        run_id = unique_prefix()
        try:
            epoch = await backend.open_run(
                run_id, generation=0, token="t", is_resumable=False, lease_seconds=LONG_LEASE
            )
            waiting = asyncio.ensure_future(backend.wait_for_results(run_id, 20))
            claim = Claim(run_id, "task", "token", LONG_LEASE, epoch, NOWHERE)
            assert await other.claim(claim, needs_live_run=True) is ClaimAnswer.GRANTED
            await until(lambda: backend._mailboxes[run_id]._is_listening)
            await other.complete(claim, b"x", expires_seconds=60)
            assert await waiting == {"task": b"x"}
        finally:
            await backend.shutdown()
            await other.shutdown()

    async def test(options: ServerOptions) -> None:
        local = options.url.replace("127.0.0.1", "localhost")
        verified = f"?sslmode=verify-full&sslrootcert={files.ca}"
        await works(replace(options, url=local + verified))
        for url in (options.url + verified, local + verified.replace("ca.pem", "other-ca.pem")):
            with pytest.raises(RefusedByServerError, match="certificate") as caught:
                await works(replace(options, url=url))
            assert caught.value.is_final

    with crashable_postgres() as (node, options):
        node.use_tls(files.server, files.server_key)
        node.restart()  # it would reload its settings too, but some time later
        run(test(options))


# --- the life of the server ---


@pytest.mark.parametrize("table", ["runs", "tasks", "life"])
def test_an_emptied_table_ends_the_epoch(bench: Bench, server: PostgresHarness, table: str) -> None:
    server.execute(f"TRUNCATE {{s}}.{table}")
    assert bench.renew_run() not in (None, bench.epoch)


def test_an_orderly_restart_ends_nothing() -> None:
    """It forgets nothing, so that nothing need wait or be sent again."""
    with private_bench("postgres") as (server, bench):
        epoch = bench.open_run()
        claim = bench.claimed()
        cast("Any", server).node.restart()
        assert bench.renew_run() == epoch
        assert bench.complete(claim)


def test_one_killed_session_ends_the_epoch() -> None:
    """As the OOM killer does it: the server goes on with other sessions, and may lose commits."""
    with private_bench("postgres") as (server, bench):
        epoch = bench.open_run()
        claim = bench.claimed()
        ((pid,),) = cast("PostgresHarness", server).execute("SELECT pg_backend_pid()")
        os.kill(pid, signal.SIGKILL)

        async def renew() -> str | None:
            with suppress(UnreachableServerError):
                loop = bench.loops["loop"]
                return await bench.backend.renew_run(bench.run_id, **loop, lease_seconds=60)
            return epoch

        async def new_epoch() -> None:
            deadline = time.monotonic() + PATIENCE_SECONDS
            while await renew() == epoch:
                assert time.monotonic() < deadline, "the epoch has not changed"

        bench.call(new_epoch())
        assert bench.renew(claim).is_held
        assert bench.complete(claim)


@contextmanager
def standby_of(node: PostgresNode) -> Iterator[PostgresNode]:
    """A copy of the node that follows it until it is promoted."""
    copy, port, user = node.directory / "copy", free_port(), node._user
    binary = Path(node._command[0]).resolve()
    command = [binary.with_name("pg_basebackup"), "-d", node.url, "-D", copy / "data", "-R"]
    subprocess.run([*command, "-c", "fast"], user=user, check=True, cwd="/", capture_output=True)
    copy.mkdir(exist_ok=True)
    standby = PostgresNode(str(binary), port, copy, user)
    try:
        yield standby
    finally:
        standby.stop()


def test_a_promoted_standby_is_another_life() -> None:
    """It has not all that the former primary had: live claims are asserted again."""

    async def test(node: PostgresNode, standby: PostgresNode, options: ServerOptions) -> None:
        ports = [str(urlsplit(it.url).port) for it in (node, standby)]
        hosts = f"?host=127.0.0.1,127.0.0.1&port={','.join(ports)}"
        url = f"postgresql://postgres@/postgres{hosts}"
        backend = backend_of(replace(options, url=url))
        epoch = await backend.open_run("run", **LOOP)
        claims = [Claim("run", f"t{n}", "w", LONG_LEASE, epoch, NOWHERE) for n in range(2)]
        assert await backend.claim(claims[0], needs_live_run=True) is ClaimAnswer.GRANTED
        await asyncio.to_thread(standby.stop)  # from here on it misses what happens
        assert await backend.claim(claims[1], needs_live_run=True) is ClaimAnswer.GRANTED
        node.kill()
        await asyncio.to_thread(standby.restart)
        with pytest.raises(UnreachableServerError):
            await backend.renew(claims)
        await asyncio.to_thread(execute_sql, standby.url, "SELECT pg_promote()")
        assert await backend.renew_run("run", **LOOP) not in (None, epoch)
        other = replace(claims[1], token="other")
        assert await backend.claim(other, needs_live_run=True) is ClaimAnswer.STALE
        assert [renewal.is_held for renewal in await backend.renew(claims)] == [True, True]
        assert await backend.complete(claims[1], b"x", expires_seconds=60)
        await backend.shutdown()

    with crashable_postgres() as (node, options), standby_of(node) as standby:
        run(test(node, standby, options))


def test_a_copy_of_a_database_is_another_life() -> None:
    """Though it has the row of the epoch."""

    async def epoch_of(url: str) -> str:
        backend = backend_of(ServerOptions(url))
        epoch, _ = await backend.inspect("run", [])
        await backend.shutdown()
        return epoch

    async def test(url: str) -> None:
        first, second = await epoch_of(url), await epoch_of(url)
        assert first == second
        name = unique_prefix()
        source = urlsplit(url).path[1:]
        execute_sql(url.replace(source, "postgres"), f'CREATE DATABASE "{name}" TEMPLATE {source}')
        try:
            assert await epoch_of(urlsplit(url)._replace(path=f"/{name}").geturl()) != first
        finally:
            execute_sql(url, f'DROP DATABASE "{name}" WITH (FORCE)')

    with postgres_database() as url:
        run(test(url))


# --- connections ---


def test_lost_connections_are_replaced_without_a_word(
    bench: Bench, server: PostgresHarness, caplog: pytest.LogCaptureFixture
) -> None:
    """Idle ones at the next call, and the one that waits for hints while it waits."""

    async def wait_and_complete() -> dict[str, bytes]:
        waiting = asyncio.ensure_future(bench.backend.wait_for_results(bench.run_id, 20))
        await until(lambda: listeners(server))
        assert end_sessions(server) >= 2
        await until(lambda: listeners(server))
        assert await other.complete(claim, b"x", expires_seconds=60)
        return await waiting

    claim, other = bench.claimed(), bench.open()
    assert bench.call(wait_and_complete()) == {claim.task_id: b"x"}
    end_sessions(server)
    assert bench.renew_run() == bench.epoch
    assert caplog.text == ""


def listeners(server: PostgresHarness) -> list[Any]:
    return server.execute(
        "SELECT pid FROM pg_stat_activity WHERE application_name = %s AND query LIKE 'LISTEN%%'",
        [server.options.key_prefix],
    )


def test_a_run_that_is_closed_listens_no_more(bench: Bench, server: PostgresHarness) -> None:
    """Whatever still waits for its results."""

    async def close() -> None:
        waiting = asyncio.ensure_future(bench.backend.wait_for_results(bench.run_id, 1))
        await until(lambda: listeners(server))
        await bench.backend.close_run(bench.run_id, token="loop")
        assert await waiting == {}
        await until(lambda: not listeners(server))

    bench.call(close())


def test_a_limit_of_connections_is_an_outage() -> None:
    """Others use it up."""

    async def test(url: str, user: str) -> None:
        execute_sql(url, f'ALTER ROLE "{user}" CONNECTION LIMIT 0')
        backend = backend_of(ServerOptions(as_role(url, user)))
        with pytest.raises(UnreachableServerError, match="max_connections"):
            await backend.startup()

    with database_and_role() as (url, user):
        run(test(url, user))


def test_what_holds_a_lock_is_an_outage_that_ends(bench: Bench, server: PostgresHarness) -> None:
    """A call waits for a lock no longer than for an answer; then others go on."""
    claim = bench.claimed()
    server.execute("BEGIN")
    server.execute("LOCK TABLE {s}.tasks")
    began = time.monotonic()
    with pytest.raises(UnreachableServerError):
        bench.renew(claim)
    assert time.monotonic() - began < 5
    server.execute("ROLLBACK")
    assert bench.renew(claim).is_held


def test_a_strict_isolation_level_by_default_changes_nothing() -> None:
    """A user's setting that would make calls fail when they meet."""

    async def test(url: str) -> None:
        name = urlsplit(url).path[1:]
        execute_sql(
            url, f"ALTER DATABASE \"{name}\" SET default_transaction_isolation TO 'serializable'"
        )
        backend = backend_of(ServerOptions(url))
        await backend.open_run("run", **LOOP)
        await asyncio.gather(*(backend.renew_run("run", **LOOP) for _ in range(50)))
        await backend.shutdown()

    with postgres_database() as url:
        run(test(url))


def test_a_call_that_is_given_up_leaves_nothing_behind(bench: Bench) -> None:
    """Its connection is closed, and the next call has another one."""
    with private_bench("postgres", timeout_seconds=20) as (server, private):
        private.open_run()

        async def give_up() -> float:
            server.freeze()
            began = time.monotonic()
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(private.backend.inspect("run", []), 0.1)
            return time.monotonic() - began

        assert private.call(give_up()) < 2
        server.thaw()
        assert private.renew_run() == private.epoch


# --- wake-ups ---


def test_a_hint_arrives_soon(bench: Bench) -> None:
    """Far sooner than anybody looks."""
    other = bench.open()

    async def wake_ups() -> list[float]:
        found = []
        for claim in claims:
            waiting = asyncio.ensure_future(bench.backend.wait_for_results(bench.run_id, 20))
            await asyncio.sleep(0.02)
            began = time.monotonic()
            await other.complete(claim, b"x", expires_seconds=60)
            await waiting
            found.append(time.monotonic() - began)
        return found

    claims = [bench.claimed() for _ in range(10)]
    assert sorted(bench.call(wake_ups()))[5] < 0.2


@pytest.mark.parametrize("how", ["a pooler", "silence"])
def test_where_hints_do_not_arrive_results_are_looked_for(
    bench: Bench,
    server: PostgresHarness,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    """It is found out when a loop begins to wait, and said once."""
    waiter = cast("PostgresqlBackend", bench.open())
    if how == "a pooler":
        # whose clients are told other numbers of processes than the server's
        monkeypatch.setattr("psycopg.ConnectionInfo.backend_pid", 0)
    else:

        async def silence(_channel: str) -> None:
            pass

        monkeypatch.setattr(waiter._bell, "_notify", silence)

    async def wait_and_complete(claim: Any) -> float:
        waiting = asyncio.ensure_future(waiter.wait_for_results(bench.run_id, 20))
        await until(lambda: not waiter._bell.works)
        began = time.monotonic()
        assert await bench.backend.complete(claim, b"x", expires_seconds=60)
        assert await waiting == {claim.task_id: b"x"}
        return time.monotonic() - began

    for claim in (bench.claimed(), bench.claimed()):
        assert bench.call(wait_and_complete(claim)) < 2
    assert caplog.text.count("does not wake who waits") == 1
    assert listeners(server) == []


def test_a_foreign_notification_does_no_harm(bench: Bench, server: PostgresHarness) -> None:
    """Anybody in the database may send one, with any text."""

    async def wait_and_notify() -> dict[str, bytes]:
        waiting = asyncio.ensure_future(bench.backend.wait_for_results(bench.run_id, 20))
        await until(lambda: listeners(server))
        for text in ("no task", "", "\x01'\"" * 1000):
            server.execute("SELECT pg_notify(%s, %s)", [channel, text])
        assert await other.complete(claim, b"x", expires_seconds=60)
        return await waiting

    channel, other, claim = channel_of(server.name, bench.run_id), bench.open(), bench.claimed()
    assert bench.call(wait_and_notify()) == {claim.task_id: b"x"}


# --- what has expired ---


def count(server: PostgresHarness, table: str) -> int:
    return int(server.execute(f"SELECT count(*) FROM {{s}}.{table}")[0][0])


def test_what_has_expired_is_removed_by_workers(bench: Bench, server: PostgresHarness) -> None:
    """A run with its tasks and results some time after its end; what is in use stays."""
    done = bench.claimed()
    bench.complete(done)
    bench.call(bench.backend.send_control("w", "x"))
    bench.call(bench.backend.heartbeat(record("w"), expires_seconds=30))
    bench.call(bench.backend.tidy())
    assert [count(server, table) for table in ("runs", "tasks", "results", "orders")] == [1] * 4
    bench.close_run()
    bench.call(bench.backend.tidy())
    assert count(server, "tasks") == 1
    server.execute("UPDATE {s}.runs SET seen_at = clock_timestamp() - interval '2 h'")
    server.execute("UPDATE {s}.orders SET expires_at = 'epoch'")
    ages = {"gone": LOST_WORKER_SECONDS + 60, "lost": LOST_WORKER_SECONDS - 60}
    for name, seconds in ages.items():
        server.execute(
            "INSERT INTO {s}.workers VALUES (%s, %s, clock_timestamp() - %s * interval '1 s')",
            [name, write_record(Signer(), record(name)), seconds],
        )
    bench.call(bench.backend.tidy())
    assert count(server, "tasks") == 1, "its last lease has ended only now"
    server.execute("UPDATE {s}.tasks SET lease_until = clock_timestamp() - interval '2 h'")
    bench.call(bench.backend.tidy())
    assert [count(server, table) for table in ("runs", "tasks", "results", "orders")] == [0] * 4
    assert server.execute("SELECT worker_id FROM {s}.workers ORDER BY 1") == [("lost",), ("w",)]
    assert [it.worker_id for it in bench.call(bench.backend.lost_workers())] == ["lost"]


def test_a_task_of_a_run_without_a_loop_is_removed_too(
    bench: Bench, server: PostgresHarness
) -> None:
    """A launched run's, which nobody has opened; a week after its last lease."""
    bench.run_id = "launched"
    claim = bench.new_claim()
    assert bench.claim(claim, needs_live_run=False) is ClaimAnswer.GRANTED
    for age, left in (("6 d", 1), ("8 d", 0)):
        for change in ("tasks SET lease_until", "runs SET seen_at"):
            server.execute(
                f"UPDATE {{s}}.{change} = clock_timestamp() - interval '{age}' "
                "WHERE run_id = 'launched'"
            )
        bench.call(bench.backend.tidy())
        assert count(server, "tasks") == left


def test_a_clean_up_takes_a_bounded_amount_and_one_at_a_time(
    bench: Bench, server: PostgresHarness
) -> None:
    server.execute(
        "INSERT INTO {s}.runs (run_id, seen_at) "
        "SELECT 'old ' || n, 'epoch' FROM generate_series(1, 250) AS n"
    )
    for left in (150, 50, 0):
        bench.call(bench.backend.tidy())
        assert count(server, "runs") == left + 1
    server.execute("INSERT INTO {s}.runs (run_id, seen_at) VALUES ('old', 'epoch')")
    server.execute(f"SELECT pg_advisory_lock({Schema(server.options.key_prefix, PART).lock})")
    bench.call(bench.backend.tidy())
    assert count(server, "runs") == 2
