"""A short name of the storage of Dagster's instance, by which hosts find that it is the same."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from dagster_taskiq._dagster.instance_storage import (
    event_storage_of,
    postgresql_of,
    unusable_config_as_error,
)
from dagster_taskiq._dagster.names import process_schema
from dagster_taskiq.errors import ConfigError

#: Of a storage in files, which other hosts do not have.
SQLITE = "sqlite"

_DIGEST_CHARACTERS = 12

#: Parts of the settings of a storage that do not say which one it is.
_NO_PART_OF_ITS_NAME = {
    "username",
    "password",
    "params",
    "auth_provider",
    "should_autocreate_tables",
}


def own_fingerprint() -> str:
    """That of the instance which this process finds by DAGSTER_HOME; empty without one.

    Raises:
        ConfigError: Dagster cannot use its dagster.yaml.
    """
    home = os.getenv("DAGSTER_HOME")
    return storage_fingerprint(Path(home).expanduser().resolve()) if home else ""


def storage_fingerprint(home: Path) -> str:
    """The kind of the storage that has the event log, and a digest of where that is.

    Of a database that is its host, port and name, as dagster.yaml spells them, without user and
    password; of files their path. It is read from dagster.yaml, and nothing is connected to.

    Args:
        home: a DAGSTER_HOME.

    Raises:
        ConfigError: Dagster cannot use its dagster.yaml.
    """
    storage = event_storage_of(home)
    if storage is None:
        return ""
    if database := postgresql_of(home):
        return _named("postgresql", _place_of(database.url))
    room = storage.module_name.partition(".")[0]
    with unusable_config_as_error(home):
        kind: Any = getattr(import_module(storage.module_name), storage.class_name)
        config, problems = process_schema(kind.config_type(), storage.config_dict)
        if problems:
            raise ConfigError(f"{home / 'dagster.yaml'}: {' '.join(problems)}")
    if room == "dagster" and "base_dir" in config:
        return _named(SQLITE, str(Path(config["base_dir"]).resolve()))
    return _named(room.removeprefix("dagster_"), _plain(config))


def _named(kind: str, place: Any) -> str:
    digest = hashlib.sha256(json.dumps(place, sort_keys=True, default=str).encode()).hexdigest()
    return f"{kind}:{digest[:_DIGEST_CHARACTERS]}"


def _place_of(url: str) -> list[Any]:
    """Host, port, database and search path of a PostgreSQL's URL."""
    parsed = make_url(url)
    hosts = parsed.host or parsed.query.get("host") or ""
    port = parsed.port or parsed.query.get("port") or 5432
    return [str(hosts).lower(), str(port), parsed.database, parsed.query.get("options", "")]


def _plain(value: Any) -> Any:
    """The settings of a storage without those that do not say which one it is."""
    if isinstance(value, Mapping):
        return {key: _plain(it) for key, it in value.items() if key not in _NO_PART_OF_ITS_NAME}
    if isinstance(value, str) and "://" in value:
        try:
            parsed = make_url(value)
        except ArgumentError:
            return ""  # what is in it may be secret
        return [parsed.host, parsed.port, parsed.database]
    return value
