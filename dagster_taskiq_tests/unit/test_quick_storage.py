"""The shortcuts of the tests' instances lead to the same databases."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from dagster import DagsterInstance
from dagster._core.storage.event_log.sqlite.sqlite_event_log import SqliteEventLogStorage
from dagster._core.storage.sql import create_engine
from sqlalchemy.pool import NullPool

from dagster_taskiq_tests import quick_storage


def _content(path: Path) -> list[object]:
    """All that a database has, and how it keeps it."""
    with closing(sqlite3.connect(path)) as connection:
        schema = connection.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()
        revision = connection.execute("SELECT version_num FROM alembic_version").fetchall()
        journal = connection.execute("PRAGMA journal_mode").fetchone()
    assert schema
    assert revision
    return [schema, revision, journal]


def test_the_log_of_a_run_is_as_dagster_makes_it(tmp_path: Path) -> None:
    """It has the tables, indexes and revision of one that is no copy; no other file is left."""
    made = tmp_path / "made.db"
    quick_storage._make_log(None, create_engine(f"sqlite:///{made}", poolclass=NullPool))
    with DagsterInstance.from_config(str(_home(tmp_path))) as instance:
        storage = instance.event_log_storage
        assert isinstance(storage, SqliteEventLogStorage)
        with storage.run_connection("one"):
            pass
        path = Path(storage.path_for_shard("one"))
    assert _content(path) == _content(made)
    assert sorted(file.name for file in path.parent.glob("*.db*")) == ["index.db", "one.db"]


def test_a_log_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    """Another process finds in it what the first has written, and its migrations are up to date."""
    home = _home(tmp_path)
    for number in range(2):
        with DagsterInstance.from_config(str(home)) as instance:
            storage = instance.event_log_storage
            assert isinstance(storage, SqliteEventLogStorage)
            with storage.run_connection("one") as connection:
                found = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
                assert found == 7 * number
                connection.exec_driver_sql("PRAGMA user_version = 7")


def _home(directory: Path) -> Path:
    home = directory / "home"
    home.mkdir()
    return home
