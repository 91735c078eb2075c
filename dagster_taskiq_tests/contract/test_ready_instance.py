"""What a process makes ready that forks others: a run finds it there, and nothing is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from dagster import (
    AssetKey,
    DagsterInstance,
    DagsterRun,
    DagsterRunStatus,
    Definitions,
    asset,
    define_asset_job,
    in_process_executor,
)
from dagster._check import CheckError
from dagster._core.definitions.job_base import InMemoryJob
from dagster._core.execution.api import execute_run_iterator
from dagster._core.storage.event_log.migration import ASSET_KEY_INDEX_COLS
from sqlalchemy import event
from sqlalchemy.sql.compiler import SQLCompiler

from dagster_taskiq._dagster.compiled_statements import compile_statements
from dagster_taskiq._dagster.ready_instance import make_ready
from dagster_taskiq._dagster.storage import storage_engines
from dagster_taskiq.execution.event_batches import batched_events
from dagster_taskiq.execution.storage_connections import kept_connections
from dagster_taskiq.execution.storage_patience import DatabasePatience
from dagster_taskiq_tests.servers import postgres_database

#: What SQLAlchemy keeps of no statement: its values are part of it.
_NEVER_KEPT = "INSERT INTO asset_keys"


@asset
def before() -> int:
    return 1


@asset
def after(before: int) -> int:
    return before + 1


DEFINITIONS = Definitions(
    assets=[before, after],
    jobs=[define_asset_job("both"), define_asset_job("second", [AssetKey("after")])],
    executor=in_process_executor,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with postgres_database() as url:
        directory = tmp_path_factory.mktemp("instance")
        settings = {"storage": {"postgres": {"postgres_url": url}}, "telemetry": {"enabled": False}}
        (directory / "dagster.yaml").write_text(yaml.safe_dump(settings))
        yield directory


@pytest.fixture
def instance(home: Path) -> Iterator[DagsterInstance]:
    """A new one, with nothing known."""
    with DagsterInstance.from_config(str(home)) as instance, kept_connections(instance):
        yield instance


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The statements that were compiled."""
    texts: list[str] = []
    compile_one = SQLCompiler.__init__

    def note(self: Any, *arguments: Any, **options: Any) -> None:
        compile_one(self, *arguments, **options)
        texts.append(" ".join(str(self).split()))

    monkeypatch.setattr(SQLCompiler, "__init__", note)
    return texts


def executed(instance: DagsterInstance) -> list[str]:
    """The statements that are sent from now on."""
    texts: list[str] = []

    def note(*arguments: Any) -> None:
        texts.append(arguments[2])

    for engine in {storage.engine for storage in storage_engines(instance)}:
        event.listen(engine, "before_cursor_execute", note)
    return texts


def create(instance: DagsterInstance, name: str) -> DagsterRun:
    job = DEFINITIONS.resolve_job_def(name)
    return instance.create_run_for_job(job, status=DagsterRunStatus.STARTING)


def execute(instance: DagsterInstance, run: DagsterRun) -> None:
    job = InMemoryJob(DEFINITIONS.resolve_job_def(run.job_name))
    with batched_events(instance, DatabasePatience(1)):
        for _ in execute_run_iterator(job, run, instance):
            pass
    found = instance.get_run_by_id(run.run_id)
    assert found is not None
    assert found.status is DagsterRunStatus.SUCCESS


def test_a_run_finds_its_statements_compiled_and_its_tables_known(
    instance: DagsterInstance, home: Path, compiled: list[str]
) -> None:
    execute(instance, create(instance, "both"))  # for the other run's step to find what it reads
    run = create(instance, "second")
    with DagsterInstance.from_config(str(home)) as other, kept_connections(other):
        make_ready(other)
        compiled.clear()
        sent = executed(other)
        execute(other, run)
    written = [text for text in sent if text.startswith(("INSERT INTO event_logs", "UPDATE runs"))]
    assert len(written) > 2
    assert [text for text in compiled if not text.startswith(_NEVER_KEPT)] == []
    assert [text for text in sent if "pg_catalog" in text] == []


def test_nothing_is_written(instance: DagsterInstance) -> None:
    sent = executed(instance)
    make_ready(instance)
    assert sent
    assert {text.split()[0] for text in sent} == {"SELECT"}


def test_nothing_is_concluded_from_rows_that_were_not_read(home: Path) -> None:
    """Dagster keeps an answer that it was not given, too."""
    with DagsterInstance.from_config(str(home)) as instance:
        compile_statements(instance)
        storage: Any = instance.event_log_storage
        assert storage.has_secondary_index(ASSET_KEY_INDEX_COLS)


def test_what_is_not_dagsters_own_is_opened_by_those_who_need_it(tmp_path: Path) -> None:
    """It may begin threads or connect, and then nothing could be forked."""
    parts = {"compute_logs": "compute_log_manager", "run_coordinator": "run_coordinator"}
    for setting, part in parts.items():
        home = tmp_path / setting
        home.mkdir()
        foreign = {"module": "not_installed_here", "class": "Foreign"}
        (home / "dagster.yaml").write_text(yaml.safe_dump({setting: foreign}))
        with DagsterInstance.from_config(str(home)) as instance:
            make_ready(instance)
            opened = {it for it in parts.values() if getattr(instance, f"_{it}") is not None}
            assert opened == {*parts.values()} - {part}
            with pytest.raises(CheckError, match="not_installed_here"):
                getattr(instance, part)
