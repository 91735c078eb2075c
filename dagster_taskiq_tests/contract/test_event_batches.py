"""Events that are written several at a time are all there, once, in their order, and in time."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import psycopg2
import pytest
import yaml
from dagster import AssetKey, AssetMaterialization, DagsterInstance, DagsterRun
from sqlalchemy import event
from sqlalchemy.dialects.mysql.base import MySQLDialect

from dagster_taskiq._dagster.names import (
    DagsterEvent,
    DagsterEventType,
    EngineEventData,
    EventLogEntry,
)
from dagster_taskiq._dagster.storage import insert_of, sql_event_log, storage_engines
from dagster_taskiq.errors import EventsNotWrittenError
from dagster_taskiq.execution.event_batches import batched_events
from dagster_taskiq.execution.storage_connections import kept_connections
from dagster_taskiq.execution.storage_patience import DatabasePatience
from dagster_taskiq_tests.forked import forked
from dagster_taskiq_tests.server_nodes import execute_sql
from dagster_taskiq_tests.servers import postgres_database
from dagster_taskiq_tests.unit.loop_jobs import single_job

WAIT_SECONDS = 20.0
PATIENCE = DatabasePatience(WAIT_SECONDS)


@dataclass
class Log:
    """A run's log in PostgreSQL.

    Attributes:
        statements: those that the instance has executed.
    """

    url: str
    instance: DagsterInstance
    run: DagsterRun
    statements: list[str] = field(default_factory=list)

    def report(self, message: str) -> None:
        """What Dagster says of its own doing."""
        self.instance.report_engine_event(message, self.run, EngineEventData())

    def print(self, message: str, level: int = logging.INFO) -> None:
        """What the user's code says."""
        self.instance.handle_new_event(_line(message, self.run.run_id, level))

    def messages(self, instance: DagsterInstance | None = None) -> list[str]:
        logs = (instance or self.instance).all_logs(self.run.run_id)
        return [it.dagster_event.message or "" if it.dagster_event else it.message for it in logs]

    def inserts(self) -> int:
        return sum(it.startswith("INSERT INTO event_logs") for it in self.statements)


def _line(message: str, run_id: str, level: int = logging.INFO) -> EventLogEntry:
    return EventLogEntry(
        error_info=None,
        level=level,
        user_message=message,
        run_id=run_id,
        timestamp=time.time(),
        step_key=None,
        job_name="single_job",
        dagster_event=None,
    )


def _instance(url: str, directory: Path) -> DagsterInstance:
    settings = {"storage": {"postgres": {"postgres_url": url}}, "telemetry": {"enabled": False}}
    directory.mkdir(exist_ok=True)
    (directory / "dagster.yaml").write_text(yaml.safe_dump(settings))
    return DagsterInstance.from_config(str(directory))


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    with postgres_database() as url, _instance(url, tmp_path / "writer") as instance:
        found = Log(url, instance, instance.create_run_for_job(single_job))
        with kept_connections(instance):
            (engine,) = {it.engine for it in storage_engines(instance)}
            event.listen(engine, "before_cursor_execute", _noting(found.statements))
            found.statements.clear()
            yield found


def _noting(statements: list[str]) -> Callable[..., None]:
    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    return note


@pytest.fixture
def reader(log: Log, tmp_path: Path) -> Iterator[DagsterInstance]:
    """Another process's view of the log."""
    with _instance(log.url, tmp_path / "reader") as instance:
        yield instance


def _await(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_comes_together_is_one_statement(log: Log) -> None:
    """In its order, and with a line of the user between, three."""
    expected = []
    with batched_events(log.instance, PATIENCE) as events:
        for number in range(5):
            log.report(f"before {number}")
            log.print(f"for debugging {number}", logging.DEBUG)
            expected += [f"before {number}", f"for debugging {number}"]
        log.print("a line")
        for number in range(5):
            log.report(f"after {number}")
        expected += ["a line", *(f"after {number}" for number in range(5))]
        events.begin_writing()
        events.flush()
        inserts = log.inserts()
        assert log.messages() == expected
    # a slow machine may take longer than the delay between two of them
    assert inserts < 11


def test_a_row_is_as_dagster_writes_it(log: Log) -> None:
    """All columns, whichever way it took: alone, or with others that have other columns."""
    key = "step[ä%s 'quoted' %(name)s \\]"
    event_of_step = EventLogEntry(
        error_info=None,
        level=20,
        user_message="",
        run_id=log.run.run_id,
        timestamp=1_700_000_000.5,
        step_key=key,
        job_name="single_job",
        dagster_event=DagsterEvent(
            event_type_value=DagsterEventType.STEP_START.value,
            job_name="single_job",
            step_key=key,
        ),
    )
    line = _line("100 %", log.run.run_id)
    sql_log = sql_event_log(log.instance)
    assert sql_log is not None
    entries = [event_of_step, line, event_of_step]
    for entry in entries:
        sql_log.store_event(entry)
    for together in (entries[:1], entries[1:]):
        sql_log.store_rows([sql_log.row_of(entry) for entry in together])
    with storage_engines(log.instance)[0].engine.connect() as connection:
        rows = connection.exec_driver_sql("SELECT * FROM event_logs ORDER BY id").mappings().all()
    found = [{name: it for name, it in row.items() if name != "id"} for row in rows]
    assert found[:3] == found[3:]
    assert [it["step_key"] for it in found[:3]] == [key, None, key]
    assert log.messages()[1] == "100 %"


def test_mysql_s_words_are_quoted() -> None:
    """One of the log's columns is called as a word of MySQL's."""
    engine: Any = SimpleNamespace(dialect=MySQLDialect())
    assert insert_of(engine, ("run_id", "partition")) == (
        "INSERT INTO event_logs (run_id, `partition`) VALUES "
    )


def _end_waiting_insert(cursor: Any) -> bool:
    """Whether there was a session that waited for a lock with its insert, which has been ended."""
    cursor.execute(
        "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE query LIKE 'INSERT %' "
        "AND wait_event_type = 'Lock' AND datname = current_database()"
    )
    return bool(cursor.fetchall())


def test_nobody_reads_a_log_that_is_behind(log: Log) -> None:
    """Through the same instance, whichever storage is asked."""
    with batched_events(log.instance, PATIENCE):
        for number in range(10):
            log.report(f"event {number}")
            assert len(log.messages()) == number + 1
        log.report("last")
        assert log.instance.get_run_by_id(log.run.run_id) is not None
        assert log.inserts() == 11


def test_others_see_an_event_soon(log: Log, reader: DagsterInstance) -> None:
    """Without a word from anybody."""
    with batched_events(log.instance, PATIENCE):
        for number in range(3):
            log.report(f"event {number}")
            _await(lambda n=number: len(log.messages(reader)) == n + 1)


def test_the_users_words_are_there_at_once(log: Log, reader: DagsterInstance) -> None:
    """With all that was said before, also of an asset."""
    with batched_events(log.instance, PATIENCE):
        log.report("before")
        log.print("a line")
        assert log.messages(reader) == ["before", "a line"]
        log.report("between")
        materialization = AssetMaterialization(asset_key=AssetKey("an_asset"))
        log.instance.report_runless_asset_event(materialization)
        assert log.messages(reader)[-1] == "between"
        assert reader.get_latest_materialization_event(AssetKey("an_asset")) is not None


def test_afterwards_all_is_as_before(log: Log) -> None:
    """Also where two batch, one within the other; and nothing that waited is lost."""
    log.instance.get_runs(limit=1)  # begins the thread that closes the idle connection
    threads = threading.active_count()
    with batched_events(log.instance, PATIENCE):
        with batched_events(log.instance, PATIENCE):
            log.report("inner")
        log.report("outer")
    assert log.messages() == ["inner", "outer"]
    assert threading.active_count() == threads
    assert "store_event" not in vars(log.instance.event_log_storage)
    assert all("connect" not in vars(it.engine) for it in storage_engines(log.instance))
    log.report("after")
    assert log.inserts() == 3


def test_a_server_that_has_closed_the_connection_costs_no_event(log: Log) -> None:
    """As one does that is restarted."""
    with batched_events(log.instance, PATIENCE) as events:
        for number in range(3):
            log.report(f"event {number}")
            events.flush()
            execute_sql(
                log.url,
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()",
            )
        log.report("last")
    assert log.messages() == ["event 0", "event 1", "event 2", "last"]


def test_a_server_that_goes_away_within_a_statement_costs_no_event(log: Log) -> None:
    """It had not taken the rows: they are written again."""
    with batched_events(log.instance, PATIENCE) as events:
        log.report("before")
        events.flush()
        with psycopg2.connect(log.url) as other, other.cursor() as cursor:
            cursor.execute("LOCK TABLE event_logs")
            log.report("one")
            log.report("two")
            events.begin_writing()
            _await(lambda: _end_waiting_insert(cursor))
            other.rollback()
        events.flush()
    assert log.messages() == ["before", "one", "two"]


def test_rows_whose_answer_is_lost_are_not_doubled(log: Log) -> None:
    """The server had taken them before it went away."""
    engine = storage_engines(log.instance)[0].engine
    seen = []

    def execute_and_hang_up(cursor: Any, statement: str, parameters: Any, _context: Any) -> bool:
        if seen or not statement.startswith("INSERT INTO event_logs"):
            return False
        seen.append(statement)
        cursor.execute(statement, parameters)
        cursor.connection.close()
        raise psycopg2.OperationalError("server closed the connection unexpectedly")

    with batched_events(log.instance, PATIENCE) as events:
        event.listen(engine, "do_execute", execute_and_hang_up)
        log.report("one")
        log.report("two")
        events.flush()
    assert seen
    assert log.messages() == ["one", "two"]


def test_what_cannot_be_written_is_said(log: Log) -> None:
    """Once: what comes later is written again."""
    with batched_events(log.instance, PATIENCE) as events:
        execute_sql(log.url, "ALTER TABLE event_logs RENAME TO away")
        log.report("lost")
        with pytest.raises(EventsNotWrittenError, match="event_logs"):
            events.flush()
        execute_sql(log.url, "ALTER TABLE away RENAME TO event_logs")
        log.report("written")
        events.flush()
    assert log.messages() == ["written"]


def test_an_error_is_not_forgotten_by_who_reads(log: Log) -> None:
    """Dagster gets it with the next event of its own; a line of the user's is no such event."""
    with pytest.raises(EventsNotWrittenError), batched_events(log.instance, PATIENCE):  # noqa: PT012
        execute_sql(log.url, "ALTER TABLE event_logs RENAME TO away")
        log.report("lost")
        log.instance.get_runs()
        execute_sql(log.url, "ALTER TABLE away RENAME TO event_logs")
        log.print("a line")
        with pytest.raises(EventsNotWrittenError):
            log.report("not taken")
        assert log.messages() == ["a line"]


def test_what_a_step_forks_writes_its_own(log: Log) -> None:
    """And not what waits in its parent."""
    with batched_events(log.instance, PATIENCE) as events:
        log.report("first")
        events.flush()
        for number in range(20):
            log.report(f"parent {number}")

        def report() -> None:
            log.report("child")
            events.flush()

        with forked(report):
            pass
        messages = log.messages()
    assert messages.count("child") == 1
    assert [it for it in messages if it != "child"] == [
        "first",
        *(f"parent {number}" for number in range(20)),
    ]


def test_an_interrupt_loses_and_doubles_nothing(log: Log) -> None:
    """It comes while the main thread waits for the database, as a cancel does."""

    class AlarmError(Exception):
        pass

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise AlarmError

    before = signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    try:
        with batched_events(log.instance, PATIENCE) as events:
            for number in range(60):
                log.report(f"event {number}")
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.0002 + number * 0.00005)
                    events.flush()
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except AlarmError:
                    interrupted += 1
    finally:
        signal.signal(signal.SIGALRM, before)
    assert log.messages() == [f"event {number}" for number in range(60)]
    assert interrupted > 0


def test_threads_keep_each_their_order(log: Log) -> None:
    """Whoever flushes finds its own written."""
    with batched_events(log.instance, PATIENCE) as events:

        def write(name: int) -> None:
            for number in range(20):
                log.report(f"{name}: {number}")
                if number % 7 == name:
                    events.flush()

        threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_SECONDS)
        messages = log.messages()
    for name in range(4):
        own = [it for it in messages if it.startswith(f"{name}:")]
        assert own == [f"{name}: {number}" for number in range(20)]


def test_files_are_left_alone(tmp_path: Path) -> None:
    """SQLite's log is written as ever."""
    with DagsterInstance.local_temp(str(tmp_path)) as instance:
        run = instance.create_run_for_job(single_job)
        with batched_events(instance, PATIENCE) as events:
            assert "store_event" not in vars(instance.event_log_storage)
            instance.report_engine_event("an event", run, EngineEventData())
            assert len(instance.all_logs(run.run_id)) == 1
            events.flush()
