"""The connections of a process to a PostgreSQL, which its broker and its backend share."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, closing, contextmanager
from dataclasses import replace
from typing import Any, cast

import psycopg2
import pytest

from dagster_taskiq.backend import Backend, open_backend
from dagster_taskiq.backend.postgresql import PostgresqlBackend
from dagster_taskiq.backend.postgresql_schema import PART as BACKEND_PART
from dagster_taskiq.brokers import TaskBroker, open_broker
from dagster_taskiq.brokers.postgresql import PART as BROKER_PART
from dagster_taskiq.brokers.postgresql import PostgresqlTaskBroker
from dagster_taskiq.errors import RefusedByServerError, ServerError
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.servers import postgresql_pool
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq.servers.postgresql_schema import Part
from dagster_taskiq_tests.contract.backend_bench import record
from dagster_taskiq_tests.contract.broker_bench import PostgresHarness, task
from dagster_taskiq_tests.servers import crashable_postgres, postgres_options

#: For what must happen, on a loaded machine.
PATIENCE_SECONDS = 20.0

#: Calls at the same time: of a run or a launcher, and of a worker with its two listeners.
MOST_OF_SENDERS, MOST_OF_A_WORKER = 2, 4


class Crowd:
    """What a process has on one PostgreSQL, and what that sees of it."""

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self.server = PostgresHarness(options)
        self.opened: list[Backend | TaskBroker] = []

    def backend(self) -> PostgresqlBackend:
        self.opened.append(open_backend(self.options, Signer()))
        return cast("PostgresqlBackend", self.opened[-1])

    def broker(self, *queues: str) -> PostgresqlTaskBroker:
        self.opened.append(open_broker(self.options, queues))
        return cast("PostgresqlTaskBroker", self.opened[-1])

    async def worker(self) -> tuple[PostgresqlBackend, PostgresqlTaskBroker, PostgresqlTaskBroker]:
        """The servers of a worker, started in its order."""
        found = (self.backend(), self.broker("steps"), self.broker("runs"))
        for server in found:
            await server.startup()
        return found

    def sessions(self) -> set[int]:
        """The processes of the server that serve the connections."""
        rows = self.server.execute(
            "SELECT pid FROM pg_stat_activity WHERE application_name = %s",
            [self.options.key_prefix],
        )
        return {pid for (pid,) in rows}

    def end_sessions(self) -> None:
        """As where the server closes what is idle."""
        self.server.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s",
            [self.options.key_prefix],
        )

    def waiting_for_locks(self) -> int:
        rows = self.server.execute(
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE application_name = %s AND wait_event_type = 'Lock'",
            [self.options.key_prefix],
        )
        return int(rows[0][0])

    @contextmanager
    def locked(self, table: str) -> Iterator[None]:
        """Calls that need the table wait, for three seconds at most."""
        with closing(psycopg2.connect(self.options.url)) as connection:
            connection.cursor().execute(f'LOCK TABLE "{self.server.schema}".{table}')
            yield

    async def close(self) -> None:
        for server in self.opened:
            await server.shutdown()


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


def run(options: ServerOptions, test: Callable[[Crowd], Coroutine[Any, Any, None]]) -> None:
    async def closed_test() -> None:
        crowd = Crowd(options)
        await test(crowd)
        await crowd.close()
        await until(lambda: not crowd.sessions())

    asyncio.run(asyncio.wait_for(closed_test(), 60))


@pytest.fixture
def options() -> Iterator[ServerOptions]:
    with postgres_options() as options:
        yield options


# --- how many ---


def test_what_does_one_thing_after_the_other_has_one_connection(options: ServerOptions) -> None:
    """Whatever it has on the server: a worker that starts, a launcher."""

    async def test(crowd: Crowd) -> None:
        backend, steps, runs = await crowd.worker()
        sender = crowd.broker()
        await sender.kick(task("steps", "a"))
        assert await steps.take(["steps"]) is not None
        assert await runs.take(["runs"]) is None
        await backend.inspect("run", [])
        assert len(crowd.sessions()) == 1

    run(options, test)


@pytest.mark.parametrize("is_worker", [True, False])
def test_calls_at_the_same_time_have_few(options: ServerOptions, is_worker: bool) -> None:
    """Others wait, for however long it takes; an urgent one does not, and leaves none behind."""
    most = MOST_OF_A_WORKER if is_worker else MOST_OF_SENDERS

    async def test(crowd: Crowd) -> None:
        backend = (await crowd.worker())[0] if is_worker else crowd.backend()
        await backend.startup()
        with crowd.locked("tasks"):
            calls = [asyncio.ensure_future(backend.inspect("run", ["t"])) for _ in range(30)]
            await until(lambda: crowd.waiting_for_locks() == most)
            await backend.heartbeat(record("w"), expires_seconds=30)  # urgent
            assert crowd.waiting_for_locks() == most
        await asyncio.gather(*calls)
        await until(lambda: len(crowd.sessions()) <= most)
        assert len({epoch for epoch, _ in [await call for call in calls]}) == 1

    run(options, test)


def test_short_calls_share_two_connections(
    options: ServerOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though there are many at once: each waits for less time than opening one would take."""
    monkeypatch.setattr(postgresql_pool, "_PATIENCE_SECONDS", PATIENCE_SECONDS)

    async def test(crowd: Crowd) -> None:
        backend, *_ = await crowd.worker()
        await asyncio.gather(*(backend.inspect("run", [f"t{n}"]) for n in range(100)))
        assert len(crowd.sessions()) == 1

    run(options, test)


def test_those_that_are_not_needed_are_closed(
    options: ServerOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where those that are needed go on."""
    monkeypatch.setattr(postgresql_pool, "_IDLE_SECONDS", 0.5)

    async def test(crowd: Crowd) -> None:
        backend, steps, _ = await crowd.worker()
        with crowd.locked("tasks"):
            calls = [asyncio.ensure_future(backend.inspect("run", ["t"])) for _ in range(30)]
            await until(lambda: len(crowd.sessions()) == MOST_OF_A_WORKER)
        await asyncio.gather(*calls)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while len(crowd.sessions()) > 1:
            assert time.monotonic() < deadline
            await steps.take(["steps"])

    run(options, test)


def test_an_outage_leaves_no_more_than_before() -> None:
    """However many calls have failed in it, and were urgent."""

    async def test(crowd: Crowd) -> None:
        backend, steps, runs = await crowd.worker()
        node.kill()
        for _ in range(5):
            calls: list[Coroutine[Any, Any, Any]] = [steps.take(["steps"]), runs.take(["runs"])]
            calls += [backend.heartbeat(record("w"), expires_seconds=30) for _ in range(10)]
            calls += [backend.inspect("run", ["t"]) for _ in range(10)]
            found = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(it, ServerError) for it in found)
        await asyncio.to_thread(node.restart)
        await asyncio.gather(*(backend.inspect("run", ["t"]) for _ in range(100)))
        assert 1 <= len(crowd.sessions()) <= MOST_OF_A_WORKER

    with crashable_postgres() as (node, options):
        run(options, test)


def test_lost_connections_are_replaced_at_the_first_call(options: ServerOptions) -> None:
    """Whichever it meets, none of the others is tried after it."""

    async def test(crowd: Crowd) -> None:
        backend, *_ = await crowd.worker()
        with crowd.locked("tasks"):
            calls = [asyncio.ensure_future(backend.inspect("run", ["t"])) for _ in range(30)]
            await until(lambda: crowd.waiting_for_locks() == MOST_OF_A_WORKER)
        await asyncio.gather(*calls)
        before = crowd.sessions()
        assert len(before) == MOST_OF_A_WORKER
        crowd.end_sessions()
        await backend.inspect("run", ["t"])
        after = crowd.sessions()
        assert len(after) == 1
        assert not after & before

    run(options, test)


# --- who shares them ---


def test_who_leaves_ends_nothing_of_the_others(options: ServerOptions) -> None:
    """The calls of the others go on, and their own too; the last one closes the connections."""

    async def test(crowd: Crowd) -> None:
        backend, steps, runs = await crowd.worker()
        with crowd.locked("tasks"), crowd.locked("messages"):
            calls = [
                asyncio.ensure_future(call)
                for call in (backend.inspect("run", ["t"]), steps.depth("steps"))
            ]
            await until(lambda: crowd.waiting_for_locks() == len(calls))
            before = crowd.sessions()
            await steps.shutdown()
            await runs.shutdown()
        await asyncio.gather(*calls)
        await backend.inspect("run", ["t"])
        assert crowd.sessions() == before
        await backend.shutdown()
        await until(lambda: not crowd.sessions())
        # whoever comes back has them again
        await backend.inspect("run", ["t"])
        assert len(crowd.sessions()) == 1

    run(options, test)


def test_other_options_have_other_connections(options: ServerOptions) -> None:
    """Another time limit, for example; but not another name of the scheme."""

    async def test(crowd: Crowd) -> None:
        for changed, count in (
            ({"url": options.url.replace("postgresql://", "postgresql+psycopg2://")}, 1),
            ({"connect_timeout_seconds": 7.0}, 2),
        ):
            crowd.options = replace(options, **changed)  # type: ignore[arg-type]
            await crowd.backend().startup()
            crowd.options = options
            await crowd.broker().startup()
            assert len(crowd.sessions()) == count

    run(options, test)


def test_event_loops_share_none(options: ServerOptions) -> None:
    """As those of the launcher and of a run in one process have it."""

    async def test(crowd: Crowd) -> None:
        await crowd.backend().startup()
        with_other: list[int] = []

        async def other() -> None:
            backend = open_backend(options, Signer())
            await backend.startup()
            with_other.append(len(crowd.sessions()))
            await backend.shutdown()

        thread = threading.Thread(target=lambda: asyncio.run(other()))
        thread.start()
        await asyncio.to_thread(thread.join, PATIENCE_SECONDS)
        assert with_other == [2]

    run(options, test)


def test_each_user_greets_each_connection(options: ServerOptions) -> None:
    """So each knows its functions there and the backend's identity, whoever has opened it."""

    async def test(crowd: Crowd) -> None:
        broker, first, second = crowd.broker(), crowd.backend(), crowd.backend()
        await broker.startup()
        assert first.identity == ""
        await first.startup()
        assert first.identity.endswith(crowd.server.schema)
        await second.startup()
        assert second.identity == first.identity
        assert len(crowd.sessions()) == 1

    run(options, test)


def test_one_that_is_refused_takes_nothing_from_the_others(options: ServerOptions) -> None:
    """A part of the schema of another version is no reason for other connections."""

    async def test(crowd: Crowd) -> None:
        backend, broker = crowd.backend(), crowd.broker()
        await backend.startup()
        await broker.startup()
        before = crowd.sessions()
        crowd.server.execute("UPDATE {s}.broker_version SET oldest = 99")
        for _ in range(3):
            with pytest.raises(RefusedByServerError, match="newer version"):
                await crowd.broker().startup()
        await backend.inspect("run", [])
        assert crowd.sessions() == before

    run(options, test)


@pytest.mark.parametrize("part", [BROKER_PART, BACKEND_PART], ids=["broker", "backend"])
def test_functions_that_are_gone_are_made_again(options: ServerOptions, part: Part) -> None:
    """Those of the broker or those of the backend, under calls of both."""

    async def test(crowd: Crowd) -> None:
        backend, broker = crowd.backend(), crowd.broker()
        await backend.startup()
        await broker.startup()
        rows = crowd.server.execute(
            "SELECT oid::regprocedure FROM pg_proc WHERE pronamespace = '{s}'::regnamespace "
            "AND proname LIKE %s",
            [f"%{part.suffix}"],
        )
        for (function,) in rows:
            crowd.server.execute(f"DROP FUNCTION {function} CASCADE")
        calls = [broker.kick(task("steps", str(n))) for n in range(10)]
        await asyncio.gather(*calls, *(backend.inspect("run", ["t"]) for _ in range(10)))
        assert await broker.depth("steps") == len(calls)
        assert len(crowd.sessions()) <= MOST_OF_SENDERS

    run(options, test)


def test_a_fresh_password_is_made_for_each_connection(options: ServerOptions) -> None:
    """And not for each who shares it."""
    made: list[str] = []

    def make() -> str:
        made.append("x")
        return "x"

    async def test(crowd: Crowd) -> None:
        crowd.options = replace(options, fresh_password=make)
        broker, _, _ = await crowd.worker()
        assert len(made) == len(crowd.sessions()) == 1
        crowd.end_sessions()
        await broker.startup()
        assert len(made) == 2

    url = options.url
    if "@" in url and ":" in url.partition("@")[0].partition("://")[2]:
        pytest.skip("This server asks for the password of its own.")
    run(options, test)


# --- a call's turn ---


def test_who_gives_up_in_line_takes_no_place_with_it(options: ServerOptions) -> None:
    async def test(crowd: Crowd) -> None:
        backend = crowd.backend()
        await backend.startup()
        with crowd.locked("tasks"):
            calls = [asyncio.ensure_future(backend.inspect("run", ["t"])) for _ in range(20)]
            await until(lambda: crowd.waiting_for_locks() == MOST_OF_SENDERS)
            for call in calls[::2]:
                call.cancel()
            await asyncio.wait(calls[::2])
        await asyncio.gather(*calls[1::2])
        with crowd.locked("tasks"):
            calls = [asyncio.ensure_future(backend.inspect("run", ["t"])) for _ in range(20)]
            await until(lambda: crowd.waiting_for_locks() == MOST_OF_SENDERS)
        await asyncio.gather(*calls)
        assert len(crowd.sessions()) <= MOST_OF_SENDERS

    run(options, test)


def test_who_gives_up_when_it_is_its_turn_passes_it_on(options: ServerOptions) -> None:
    """Each time one place less would be left, until nobody had any."""

    async def test(crowd: Crowd) -> None:
        backend = crowd.backend()
        await backend.startup()
        pool = backend._connections._join()
        for _ in range(2 * MOST_OF_SENDERS):
            async with AsyncExitStack() as held:
                for _ in range(MOST_OF_SENDERS):
                    await held.enter_async_context(pool.link(is_urgent=False))
                waiting = asyncio.create_task(backend.inspect("run", []))
                await until(lambda: pool._line)
            waiting.cancel()  # the connection is its own, and it does not know yet
            await asyncio.wait({waiting})
            assert waiting.cancelled()
            await asyncio.wait_for(backend.inspect("run", []), PATIENCE_SECONDS)

    run(options, test)


def test_nobody_is_passed_over(options: ServerOptions) -> None:
    """Who looks all the time leaves claims their turn, and the other way round."""
    order: list[str] = []

    async def test(crowd: Crowd) -> None:
        backend, steps, _ = await crowd.worker()

        async def noted(name: str, call: Coroutine[Any, Any, Any]) -> None:
            await call
            order.append(name)

        with crowd.locked("tasks"), crowd.locked("messages"):
            blocked = [
                asyncio.ensure_future(backend.inspect("run", ["t"]))
                for _ in range(MOST_OF_A_WORKER)
            ]
            await until(lambda: crowd.waiting_for_locks() == MOST_OF_A_WORKER)
            looks = [asyncio.ensure_future(noted("look", steps.depth("q"))) for _ in range(4)]
            await asyncio.sleep(0)
            claims = [asyncio.ensure_future(noted("claim", backend.workers())) for _ in range(4)]
            await asyncio.sleep(0)
            urgent = asyncio.ensure_future(
                noted("urgent", backend.heartbeat(record("w"), expires_seconds=30))
            )
            await urgent
            assert order == ["urgent"]
        await asyncio.gather(*blocked, *looks, *claims)
        assert "look" in order[1:5]
        assert "claim" in order[-5:]

    run(options, test)
