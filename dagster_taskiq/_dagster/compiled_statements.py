"""The statements that Dagster executes for every run and step, compiled before the first of them.

SQLAlchemy keeps with an engine what it has made of a statement, which takes a seventh of the CPU
time of a small run. A process that forks those of runs and steps has it made here once: Dagster's
own code is called with a connection that compiles what it gets and sends nothing to the database.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any

from dagster import (
    AssetKey,
    AssetMaterialization,
    DagsterEvent,
    DagsterInstance,
    DagsterRun,
    RunsFilter,
)
from dagster._core.events import DagsterEventType, StepMaterializationData
from dagster._core.events.log import EventLogEntry
from dagster._core.storage.event_log import SqlEventLogStorage
from dagster._core.storage.runs import SqlRunStorage
from sqlalchemy.engine import Engine
from typing_extensions import Self

from dagster_taskiq._dagster.storage import has_server

logger = logging.getLogger(__name__)

#: Stands for everything that has a name, and is in no database.
_NOTHING = "dagster_taskiq"

#: As Dagster tags what it materializes.
_TAGS = {"dagster/code_version": _NOTHING, "dagster/data_version": _NOTHING}


class _NoRows:
    """What a statement that was not executed has brought: no rows, but a key of a new one."""

    rowcount = 0
    inserted_primary_key = (0,)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def mappings(self) -> _NoRows:
        return self

    def first(self) -> None:
        return None

    def all(self) -> list[Any]:
        return []

    def fetchall(self) -> list[Any]:
        return []

    def fetchone(self) -> tuple[str, int]:
        """The run and the key of a new event."""
        return _NOTHING, 0

    def close(self) -> None:
        pass


class _Compiling:
    """Stands for a connection: it compiles statements, as SQLAlchemy's would to execute them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def in_transaction(self) -> bool:
        """So none is begun."""
        return True

    def execute(self, statement: Any, values: Any = None) -> _NoRows:
        rows: Sequence[Any] = values if isinstance(values, list) else [values or {}]
        statement._compile_w_cache(
            self._engine.dialect,
            compiled_cache=self._engine._compiled_cache,
            column_keys=sorted(rows[0]),
            for_executemany=len(rows) > 1,
            schema_translate_map=None,
        )
        return _NoRows()


def compile_statements(instance: DagsterInstance) -> None:
    """Have the engines of an instance know what they will be asked for, where they have a server.

    Does not touch the database. What cannot be compiled so is compiled when it is executed.
    """
    runs, events = instance.run_storage, instance.event_log_storage
    if isinstance(runs, SqlRunStorage) and _has_server(runs):
        _rehearse_run(_twin(runs, "connect"))
    if isinstance(events, SqlEventLogStorage) and _has_server(events):
        _rehearse_events(_twin(events, "_connect", "run_connection", "index_connection"))


def _has_server(storage: Any) -> bool:
    engine = getattr(storage, "_engine", None)
    return isinstance(engine, Engine) and has_server(engine)


def _twin(storage: Any, *openers: str) -> Any:
    """A copy of a storage that uses the connection that compiles, and the same engine.

    What it concludes from rows that it does not get stays with it.

    Args:
        openers: the storage's methods that open a connection.
    """
    twin = copy(storage)
    own = {name: dict(it) for name, it in vars(storage).items() if isinstance(it, dict)}
    connection = _Compiling(storage._engine)
    vars(twin).update(own | dict.fromkeys(openers, lambda *_: connection))
    return twin


def _rehearse_run(storage: Any) -> None:
    """Read a run and its snapshot, begin it and end it."""
    chosen = RunsFilter(run_ids=[_NOTHING])
    _attempt(storage, "get_runs", chosen, limit=1)
    _attempt(storage, "get_run_records", chosen, limit=1)
    _attempt(storage, "get_execution_plan_snapshot", _NOTHING)
    _attempt(storage, "_get_run_by_id", _NOTHING)
    vars(storage)["_get_run_by_id"] = lambda _: DagsterRun(_NOTHING)
    for kind in (DagsterEventType.RUN_START, DagsterEventType.RUN_SUCCESS):
        _attempt(storage, "handle_run_event", _NOTHING, DagsterEvent(kind.value, _NOTHING))


def _rehearse_events(storage: Any) -> None:
    """Read what is known of an asset that a step reads, and write that it was materialized."""
    key = AssetKey(_NOTHING)
    materialization = AssetMaterialization(key, tags=_TAGS)
    event = DagsterEvent(
        DagsterEventType.ASSET_MATERIALIZATION.value,
        _NOTHING,
        step_key=_NOTHING,
        event_specific_data=StepMaterializationData(materialization, []),
    )
    entry = EventLogEntry(
        error_info=None,
        user_message="",
        level=logging.DEBUG,
        run_id=_NOTHING,
        timestamp=0.0,
        job_name=_NOTHING,
        step_key=_NOTHING,
        dagster_event=event,
    )
    _attempt(storage, "get_asset_records", [key])
    _attempt(storage, "fetch_observations", key, limit=1)
    _attempt(storage, "store_event", entry)


def _attempt(storage: Any, name: str, *arguments: Any, **named: Any) -> None:
    try:
        getattr(storage, name)(*arguments, **named)
    except Exception as error:
        # it has found less than it expects, and what it had asked for is compiled
        logger.debug("%s has not come to its end: %r", name, error)
