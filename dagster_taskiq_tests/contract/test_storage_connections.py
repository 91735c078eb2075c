"""One connection to Dagster's database is kept, and nothing notices but the clock."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psycopg2
import pytest
import yaml
from dagster import DagsterInstance, DagsterRun
from sqlalchemy import event, select, text
from sqlalchemy.engine import Engine
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from dagster_taskiq._dagster.names import EngineEventData, capture_interrupts
from dagster_taskiq._dagster.storage import storage_engines
from dagster_taskiq.errors import DatabaseAwayError
from dagster_taskiq.execution import storage_patience
from dagster_taskiq.execution.storage_connections import IdleCloser, kept_connections
from dagster_taskiq.execution.storage_patience import DatabasePatience, patient_connections
from dagster_taskiq_tests.forked import forked
from dagster_taskiq_tests.server_nodes import execute_sql
from dagster_taskiq_tests.servers import postgres_database
from dagster_taskiq_tests.unit.loop_jobs import single_job

PATIENCE_SECONDS = 60.0
IDLE_SECONDS = 0.1

#: Longer than any test takes, on however busy a machine.
KEPT_SECONDS = 3600.0


@dataclass
class Storage:
    """An instance in PostgreSQL.

    Attributes:
        connects, closes: one entry for each connection that was opened or closed.
    """

    url: str
    instance: DagsterInstance
    run: DagsterRun
    connects: list[Any]
    closes: list[Any]
    at_end: ExitStack

    def listen(self, name: str, listener: Callable[..., Any]) -> None:
        """Listen to an event of all engines until the end of the test."""
        for engine in self.engines:
            event.listen(engine, name, listener)
            self.at_end.callback(event.remove, engine, name, listener)

    def write(self, message: str) -> None:
        self.instance.report_engine_event(message, self.run, EngineEventData())

    def messages(self) -> list[str]:
        logs = self.instance.all_logs(self.run.run_id)
        return [str(it.dagster_event and it.dagster_event.message) for it in logs]

    @property
    def engines(self) -> list[Engine]:
        return [it.engine for it in storage_engines(self.instance)]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, DagsterInstance]]:
    """One for all, since to make its tables takes longer than a test."""
    with postgres_database() as url:
        settings = {"storage": {"postgres": {"postgres_url": url}}, "telemetry": {"enabled": False}}
        directory = tmp_path_factory.mktemp("instance")
        (directory / "dagster.yaml").write_text(yaml.safe_dump(settings))
        with DagsterInstance.from_config(str(directory)) as instance:
            yield url, instance


@pytest.fixture
def storage(database: tuple[str, DagsterInstance]) -> Iterator[Storage]:
    url, instance = database
    with ExitStack() as at_end:
        found = Storage(url, instance, instance.create_run_for_job(single_job), [], [], at_end)
        found.listen("connect", lambda *_: found.connects.append(1))
        found.listen("close", lambda *_: found.closes.append(1))
        yield found


def test_one_connection_serves_all_storages(storage: Storage) -> None:
    """Events, runs and their reading share it."""
    with kept_connections(storage.instance, KEPT_SECONDS):
        for number in range(5):
            storage.write(f"event {number}")
        assert storage.instance.get_run_by_id(storage.run.run_id) is not None
        assert storage.messages() == [f"event {number}" for number in range(5)]
        assert len(storage.connects) == 1


def test_it_is_closed_and_all_is_as_before(storage: Storage) -> None:
    """Also where two keep it, one within the other."""
    before = storage.engines
    with kept_connections(storage.instance, KEPT_SECONDS):
        with kept_connections(storage.instance, KEPT_SECONDS):
            storage.write("inner")
        storage.write("outer")
        assert len(storage.connects) == 1
    assert storage.engines == before
    assert all(type(engine.pool) is NullPool for engine in storage.engines)
    storage.write("after")
    assert len(storage.connects) == 2


def _await(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _has_connections(url: str) -> bool:
    """Whether the database has others than the one that asks."""
    with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute(
            "SELECT 1 FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid() LIMIT 1"
        )
        return cursor.fetchone() is not None


def test_it_is_closed_when_nobody_uses_it(storage: Storage) -> None:
    """Each time, and the next use opens another one."""
    with kept_connections(storage.instance, IDLE_SECONDS):
        for number in range(3):
            storage.write(f"event {number}")
            _await(lambda: not _has_connections(storage.url))
        assert storage.messages() == [f"event {number}" for number in range(3)]
        assert len(storage.connects) == 4


def test_what_is_in_use_is_not_closed(storage: Storage) -> None:
    """A transaction outlives that another connection is idle, and is closed when it is over."""
    with kept_connections(storage.instance, IDLE_SECONDS):
        with storage.engines[0].connect() as connection:
            connection.execute(text("CREATE TEMPORARY TABLE mine (number int)"))
            for number in range(3):
                closed = len(storage.closes)
                storage.write(f"event {number}")
                _await(lambda before=closed: len(storage.closes) > before)
            connection.execute(text("INSERT INTO mine VALUES (1)"))
            assert connection.execute(text("SELECT number FROM mine")).scalar() == 1
        _await(lambda: not _has_connections(storage.url))


def test_what_is_used_all_the_time_stays_open(storage: Storage) -> None:
    """Until all is as before."""
    with kept_connections(storage.instance, KEPT_SECONDS):
        for number in range(20):
            storage.write(f"event {number}")
        assert not storage.closes
    assert len(storage.connects) == len(storage.closes) == 1


def test_nothing_is_kept_for_no_time(storage: Storage) -> None:
    """Each statement has a connection of its own, as in Dagster."""
    threads = threading.active_count()
    with kept_connections(storage.instance, 0):
        storage.write("event")
        assert len(storage.connects) == len(storage.closes) == 1
        assert threading.active_count() == threads


def test_what_a_step_forks_closes_its_own(storage: Storage) -> None:
    """It has no thread of its parent's."""
    with kept_connections(storage.instance, IDLE_SECONDS):
        storage.write("before")

        def write_and_wait() -> None:
            storage.write("child")
            _await(lambda: not _has_connections(storage.url))

        with forked(write_and_wait):
            pass
        assert storage.messages() == ["before", "child"]


def test_the_last_use_is_always_noticed() -> None:
    """However it falls to the look that finds nothing in use."""
    before = threading.active_count()
    closes: list[float] = []
    closer = IdleCloser(0.0001, lambda: closes.append(time.monotonic()))
    try:
        for number in range(2000):
            used_at = time.monotonic()
            closer.note_use()
            if number % 50 == 0:
                _await(lambda at=used_at: closes[-1:] > [at])
    finally:
        closer.end()
    assert threading.active_count() == before


def test_threads_that_use_it_first_at_once_start_one_thread() -> None:
    """Which its end ends."""
    before = threading.active_count()
    for _ in range(50):
        closer = IdleCloser(60, lambda: None)
        with ThreadPoolExecutor(4) as users:
            barrier = threading.Barrier(4)
            for _ in range(4):
                users.submit(_use_with_others, closer, barrier)
        closer.end()
        assert threading.active_count() == before


def test_an_interrupt_of_the_start_leaves_no_thread() -> None:
    """It has begun by then, unknown to all, and the next use begins another one."""
    before = threading.active_count()
    start = threading.Thread.start

    def start_and_raise(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    for uses_afterwards in (0, 1):
        closer = IdleCloser(KEPT_SECONDS, lambda: None)
        with (
            patch.object(threading.Thread, "start", start_and_raise),
            pytest.raises(KeyboardInterrupt),
        ):
            closer.note_use()
        for _ in range(uses_afterwards):
            closer.note_use()
        end = threading.Thread(target=closer.end, daemon=True)
        end.start()
        end.join(PATIENCE_SECONDS)
        assert not end.is_alive()
        _await(lambda: threading.active_count() == before)


def _use_with_others(closer: IdleCloser, barrier: threading.Barrier) -> None:
    barrier.wait()
    closer.note_use()


def test_a_server_that_has_closed_it_costs_no_event(storage: Storage) -> None:
    """As one does that is restarted."""
    with kept_connections(storage.instance, KEPT_SECONDS):
        for number in range(3):
            storage.write(f"event {number}")
            execute_sql(
                storage.url,
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()",
            )
        storage.write("last")
        assert storage.messages() == ["event 0", "event 1", "event 2", "last"]
        assert len(storage.connects) == 4


def test_threads_get_connections_of_their_own(storage: Storage) -> None:
    """As many as write at once."""
    with kept_connections(storage.instance, KEPT_SECONDS):
        barrier = threading.Barrier(4)

        def write(number: int) -> None:
            with storage.engines[0].connect():
                barrier.wait(20)
                storage.write(f"event {number}")

        threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert sorted(storage.messages()) == [f"event {number}" for number in range(4)]


def test_what_a_step_forks_has_its_own(storage: Storage) -> None:
    """Two processes that wrote into one connection would destroy both's words."""
    with kept_connections(storage.instance, KEPT_SECONDS):
        storage.write("before")
        with forked(lambda: storage.write("child")):
            for number in range(20):
                storage.write(f"parent {number}")
        storage.write("after")
        messages = storage.messages()
        assert messages.count("child") == 1
        assert [it for it in messages if it != "child"] == [
            "before",
            *(f"parent {number}" for number in range(20)),
            "after",
        ]
        assert len(storage.connects) == 1


def _hang_up(cursor: Any) -> None:
    with psycopg2.connect(cursor.connection.dsn) as other, other.cursor() as killer:
        killer.execute(
            "SELECT pg_terminate_backend(%s, 10000)", (cursor.connection.get_backend_pid(),)
        )


@pytest.mark.parametrize("is_kept", [True, False])
def test_what_loses_its_connection_is_read_again(storage: Storage, is_kept: bool) -> None:
    """Ended after it was looked at, before its statement, by an administrator or a shutdown."""
    ended = []

    def end(cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("SELECT") and len(ended) < 2:
            ended.append(statement)
            _hang_up(cursor)

    storage.listen("do_execute", end)
    storage.write("an event")
    patience = DatabasePatience(PATIENCE_SECONDS)
    with (
        kept_connections(storage.instance, KEPT_SECONDS) if is_kept else nullcontext(),
        patient_connections(storage.instance, patience),
    ):
        assert storage.instance.get_run_by_id(storage.run.run_id) is not None
        assert storage.messages() == ["an event"]
    assert len(ended) == 2


def test_what_only_reads_is_read_again_in_the_middle(storage: Storage) -> None:
    """SQLAlchemy looks at a table by several statements on one connection, as Dagster does."""
    with patient_connections(storage.instance, DatabasePatience(PATIENCE_SECONDS)):
        storage.instance.get_runs(limit=1)
        ended: list[str] = []

        def end(cursor: Any, statement: str, *_: Any) -> None:
            if "pg_enum" in statement and not ended:
                ended.append(statement)
                _hang_up(cursor)

        storage.listen("do_execute", end)
        runs: Any = storage.instance.run_storage
        assert type(runs).has_run_stats_index_cols(runs)
        assert ended


def test_a_transaction_that_was_asked_for_is_not_read_again(storage: Storage) -> None:
    """Nor one that holds locks: what follows relies on them."""
    with patient_connections(storage.instance, DatabasePatience(PATIENCE_SECONDS)):
        engine = storage.engines[0]
        with engine.connect() as connection:
            connection.execute(select(text("1")))
            connection.commit()
            transaction = connection.begin()
            _hang_up(connection.connection.cursor())
            with pytest.raises(OperationalError):
                connection.execute(select(text("1")))
            transaction.rollback()
        with engine.connect() as connection:
            connection.execute(select(text("1")).with_for_update())
            _hang_up(connection.connection.cursor())
            with pytest.raises(OperationalError):
                connection.execute(select(text("1")))


def test_a_transaction_is_not_read_again(storage: Storage) -> None:
    """What came before the statement is lost with the connection."""
    with patient_connections(storage.instance, DatabasePatience(PATIENCE_SECONDS)):
        engine = storage.engines[0]
        with engine.connect() as connection:
            connection.execute(text("CREATE TEMPORARY TABLE mine (number int)"))
            _hang_up(connection.connection.cursor())
            with pytest.raises(OperationalError):
                connection.execute(select(text("* FROM mine")))


def test_a_database_that_takes_no_connection_is_waited_for(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    """What is read and written then is there, and the log says once what was waited for."""
    left = [
        "FATAL: the database system is starting up",
        "FATAL: sorry, too many clients already",
        "connection to server failed: Connection refused",
    ]

    def refuse(*_: Any) -> None:
        if left:
            raise psycopg2.OperationalError(left.pop())

    storage.listen("do_connect", refuse)
    with patient_connections(storage.instance, DatabasePatience(PATIENCE_SECONDS)):
        storage.write("an event")
        assert storage.messages() == ["an event"]
    assert not left
    assert caplog.text.count("is away: connection to server failed") == 1
    assert caplog.text.count("is away") == 1


def test_a_password_that_is_wrong_is_not_waited_for(storage: Storage) -> None:
    """Nor is anything else that no waiting mends."""
    tries = []

    def refuse(*_: Any) -> None:
        tries.append(1)
        raise psycopg2.OperationalError('FATAL:  password authentication failed for user "me"')

    engine = storage.engines[0]
    storage.listen("do_connect", refuse)
    with (
        patient_connections(storage.instance, DatabasePatience(PATIENCE_SECONDS)),
        pytest.raises(OperationalError),
    ):
        engine.connect()
    assert len(tries) == 1


def test_waiting_ends_when_the_process_is_told_to_stop(storage: Storage) -> None:
    """A step that waits for the database obeys a cancel, and so does a run."""

    def refuse(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise psycopg2.OperationalError("FATAL:  the database system is starting up")

    engine = storage.engines[0]
    storage.listen("do_connect", refuse)
    with (
        capture_interrupts(),
        patient_connections(storage.instance, DatabasePatience(PATIENCE_SECONDS)),
    ):
        with pytest.raises(DatabaseAwayError, match="told to stop"):
            engine.connect()
        no_longer = patch.object(storage_patience, "is_interrupt_captured", lambda: False)
        # the interrupt has been raised by then, and what ends the process still wants to write
        with no_longer, pytest.raises(DatabaseAwayError, match="told to stop"):
            engine.connect()


def test_afterwards_nobody_waits(storage: Storage) -> None:
    """Also where two wait, one within the other."""
    for seconds in (PATIENCE_SECONDS, 0):
        outer, inner = DatabasePatience(seconds), DatabasePatience(PATIENCE_SECONDS)
        with patient_connections(storage.instance, outer):
            with patient_connections(storage.instance, inner):
                storage.write("inner")
            storage.write("outer")
    assert all("_connection_cls" not in vars(engine) for engine in storage.engines)


def test_storage_without_a_server(tmp_path: Path) -> None:
    """SQLite is left alone."""
    with DagsterInstance.local_temp(str(tmp_path)) as instance:
        run = instance.create_run_for_job(single_job)
        engines = [it.engine for it in storage_engines(instance)]
        with kept_connections(instance):
            instance.report_engine_event("an event", run, EngineEventData())
            assert [it.engine for it in storage_engines(instance)] == engines
        assert len(instance.all_logs(run.run_id)) == 1
