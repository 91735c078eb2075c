"""How many connections each process has to a PostgreSQL: broker and backend, Dagster's own."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import psutil
import psycopg2
import pytest

from dagster_taskiq_tests.acceptance.harness import Stack, open_stack, until
from dagster_taskiq_tests.acceptance.launched import launch, open_launching_stack
from dagster_taskiq_tests.servers import postgres_database

#: Seen at a look, beside those of the README: an urgent call may have one for a moment.
FOR_A_MOMENT = 1


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    with open_launching_stack("postgres", tmp_path) as stack:
        yield stack


class Counter:
    """Connections by process, by looks at the server."""

    def __init__(self, stack: Stack) -> None:
        assert stack.broker is not None
        self._prefix = stack.prefix
        self._connection = psycopg2.connect(stack.broker.url)
        self._connection.autocommit = True

    def ports(self) -> dict[int, bool]:
        """Of all of the deployment's own; whether each waits to be woken."""
        with self._connection.cursor() as cursor:
            cursor.execute(
                "SELECT client_port, query LIKE 'LISTEN%%' FROM pg_stat_activity "
                "WHERE application_name = %s",
                [self._prefix],
            )
            return dict(cursor.fetchall())

    def of(self, pid: int) -> tuple[int, int]:
        """How many a process has for its calls, and how many to be woken by."""
        seen = self.ports()
        try:
            sockets = psutil.Process(pid).net_connections()
        except psutil.NoSuchProcess:
            return 0, 0
        waits = [seen[it.laddr.port] for it in sockets if it.raddr and it.laddr.port in seen]
        return waits.count(False), waits.count(True)

    def close(self) -> None:
        self._connection.close()


def test_processes_have_few_connections(stack: Stack) -> None:
    """A worker that is idle or busy in all its slots, a run, and a launcher."""
    worker = stack.worker("--run-slots", "1", slots=8).await_ready()
    with closing(Counter(stack)) as counter:
        idle = [counter.of(worker.pid) for _ in range(20)]
        assert {waiting for _, waiting in idle} == {0}
        assert 1 <= max(calls for calls, _ in idle) <= 3

        launched = launch(stack, "in_process_single")
        assert counter.of(os.getpid()) == (1, 0)
        assert launched.wait().is_success

        run = stack.start("dynamic", ops={"spread": {"config": {"count": 24}}})
        of_run, of_worker = [], []

        def has_ended() -> bool:
            of_run.append(counter.of(run.process.pid))
            of_worker.append(counter.of(worker.pid))
            return run.process.poll() is not None

        until(has_ended, "the run has ended")
        assert run.is_success
        assert 1 <= max(calls for calls, _ in of_run) <= 2 + FOR_A_MOMENT
        assert max(waiting for _, waiting in of_run) == 1
        assert sorted(of_run)[len(of_run) // 2][0] <= 2
        assert max(calls for calls, _ in of_worker) <= 4 + FOR_A_MOMENT
        assert sorted(of_worker)[len(of_worker) // 2][0] <= 4
        until(lambda: counter.of(run.process.pid) == (0, 0), "the run leaves none")
        worker.terminate()
        worker.wait()
        assert counter.of(worker.pid) == (0, 0)


def _connected_to(url: str, processes: Iterable[psutil.Process]) -> int:
    """How many connections of these processes a database has."""
    with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute(
            "SELECT client_port FROM pg_stat_activity WHERE datname = current_database()"
        )
        ports = {port for (port,) in cursor.fetchall()}
    sockets = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            sockets += process.net_connections()
    return sum(it.laddr.port in ports for it in sockets)


def test_a_long_step_holds_no_connection_to_dagsters_database(tmp_path: Path) -> None:
    """Nor does its run, nor the idle slot beside it; all connect again when they need it."""
    with postgres_database() as url:
        storage = {"storage": {"postgres": {"postgres_url": url}}}
        with open_stack("redis", tmp_path, dagster_yaml=storage) as stack:
            source = {"key_prefix": stack.prefix, "database_idle_seconds": 0.2}
            settings = stack.settings_file(config_source=source)
            worker = stack.worker(slots=2, settings=settings).await_ready()
            assert stack.run("parallel", config_source=source).is_success
            run = stack.start("one_gated", config_source=source)
            run.await_notes("started")

            def is_unconnected() -> bool:
                processes = [psutil.Process(run.process.pid), *worker.descendants()]
                return not _connected_to(url, processes)

            until(is_unconnected, "nobody is connected")
            run.open_gate()
            assert run.wait().is_success
