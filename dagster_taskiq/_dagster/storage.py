"""Dagster's instance: its database, its event log, and whether a worker finds it by itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

from dagster import DagsterInstance
from dagster._core.events import DagsterEventType
from dagster._core.events.log import EventLogEntry
from dagster._core.storage.event_log import SqlEventLogStorage, SqlEventLogStorageTable
from dagster._serdes import deserialize_value
from sqlalchemy import select
from sqlalchemy.engine import Engine

#: What Dagster imports when an instance with its usual storages is first opened, in a fifth of a
#: second; those on PostgreSQL and MySQL share nearly all of it.
STORAGE_MODULES = ("dagster._core.storage.sqlite_storage", "alembic.command", "sqlalchemy")

#: What Dagster imports with the first run of a process, in a hundredth of a second.
RUN_MODULES = (
    "dagster._core.executor.in_process",
    "dagster._core.storage.local_compute_log_manager",
    "dagster._core.system_config.composite_descent",
)


class StorageEngine:
    """The SQLAlchemy engine of one of an instance's storages, which may be exchanged."""

    def __init__(self, storage: Any) -> None:
        self._storage = storage

    @property
    def engine(self) -> Engine:
        """The present one."""
        engine: Engine = self._storage._engine
        return engine

    @engine.setter
    def engine(self, engine: Engine) -> None:
        self._storage._engine = engine


def storage_engines(instance: DagsterInstance) -> list[StorageEngine]:
    """The engines of the storages that keep one."""
    storages = (instance.run_storage, instance.event_log_storage, instance.schedule_storage)
    having = [it for it in storages if isinstance(getattr(it, "_engine", None), Engine)]
    return [StorageEngine(storage) for storage in having]


def has_server(engine: Engine) -> bool:
    """Whether its database is one with a server, unlike SQLite's files."""
    return engine.dialect.name != "sqlite"


class SqlEventLog:
    """The event log of an instance, in a database with a server."""

    def __init__(self, storage: Any) -> None:
        self._storage = storage
        #: Dagster's own, which writes one event, to other tables too if it is about an asset.
        self.store_event: Callable[[EventLogEntry], None] = storage.store_event
        self._columns: tuple[str, ...] = ()
        self._insert = ""

    def row_of(self, event: EventLogEntry) -> Mapping[str, Any]:
        """What the log's table has of an event."""
        row: Mapping[str, Any] = self._storage._event_to_row(event)
        return row

    def store_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows of events that concern no other table in one statement.

        Unlike ``store_event`` it does not notify PostgreSQL's channel of each, which Dagster does
        for its former releases only.
        """
        columns = tuple(rows[0])
        if columns != self._columns:
            self._insert = insert_of(self._storage._engine, columns)
            self._columns = columns
        row_marks = f"({', '.join(['%s'] * len(columns))})"
        statement = self._insert + ", ".join([row_marks] * len(rows))
        values = tuple(chain.from_iterable(map(itemgetter(*columns), rows)))
        with self._storage.index_connection() as connection:
            # what SQLAlchemy makes of an insert takes longer than psycopg2 takes for all of it
            connection.exec_driver_sql(statement, values)

    def has_row(self, row: Mapping[str, Any]) -> bool:
        """Whether the log has this row, which no other one is equal to: it has the time in it."""
        columns = SqlEventLogStorageTable.c
        same = (columns.run_id == row["run_id"], columns.event == row["event"])
        with self._storage.index_connection() as connection:
            found = connection.execute(select(columns.id).where(*same).limit(1))
            return found.first() is not None

    @contextmanager
    def store_replaced_by(self, store: Callable[[EventLogEntry], None]) -> Iterator[None]:
        """Let the instance give its events to somebody else."""
        before = vars(self._storage).get("store_event")
        self._storage.store_event = store
        try:
            yield
        finally:
            if before is None:
                del self._storage.store_event
            else:
                self._storage.store_event = before


def insert_of(engine: Engine, columns: Sequence[str]) -> str:
    """The beginning of a statement that writes rows of these columns into the log's table."""
    quote = engine.dialect.identifier_preparer
    names = ", ".join(quote.format_column(SqlEventLogStorageTable.c[it]) for it in columns)
    table = quote.format_table(SqlEventLogStorageTable)
    return f"INSERT INTO {table} ({names}) VALUES "  # noqa: S608 - all of it is the schema's


def sql_event_log(instance: DagsterInstance) -> SqlEventLog | None:
    """The instance's event log, if it is in a database with a server.

    Its driver must take ``%s`` for a value, as those of PostgreSQL and MySQL do.
    """
    storage: Any = instance.event_log_storage
    if not isinstance(storage, SqlEventLogStorage) or not hasattr(storage, "_event_to_row"):
        return None
    engine = getattr(storage, "_engine", None)
    if not isinstance(engine, Engine) or not has_server(engine):
        return None
    return SqlEventLog(storage) if engine.dialect.paramstyle in ("format", "pyformat") else None


def is_own_instance(instance: DagsterInstance) -> bool:
    """Whether a worker with a DAGSTER_HOME of its own finds this instance there.

    A packed reference carries the literal passwords of dagster.yaml, so it is sent only where the
    instance is another one than DAGSTER_HOME's: that of a test, for example.
    """
    home = os.getenv("DAGSTER_HOME")
    if not home or not instance.is_persistent:
        return False
    return Path(instance.root_directory).resolve() == Path(home).expanduser().resolve()


#: The events that bound the attempts of a step, and those of the workers that begin with them.
_ATTEMPT_EVENTS = {
    DagsterEventType.ENGINE_EVENT,
    DagsterEventType.STEP_START,
    DagsterEventType.STEP_RESTARTED,
    DagsterEventType.STEP_SUCCESS,
    DagsterEventType.STEP_FAILURE,
    DagsterEventType.STEP_UP_FOR_RETRY,
}


def read_step_log(
    instance: DagsterInstance, run_id: str, step_key: str, *, with_outputs: bool = False
) -> list[EventLogEntry]:
    """What the log says of when a step's attempts have begun and ended, in its order.

    Dagster can read the events of one step only as their sums (``get_run_step_stats``), which do
    not tell one attempt from another; and the events of a run, of which there may be thousands.

    Args:
        with_outputs: whether the outputs are read too, of which a dynamic step may have thousands.
    """
    kinds = _ATTEMPT_EVENTS | ({DagsterEventType.STEP_OUTPUT} if with_outputs else set())
    storage: Any = instance.event_log_storage
    if not isinstance(storage, SqlEventLogStorage):
        entries = instance.all_logs(run_id, of_type=kinds)
        return [entry for entry in entries if entry.step_key == step_key]
    columns = SqlEventLogStorageTable.c
    query = (
        select(columns.event)
        .where(columns.run_id == run_id, columns.step_key == step_key)
        .where(columns.dagster_event_type.in_([kind.value for kind in kinds]))
        .order_by(columns.id)
    )
    with storage.run_connection(run_id) as connection:
        texts = connection.execute(query).scalars().all()
    return [deserialize_value(text, EventLogEntry) for text in texts]
