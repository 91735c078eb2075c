"""One connection to Dagster's database is kept, and nothing notices but the clock."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from dagster import DagsterInstance, DagsterRun
from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.pool import NullPool

from dagster_taskiq._dagster import EngineEventData, storage_engines
from dagster_taskiq.storage_connections import kept_connections
from dagster_taskiq_tests.server_nodes import execute_sql
from dagster_taskiq_tests.servers import postgres_database
from dagster_taskiq_tests.unit.loop_jobs import single_job


@dataclass
class Storage:
    """An instance in PostgreSQL.

    Attributes:
        connects: one entry for each connection that was opened.
    """

    url: str
    instance: DagsterInstance
    run: DagsterRun
    connects: list[Any]

    def write(self, message: str) -> None:
        self.instance.report_engine_event(message, self.run, EngineEventData())

    def messages(self) -> list[str]:
        logs = self.instance.all_logs(self.run.run_id)
        return [str(it.dagster_event and it.dagster_event.message) for it in logs]

    @property
    def engines(self) -> list[Engine]:
        return [it.engine for it in storage_engines(self.instance)]


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    with postgres_database() as url:
        settings = {"storage": {"postgres": {"postgres_url": url}}, "telemetry": {"enabled": False}}
        (tmp_path / "dagster.yaml").write_text(yaml.safe_dump(settings))
        with DagsterInstance.from_config(str(tmp_path)) as instance:
            run = instance.create_run_for_job(single_job)
            found = Storage(url, instance, run, [])
            for engine in found.engines:
                event.listen(engine, "connect", lambda *_: found.connects.append(1))
            yield found


def test_one_connection_serves_all_storages(storage: Storage) -> None:
    """Events, runs and their reading share it."""
    with kept_connections(storage.instance):
        for number in range(5):
            storage.write(f"event {number}")
        assert storage.instance.get_run_by_id(storage.run.run_id) is not None
        assert storage.messages() == [f"event {number}" for number in range(5)]
        assert len(storage.connects) == 1


def test_it_is_closed_and_all_is_as_before(storage: Storage) -> None:
    """Also where two keep it, one within the other."""
    before = storage.engines
    with kept_connections(storage.instance):
        with kept_connections(storage.instance):
            storage.write("inner")
        storage.write("outer")
        assert len(storage.connects) == 1
    assert storage.engines == before
    assert all(type(engine.pool) is NullPool for engine in storage.engines)
    storage.write("after")
    assert len(storage.connects) == 2


def test_a_server_that_has_closed_it_costs_no_event(storage: Storage) -> None:
    """As one does that is restarted."""
    with kept_connections(storage.instance):
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
    with kept_connections(storage.instance):
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
    with kept_connections(storage.instance):
        storage.write("before")
        pid = os.fork()
        if pid == 0:
            try:
                storage.write("child")
                os._exit(0)
            finally:
                os._exit(1)
        for number in range(20):
            storage.write(f"parent {number}")
        assert os.waitpid(pid, 0)[1] == 0
        storage.write("after")
        messages = storage.messages()
        assert messages.count("child") == 1
        assert [it for it in messages if it != "child"] == [
            "before",
            *(f"parent {number}" for number in range(20)),
            "after",
        ]
        assert len(storage.connects) == 1


def test_storage_without_a_server(tmp_path: Path) -> None:
    """SQLite is left alone."""
    with DagsterInstance.local_temp(str(tmp_path)) as instance:
        run = instance.create_run_for_job(single_job)
        engines = [it.engine for it in storage_engines(instance)]
        with kept_connections(instance):
            instance.report_engine_event("an event", run, EngineEventData())
            assert [it.engine for it in storage_engines(instance)] == engines
        assert len(instance.all_logs(run.run_id)) == 1
