"""What the tables of Dagster's storages have, asked of the database once and not before each use.

Dagster asks before each reading of a run which columns the table of runs has, on a connection of
its own and in three statements, and several times more for each event of an asset.
"""

from __future__ import annotations

from typing import Any

from dagster import DagsterInstance
from dagster._core.storage.event_log import SqlEventLogStorage
from dagster._core.storage.event_log.migration import ASSET_KEY_INDEX_COLS
from dagster._core.storage.event_log.schema import AssetEventTagsTable
from dagster._core.storage.runs import SqlRunStorage

#: The methods of storages that ask, with what they are asked for where a run executes assets.
_QUESTIONS: dict[type, dict[str, list[tuple[str, ...]]]] = {
    SqlRunStorage: {"has_run_stats_index_cols": [()]},
    SqlEventLogStorage: {
        "has_asset_key_col": [("last_materialization_timestamp",), ("cached_status_data",)],
        "has_secondary_index": [(ASSET_KEY_INDEX_COLS,)],
        "has_table": [(AssetEventTagsTable.name,)],
    },
}


def _questions(instance: DagsterInstance) -> list[tuple[Any, str, list[tuple[str, ...]]]]:
    """Storages of an instance, a method of each, and what it is asked for."""
    return [
        (storage, name, asked_for)
        for storage in (instance.run_storage, instance.event_log_storage)
        for kind, questions in _QUESTIONS.items()
        if isinstance(storage, kind)
        for name, asked_for in questions.items()
        if hasattr(storage, name)
    ]


def remember_schema(instance: DagsterInstance) -> None:
    """Let the storages of an instance ask their database only once what its tables have.

    A column or a table that is there stays; one that is not may come with a migration, so it is
    asked for again.
    """
    for storage, name, _ in _questions(instance):
        if name not in vars(storage):
            _remember(storage, name)


def _remember(storage: Any, name: str) -> None:
    ask = getattr(storage, name)
    known: set[tuple[str, ...]] = set()

    def has(*asked_for: str) -> bool:
        if asked_for not in known and ask(*asked_for):
            known.add(asked_for)
        return asked_for in known

    vars(storage)[name] = has


def know_schema(instance: DagsterInstance) -> None:
    """Ask that now, so that no process which is forked from this one has to."""
    remember_schema(instance)
    for storage, name, all_asked_for in _questions(instance):
        for asked_for in all_asked_for:
            getattr(storage, name)(*asked_for)
