"""Dagster's table of runs, where it is in PostgreSQL: the same in fewer statements."""

from __future__ import annotations

import logging
from typing import Any

from dagster import DagsterEvent, DagsterInstance, DagsterRun
from dagster._core.events import DagsterEventType, EngineEventData
from dagster._core.events.log import EventLogEntry
from dagster._core.storage.runs import SqlRunStorage
from dagster._core.storage.runs.schema import RunsTable, RunTagsTable
from dagster._serdes import serialize_value
from dagster._time import get_current_datetime, get_current_timestamp
from sqlalchemy import Insert, Text, bindparam, insert, select, update
from sqlalchemy.engine import Engine

from dagster_taskiq._dagster.storage import sql_event_log


def _adding_a_tag() -> Insert:
    columns = RunsTable.c
    changed = (
        update(RunsTable)
        .where(columns.run_id == bindparam("of_run"), columns.run_body == bindparam("body_before"))
        .values(run_body=bindparam("body_after"), update_timestamp=bindparam("changed_at"))
        .returning(columns.run_id)
        .cte("changed")
    )
    tag = select(
        changed.c.run_id, bindparam("tag_key", type_=Text), bindparam("tag_value", type_=Text)
    )
    names = [RunTagsTable.c.run_id, RunTagsTable.c.key, RunTagsTable.c.value]
    return insert(RunTagsTable).from_select(names, tag)


#: Adds a tag to a run that is as it was read. Made once, as that takes longer than to execute it.
_ADD_TAG = _adding_a_tag()


def add_run_tag(instance: DagsterInstance, run: DagsterRun, key: str, value: str) -> None:
    """Add a tag to a run, as ``DagsterInstance.add_run_tags`` does.

    Dagster reads the run, and writes it and its tag in two statements. Here one statement writes
    both where the run is still as it was read; otherwise it is Dagster's turn.

    Args:
        run: as it was read, lately.

    Raises:
        DagsterRunNotFoundError: the run has been deleted.
    """
    if run.tags.get(key) == value:
        return
    if key in run.tags or not _add_to_unchanged(instance, run, key, value):
        instance.add_run_tags(run.run_id, {key: value})


def _add_to_unchanged(instance: DagsterInstance, run: DagsterRun, key: str, value: str) -> bool:
    """Add a tag to a run that nobody has changed since it was read; whether that was so."""
    storage: Any = instance.run_storage
    if not isinstance(storage, SqlRunStorage) or not _is_dagsters_own(storage):
        return False
    values = {
        "of_run": run.run_id,
        "body_before": serialize_value(run),
        "body_after": serialize_value(run.with_tags({**run.tags, key: value})),
        "changed_at": get_current_datetime(),
        "tag_key": key,
        "tag_value": value,
    }
    with storage.connect() as connection:
        return connection.execute(_ADD_TAG, values).rowcount == 1


def _is_dagsters_own(storage: SqlRunStorage) -> bool:
    """Whether tags are kept in Dagster's tables, in a PostgreSQL."""
    engine = getattr(storage, "_engine", None)
    is_postgresql = isinstance(engine, Engine) and engine.dialect.name == "postgresql"
    return is_postgresql and type(storage).add_run_tags is SqlRunStorage.add_run_tags


def report_engine_event(
    instance: DagsterInstance, run: DagsterRun, message: str, data: EngineEventData
) -> None:
    """Write an event of a run, as ``DagsterInstance.report_engine_event`` does.

    In PostgreSQL Dagster notifies a channel of each event, for its former releases only. It is a
    commit of its own, under a lock of the whole cluster, and left out here.
    """
    event = DagsterEvent(
        DagsterEventType.ENGINE_EVENT.value,
        run.job_name,
        message=message,
        event_specific_data=data,
    )
    entry = EventLogEntry(
        error_info=None,
        user_message="",
        level=logging.INFO,
        run_id=run.run_id,
        timestamp=get_current_timestamp(),
        job_name=run.job_name,
        dagster_event=event,
    )
    log = sql_event_log(instance)
    # somebody in this process may have asked to be told of the run's events
    if log is None or instance._subscribers.get(run.run_id):
        instance.handle_new_event(entry)
    else:
        log.store_rows([log.row_of(entry)])
