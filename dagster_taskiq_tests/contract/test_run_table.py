"""What is written to Dagster's tables in fewer statements is what Dagster would have written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from dagster import DagsterEvent, DagsterInstance, DagsterRun, DagsterRunStatus, RunsFilter
from dagster._core.errors import DagsterRunNotFoundError
from dagster._core.storage.runs import SqlRunStorage
from sqlalchemy import event

from dagster_taskiq._dagster.known_schema import remember_schema
from dagster_taskiq._dagster.names import EngineEventData
from dagster_taskiq._dagster.run_table import add_run_tag, report_engine_event
from dagster_taskiq._dagster.storage import storage_engines
from dagster_taskiq_tests.servers import postgres_database
from dagster_taskiq_tests.unit.loop_jobs import single_job


@dataclass
class Storage:
    """An instance, and the statements that its storages have executed."""

    instance: DagsterInstance
    statements: list[str] = field(default_factory=list)

    def new_run(self) -> DagsterRun:
        run = self.instance.create_run_for_job(single_job, tags={"team": "a"})
        started = DagsterEvent("PIPELINE_STARTING", run.job_name)
        self.instance.report_dagster_event(started, run.run_id)
        return self.known(run)

    def known(self, run: DagsterRun) -> DagsterRun:
        found = self.instance.get_run_by_id(run.run_id)
        assert found is not None
        self.statements.clear()
        return found

    def with_tag(self, key: str, value: str) -> set[str]:
        return {run.run_id for run in self.instance.get_runs(RunsFilter(tags={key: value}))}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DagsterInstance]:
    with postgres_database() as url:
        settings = {"storage": {"postgres": {"postgres_url": url}}, "telemetry": {"enabled": False}}
        directory = tmp_path_factory.mktemp("instance")
        (directory / "dagster.yaml").write_text(yaml.safe_dump(settings))
        with DagsterInstance.from_config(str(directory)) as instance:
            yield instance


@pytest.fixture
def storage(database: DagsterInstance) -> Iterator[Storage]:
    found = Storage(database)

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        found.statements.append(statement)

    with ExitStack() as at_end:
        for it in storage_engines(database):
            event.listen(it.engine, "before_cursor_execute", note)
            at_end.callback(event.remove, it.engine, "before_cursor_execute", note)
        yield found


@pytest.fixture(params=["postgres", "sqlite"])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "postgres":
        yield request.getfixturevalue("storage")
        return
    with DagsterInstance.local_temp(str(tmp_path)) as instance:
        yield Storage(instance)


def test_a_tag_is_one_statement(storage: Storage) -> None:
    """Nothing is read for it, the run has it, and it is found by it."""
    run = storage.new_run()
    add_run_tag(storage.instance, run, "task", "1")
    assert len(storage.statements) == 1
    assert storage.known(run) == run.with_tags({**run.tags, "task": "1"})
    assert storage.with_tag("task", "1") == {run.run_id}


def test_a_tag_that_is_there_is_not_written(storage: Storage) -> None:
    """As of a run that was put off, and is launched again."""
    run = storage.new_run()
    add_run_tag(storage.instance, run, "team", "a")
    assert storage.statements == []


def test_a_tag_is_written_as_dagster_does(either: Storage) -> None:
    """Where the run was changed since it was read, nothing of the change is lost."""
    run = either.new_run()
    either.instance.add_run_tags(run.run_id, {"other": "b"})
    either.instance.report_run_canceling(run)
    add_run_tag(either.instance, run, "task", "2")
    found = either.known(run)
    assert found.status is DagsterRunStatus.CANCELING
    assert found.tags == {**run.tags, "other": "b", "task": "2"}
    assert either.with_tag("task", "2") == {run.run_id}
    add_run_tag(either.instance, found, "task", "3")
    assert either.known(run).tags["task"] == "3"
    assert (either.with_tag("task", "2"), either.with_tag("task", "3")) == (set(), {run.run_id})


def test_a_run_that_was_deleted_has_no_tag(either: Storage) -> None:
    """Dagster's own error says so."""
    run = either.new_run()
    either.instance.delete_run(run.run_id)
    with pytest.raises(DagsterRunNotFoundError):
        add_run_tag(either.instance, run, "task", "4")
    assert either.with_tag("task", "4") == set()


@pytest.mark.parametrize("is_listened_to", [False, True])
def test_an_event_is_as_dagster_writes_it(either: Storage, is_listened_to: bool) -> None:
    """In its place in the log, and for who listens in this process."""
    run = either.new_run()
    heard: list[Any] = []
    if is_listened_to:
        either.instance.add_event_listener(run.run_id, heard.append)
    data = EngineEventData(metadata={"queue": "a"}, marker_start="waits")
    either.instance.report_engine_event("It waits.", run, data)
    report_engine_event(either.instance, run, "It waits.", data)
    theirs, ours = either.instance.all_logs(run.run_id)[-2:]
    assert ours._replace(timestamp=theirs.timestamp) == theirs
    assert len(heard) == 2 * is_listened_to


def test_an_event_is_one_statement(storage: Storage) -> None:
    """And one commit."""
    run = storage.new_run()
    report_engine_event(storage.instance, run, "It waits.", EngineEventData())
    assert len(storage.statements) == 1


def test_a_table_is_asked_once_for_its_columns(
    either: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it has not got them yet: they come with a migration, while this process lives."""
    storage: Any = either.instance.run_storage
    monkeypatch.setattr(storage, "__dict__", dict(vars(storage)))
    vars(storage).pop("has_run_stats_index_cols", None)
    answers, asked = [False, True], []

    def ask(_: object) -> bool:
        asked.append(1)
        return answers.pop(0)

    monkeypatch.setattr(SqlRunStorage, "has_run_stats_index_cols", ask)
    run = either.instance.create_run_for_job(single_job)
    for _ in range(2):
        remember_schema(either.instance)
    for _ in range(4):
        assert either.instance.get_run_record_by_id(run.run_id) is not None
    assert len(asked) == 2
