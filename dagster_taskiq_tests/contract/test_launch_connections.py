"""Launches that follow one another share connections to Dagster's database, and leave none."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import psycopg2
import pytest
import yaml
from dagster import DagsterInstance, DagsterRun, DagsterRunStatus
from dagster._core.definitions.reconstruct import ReconstructableJob
from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.pool import NullPool

from dagster_taskiq._dagster.storage import storage_engines
from dagster_taskiq.launch.launch_connections import MAX_CONNECTIONS, LaunchConnections
from dagster_taskiq.launcher import TaskiqRunLauncher
from dagster_taskiq.tags import TASK_ID_TAG
from dagster_taskiq_tests.acceptance import launcher_jobs
from dagster_taskiq_tests.forked import forked
from dagster_taskiq_tests.server_nodes import execute_sql
from dagster_taskiq_tests.servers import amqp_options, postgres_database, redis_options

PATIENCE_SECONDS = 60.0

#: Longer than any test takes, on however busy a machine.
KEPT_SECONDS = 3600.0

#: Runs of a burst.
RUNS = 24


@dataclass
class Launching:
    """An instance in PostgreSQL, with the launcher.

    Attributes:
        opened: one entry for each connection to the database that was opened.
    """

    url: str
    instance: DagsterInstance
    opened: list[int]

    @property
    def engines(self) -> list[Engine]:
        return [it.engine for it in storage_engines(self.instance)]

    def is_as_before(self) -> bool:
        return all(type(engine.pool) is NullPool for engine in self.engines)

    def connections(self) -> int:
        """How many the database has, beside the one that asks."""
        count = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        with closing(psycopg2.connect(self.url)) as connection, connection.cursor() as cursor:
            cursor.execute(f"{count} AND pid <> pg_backend_pid()")
            return int(cursor.fetchone()[0])

    def create(self) -> str:
        origin = ReconstructableJob.for_module(launcher_jobs.__name__, "in_process")
        return self.instance.create_run_for_job(
            launcher_jobs.in_process, job_code_origin=origin.get_python_origin()
        ).run_id

    def launch(self, run_id: str) -> None:
        self.instance.launch_run(run_id, cast("Any", None))

    def known(self, run_id: str) -> DagsterRun:
        run = self.instance.get_run_by_id(run_id)
        assert run is not None
        return run


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    with postgres_database() as url:
        yield url


@pytest.fixture
def open_launching(database: str, tmp_path: Path) -> Iterator[Callable[..., Launching]]:
    with ExitStack() as at_end:

        def open_it(broker: str = "redis", **source: Any) -> Launching:
            redis = at_end.enter_context(redis_options())
            urls = {"redis": redis.url}
            if broker == "rabbitmq":
                urls["rabbitmq"] = at_end.enter_context(amqp_options()).url
            launcher = {
                "module": "dagster_taskiq.launcher",
                "class": "TaskiqRunLauncher",
                "config": {
                    "broker": urls[broker],
                    "backend": redis.url,
                    "config_source": {"key_prefix": redis.key_prefix, **source},
                },
            }
            settings = {
                "storage": {"postgres": {"postgres_url": database}},
                "telemetry": {"enabled": False},
                "run_launcher": launcher,
            }
            (tmp_path / "dagster.yaml").write_text(yaml.safe_dump(settings))
            instance = at_end.enter_context(DagsterInstance.from_config(str(tmp_path)))
            found = Launching(database, instance, [])
            for engine in found.engines:
                event.listen(engine, "connect", lambda *_: found.opened.append(1))
            return found

        yield open_it


def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.parametrize("broker", ["redis", "rabbitmq"])
@pytest.mark.parametrize("threads", [1, 4])
def test_a_burst_is_launched_over_few_connections(
    open_launching: Callable[..., Launching], broker: str, threads: int
) -> None:
    """Each run is sent once, with its tag and its event."""
    it = open_launching(broker, database_idle_seconds=KEPT_SECONDS)
    run_ids = [it.create() for _ in range(RUNS)]
    it.launch(run_ids[0])
    it.opened.clear()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(it.launch, run_ids[1:]))
    assert len(it.opened) < MAX_CONNECTIONS
    for run_id in run_ids:
        run = it.known(run_id)
        assert run.status is DagsterRunStatus.STARTING
        texts = [
            str(e.dagster_event.message) for e in it.instance.all_logs(run_id) if e.dagster_event
        ]
        sent = [text for text in texts if text.startswith("[TaskiqRunLauncher] Sent the run to")]
        assert len(sent) == 1
        assert run.tags[TASK_ID_TAG]


def test_those_that_nobody_uses_are_closed(open_launching: Callable[..., Launching]) -> None:
    """Each time, after the time that is set."""
    it = open_launching(database_idle_seconds=0.2)
    for _ in range(2):
        it.launch(it.create())
        until(lambda: it.connections() == 0, "all connections are closed")
    assert not it.is_as_before()


def test_connections_that_are_in_use_are_closed_when_they_come_back(
    open_launching: Callable[..., Launching],
) -> None:
    """A thread of the daemon may be in the midst of something else."""
    it = open_launching()
    connections = LaunchConnections(KEPT_SECONDS)
    connections.keep(it.instance)
    with it.engines[0].connect() as used:
        connections.close()
        assert it.is_as_before()
        assert used.exec_driver_sql("SELECT 1").scalar_one() == 1
    until(lambda: it.connections() == 0, "the connection is closed")


def test_threads_keep_a_few(open_launching: Callable[..., Launching]) -> None:
    """Which they have used at once; those beyond are closed as they come back."""
    it = open_launching()
    connections = LaunchConnections(KEPT_SECONDS)
    connections.keep(it.instance)
    everybody = threading.Barrier(MAX_CONNECTIONS + 3)

    def use(_: int) -> None:
        with it.engines[0].connect():
            everybody.wait(PATIENCE_SECONDS)

    with ThreadPoolExecutor(everybody.parties) as pool:
        list(pool.map(use, range(everybody.parties)))
    assert len(it.opened) == everybody.parties
    until(lambda: it.connections() == MAX_CONNECTIONS, "the others are closed")
    connections.close()
    until(lambda: it.connections() == 0, "all are closed")


def test_a_server_that_is_restarted_costs_no_launch(
    open_launching: Callable[..., Launching],
) -> None:
    """What it has closed is not used again."""
    it = open_launching()
    for _ in range(3):
        run_id = it.create()
        it.launch(run_id)
        assert it.known(run_id).tags[TASK_ID_TAG]
        execute_sql(
            it.url,
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()",
        )


def test_a_forked_process_has_its_own(open_launching: Callable[..., Launching]) -> None:
    """Its parent's are of no use to it, and stay open for the parent."""
    it = open_launching(database_idle_seconds=KEPT_SECONDS)
    run_id = it.create()
    it.launch(run_id)
    before = len(it.opened)

    def use() -> None:
        assert it.known(run_id).run_id == run_id
        assert len(it.opened) > before
        cast("TaskiqRunLauncher", it.instance.run_launcher)._connections.close()
        assert it.is_as_before()

    with forked(use):
        pass
    assert it.known(run_id).run_id == run_id
    assert len(it.opened) == before


def test_the_end_of_the_launcher_is_theirs(open_launching: Callable[..., Launching]) -> None:
    """It may be used again, and so may they."""
    it = open_launching()
    for _ in range(2):
        it.launch(it.create())
        it.instance.run_launcher.dispose()
        assert it.is_as_before()
        until(lambda: it.connections() == 0, "all are closed")


def test_an_instance_that_keeps_connections_is_left_alone(
    open_launching: Callable[..., Launching],
) -> None:
    """As that of a web server does, which has a timeout for its statements there."""
    it = open_launching()
    it.instance.optimize_for_webserver(statement_timeout=5000, pool_recycle=3600, max_overflow=20)
    engines, pools = it.engines, [engine.pool for engine in it.engines]
    it.launch(it.create())
    assert (it.engines, [engine.pool for engine in it.engines]) == (engines, pools)
    it.instance.run_launcher.dispose()
    assert (it.engines, [engine.pool for engine in it.engines]) == (engines, pools)
    for engine in engines:
        engine.dispose()


@pytest.mark.parametrize(
    "source", [{"database_short_lived_sessions": True}, {"database_idle_seconds": 0}]
)
def test_who_wants_short_sessions_has_them(
    open_launching: Callable[..., Launching], source: dict[str, Any]
) -> None:
    """As where a pooler gives connections out for a transaction each."""
    it = open_launching(**source)
    it.launch(it.create())
    assert it.is_as_before()
    until(lambda: it.connections() == 0, "each is closed")
