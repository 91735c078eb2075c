"""What a user may do who may create nothing, once a DBA has executed the SQL that is printed."""

from __future__ import annotations

import asyncio
import shlex
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import pytest

from dagster_taskiq.backend import TaskState
from dagster_taskiq.backend.postgresql_schema import PART as BACKEND_PART
from dagster_taskiq.brokers.postgresql import PART as BROKER_PART
from dagster_taskiq.brokers.postgresql import PostgresqlTaskBroker
from dagster_taskiq.errors import RefusedByServerError
from dagster_taskiq.messages.attempt_ends import Counted, Counter, HistoryBatch
from dagster_taskiq.messages.queue_pauses import QueuePause
from dagster_taskiq.messages.withheld_steps import Withheld, WithheldGroup
from dagster_taskiq.messages.worker_records import RunningTask
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq_tests.contract import broker_bench
from dagster_taskiq_tests.contract.backend_bench import Bench, PostgresHarness, an_end, record
from dagster_taskiq_tests.contract.broker_bench import consuming, eventually, task
from dagster_taskiq_tests.database_setup import (
    PASSWORD,
    as_role,
    database_and_role,
    printed_setup,
    run_psql,
)
from dagster_taskiq_tests.server_nodes import execute_sql


class Database:
    """A database of the test's own.

    Attributes:
        url: for a user who may do everything.
        role: a user who may create nothing.
        mine: the same database for that user.
    """

    def __init__(self, url: str, role: str) -> None:
        self.url = url
        self.role = role
        self.mine = ServerOptions(as_role(url, role))

    def broker(self) -> PostgresqlTaskBroker:
        return PostgresqlTaskBroker(self.mine)

    def rows(self, statement: str) -> list[Any]:
        return broker_bench.PostgresHarness(ServerOptions(self.url)).execute(statement)

    def prepare(self, *arguments: str) -> None:
        """Execute what is printed."""
        words = arguments or ("database", "sql", "--role", self.role)
        run_psql(self.url, printed_setup(words, self.mine.url))


@pytest.fixture
def database() -> Iterator[Database]:
    with database_and_role() as (url, role):
        yield Database(url, role)


async def start(broker: PostgresqlTaskBroker) -> None:
    try:
        await broker.startup()
    finally:
        await broker.shutdown()


def named_command(error: RefusedByServerError) -> list[str]:
    """The arguments of the command that an error names."""
    text = str(error).split("dagster-taskiq database", 1)[1].split(" (and", 1)[0]
    return ["database", *shlex.split(text)]


# --- what is enough ---


def use_backend(bench: Bench) -> None:
    """Each function of it."""
    bench.open_run()
    done, lost, held = bench.claimed(), bench.claimed(), bench.claimed()
    bench.begin(held)
    assert bench.complete(done)
    assert bench.results() == {done.task_id: b"result"}
    assert bench.read(done.task_id)
    bench.forget_results(done.task_id)
    bench.expire(lost)
    assert bench.condemn(lost.task_id)
    assert bench.reopen("unknown")
    assert bench.cancel("queued") == [TaskState.CANCELLED]
    assert bench.call(bench.backend.runs())
    # in its new life the server has forgotten a claim that lives
    bench.harness.forget()
    assert bench.renew(held).is_held
    bench.release(held)
    assert bench.renew_run()
    withheld = Withheld((WithheldGroup("pool", "", (("step", 1.5),)),))
    assert bench.call(bench.backend.tell_withheld(bench.run_id, withheld, token="loop"))
    assert bench.call(bench.backend.runs())[0].withheld == withheld
    bench.disown_run()
    bench.close_run()
    running = [RunningTask("task", "run", "step", 1, "queue", 1.5)]
    bench.call(bench.backend.heartbeat(record("w"), expires_seconds=30, running=running))
    assert bench.call(bench.backend.workers())
    assert not bench.call(bench.backend.lost_workers())
    bench.call(bench.backend.running())
    bench.call(bench.backend.send_control("w", "order"))
    assert bench.control("w") == [b"order"]
    bench.call(bench.backend.goodbye("w"))
    batch = HistoryBatch([an_end("task")], {Counter("queue", "steps", Counted.SENT): 1})
    bench.call(bench.backend.add_history(batch))
    assert bench.call(bench.backend.ended())
    assert bench.call(bench.backend.counts())
    bench.call(bench.backend.tidy())
    bench.call(bench.backend.pause_queue(QueuePause("queue", "", 1.5, "host")))
    assert bench.call(bench.backend.paused_queues())
    assert bench.call(bench.backend.resume_queue("queue"))


async def use_broker(harness: broker_bench.PostgresHarness) -> None:
    """Each function of it."""
    queue = harness.queue()
    async with consuming(harness, queue) as consumer:
        broker = cast("PostgresqlTaskBroker", consumer.broker)
        await consumer.until_idle()
        await broker.kick_many([task(queue, text) for text in "abc"])
        assert (await consumer.take()).data == b"a"
        await broker._in_hand._put_off_all()
        assert await broker.depth(queue) == 2
        assert await broker.queues_with_tasks() == {queue}
        assert len(await broker.peek(queue, 5)) == 2
        assert await broker.by_priority(queue)
        assert await broker.places(queue, ["b", "c"]) == {"b": 1, "c": 2}
        assert await broker._find_floors([queue], None)
        assert await broker.withdraw(queue, ["b"]) == {"b"}
        assert await broker.absent(queue, ["b", "c"]) == {"b"}
        given_back = await consumer.take()
        await given_back.release()
        assert await consumer.finish() == "c"
        await broker.leave_note("run", b"note")
        assert await broker.take_note("run") == b"note"


def test_all_functions_work_for_a_user_who_may_create_nothing(database: Database) -> None:
    """The script is executed twice, which does no harm."""
    database.prepare()
    database.prepare()
    execute_sql(database.url, f"ALTER ROLE \"{database.role}\" SET track_functions TO 'pl'")
    with ExitStack() as stack:
        server = PostgresHarness(ServerOptions(database.url))
        stack.callback(server.close)
        server.options = database.mine
        bench = Bench(server)
        stack.callback(bench.close)
        use_backend(bench)
    asyncio.run(use_broker(broker_bench.PostgresHarness(database.mine)))
    there = database.rows("SELECT proname FROM pg_proc WHERE pronamespace = '{s}'::regnamespace")
    left = {name for (name,) in there if name.endswith((BACKEND_PART.suffix, BROKER_PART.suffix))}
    assert len(left) > 30

    async def are_all_called() -> bool:
        called = database.rows("SELECT funcname FROM pg_stat_user_functions WHERE calls > 0")
        left.difference_update(name for (name,) in called)
        return not left

    try:
        asyncio.run(eventually(are_all_called))
    finally:
        assert left == set()
    owned = f"SELECT 1 FROM pg_class WHERE relowner = '\"{database.role}\"'::regrole"
    assert database.rows(owned) == []


def test_the_settings_say_which_parts_are_made(database: Database) -> None:
    """A database that is only the broker gets no tables of the backend."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAGSTER_TASKIQ_BACKEND_URL", "redis://nowhere/0")
        database.prepare()
    asyncio.run(start(database.broker()))
    assert database.rows("SELECT to_regclass('{s}.tasks')") == [(None,)]


@pytest.mark.parametrize("prefix", ['a"b', "it's 100 %", "{v} {s}", "ä" * 40])
def test_any_prefix_can_be_prepared(
    database: Database, prefix: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tmp_path / "taskiq.yaml"
    prefix += uuid.uuid4().hex
    settings.write_text(f"execution: {{config: {{config_source: {{key_prefix: {prefix!r}}}}}}}")
    database.prepare("database", "sql", "--role", database.role, "-y", str(settings))
    asyncio.run(start(PostgresqlTaskBroker(replace(database.mine, key_prefix=prefix))))


# --- what an error says ---


def refused(database: Database, words: str) -> list[str]:
    """The arguments of the command that the error of a start names."""
    with pytest.raises(RefusedByServerError, match=words) as caught:
        asyncio.run(start(database.broker()))
    assert PASSWORD not in str(caught.value)
    assert not caught.value.is_final  # a DBA may be at it
    return named_command(caught.value)


def test_an_error_names_the_command_that_makes_the_schema(database: Database) -> None:
    database.prepare(*refused(database, "is not there, and .* may not make it"))
    asyncio.run(start(database.broker()))


def test_an_error_names_the_command_after_an_update(database: Database) -> None:
    """The tables are there, and not what this version adds to them."""
    database.prepare()
    for name in ("enter_broker", "take"):
        execute_sql(database.url, f"DROP FUNCTION dagster_taskiq.{name}{BROKER_PART.suffix}")
    database.prepare(*refused(database, r"lacks what version .* adds, and .* may not add it"))
    asyncio.run(start(database.broker()))


def test_an_error_names_the_command_where_only_grants_are_missing(database: Database) -> None:
    """Somebody else has made the schema; or it has tables that the role may not write."""
    database.prepare()
    schema, role = "dagster_taskiq", f'"{database.role}"'
    execute_sql(database.url, f"REVOKE USAGE ON SCHEMA {schema} FROM {role}")
    database.prepare(*refused(database, "may not use its schema"))
    execute_sql(database.url, f"REVOKE SELECT ON {schema}.broker_version FROM {role}")
    database.prepare(*refused(database, "may not use its schema"))
    asyncio.run(start(database.broker()))


def test_a_user_who_may_create_needs_no_dba(database: Database) -> None:
    """As the first to start; what it has made, it may use."""
    name = database.url.rpartition("/")[2]
    execute_sql(database.url, f'GRANT CREATE ON DATABASE "{name}" TO "{database.role}"')
    asyncio.run(start(database.broker()))
    execute_sql(database.url, f'REVOKE CREATE ON DATABASE "{name}" FROM "{database.role}"')
    asyncio.run(start(database.broker()))
