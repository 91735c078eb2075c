"""Dagster's migrations, which tests do not read again and again."""

from __future__ import annotations

from alembic.config import Config
from alembic.script import ScriptDirectory

_read_from_disk = ScriptDirectory.from_config
_kept: dict[str | None, ScriptDirectory] = {}


def read_once() -> None:
    """Let this process, and what is forked from it, read Dagster's migrations only once.

    Alembic loads all of them, some ninety modules, for each database of which Dagster asks whether
    it is up to date: four in each process that executes steps. That is a fifth of what such a
    process of the tests does.
    """
    setattr(ScriptDirectory, "from_config", _from_config)  # noqa: B010 - mypy knows a classmethod


def read_now(config: Config) -> None:
    """Read those that a storage names, after ``read_once``, so that forks find them read."""
    _from_config(config).get_current_head()


def _from_config(config: Config) -> ScriptDirectory:
    location = config.get_main_option("script_location")
    if location not in _kept:
        _kept[location] = _read_from_disk(config)
    return _kept[location]
