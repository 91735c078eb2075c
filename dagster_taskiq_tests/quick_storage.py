"""What Dagster's storage does again and again where thousands of small databases are opened.

Nothing of it is another database in the end: its tables, its revision and its rows are the same.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
import uuid
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from alembic.config import Config
from alembic.script import ScriptDirectory
from dagster._core.storage.event_log.sqlite import sqlite_event_log
from dagster._core.storage.event_log.sqlite.sqlite_event_log import SqliteEventLogStorage
from dagster._core.storage.runs.sqlite import sqlite_run_storage
from dagster._core.storage.schedules.sqlite import sqlite_schedule_storage
from dagster._core.storage.sql import create_engine, get_alembic_config
from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.pool import NullPool, Pool

_read_migrations = ScriptDirectory.from_config
_migrations: dict[str | None, ScriptDirectory] = {}

_make_log: Any = SqliteEventLogStorage._initdb


def make_quick() -> None:
    """Let this process, and what is forked from it, do once what each database would cost.

    - Alembic loads Dagster's ninety migrations whenever a storage asks whether its database is up
      to date, which every instance does four times. Here it loads them once.
    - The log of each run is a database of its own. To make its tables takes a fortieth of a second;
      here it begins as a copy of an empty one.
    - Dagster makes an engine for each use of a database, and with it SQLAlchemy compiles each
      statement anew. Here it makes one for each database, which keeps no connection either.
    - Each commit waits for the disk, which is for when the machine crashes, as no test has it do.
    """
    setattr(ScriptDirectory, "from_config", _from_config)  # noqa: B010 - mypy knows a classmethod
    setattr(SqliteEventLogStorage, "_initdb", _make_log_of_copy)  # noqa: B010
    for module in (sqlite_event_log, sqlite_run_storage, sqlite_schedule_storage):
        setattr(module, "create_engine", _engine_of)  # noqa: B010
    event.listen(Engine, "connect", _let_commits_wait_for_nothing)


def prepare() -> None:
    """Do it all now, so that forks of this process find it done."""
    _from_config(get_alembic_config(sqlite_event_log.__file__)).get_current_head()
    _empty_log()


def _from_config(config: Config) -> ScriptDirectory:
    location = config.get_main_option("script_location")
    if location not in _migrations:
        _migrations[location] = _read_migrations(config)
    return _migrations[location]


def _make_log_of_copy(
    storage: SqliteEventLogStorage, engine: Engine, for_index_shard: bool = False
) -> None:
    path = Path(engine.url.database or "")
    if not for_index_shard and not path.exists():
        copy = path.with_name(f"{path.name}-{uuid.uuid4().hex}")
        copy.write_bytes(_empty_log())
        try:
            os.link(copy, path)
        except FileExistsError:
            pass  # another process has been faster
        finally:
            copy.unlink()
    _make_log(storage, engine, for_index_shard)  # which looks whether there is all


def _engine_of(url: str, *, poolclass: type[Pool], **options: Mapping[str, Any]) -> Engine:
    assert poolclass is NullPool
    return _new_engine(url, tuple((key, tuple(it.items())) for key, it in options.items()))


@lru_cache(maxsize=256)
def _new_engine(url: str, options: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]) -> Engine:
    return create_engine(url, poolclass=NullPool, **{key: dict(it) for key, it in options})


@cache
def _empty_log() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "empty.db"
        _make_log(None, create_engine(f"sqlite:///{path}", poolclass=NullPool))
        return path.read_bytes()


def _let_commits_wait_for_nothing(connection: object, _record: object) -> None:
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous = OFF")
