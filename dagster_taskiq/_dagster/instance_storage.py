"""Where the instance of a DAGSTER_HOME is, as Dagster reads its dagster.yaml.

``instance_home`` asks it, and only where that file names a storage.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from dagster._core.instance import InstanceRef
from dagster._serdes.config_class import ConfigurableClassData
from sqlalchemy.engine import make_url

from dagster_taskiq._dagster.instance_home import PostgresqlOfInstance
from dagster_taskiq._dagster.names import process_schema
from dagster_taskiq.errors import ConfigError
from dagster_taskiq.servers.urls import redact


def has_database_server(home: Path) -> bool:
    """Whether the instance of a DAGSTER_HOME keeps its event log on a server, not in files.

    Raises:
        ConfigError: Dagster cannot use its dagster.yaml.
    """
    storage = event_storage_of(home)
    # Dagster's own storages are SQLite's; each of those on a server is a package of its own
    return storage is not None and storage.module_name.partition(".")[0] != "dagster"


def postgresql_of(home: Path) -> PostgresqlOfInstance | None:
    """The database of the instance of a DAGSTER_HOME, if that is a PostgreSQL.

    Raises:
        ConfigError: Dagster cannot use its dagster.yaml.
    """
    storage = event_storage_of(home)
    if storage is None or storage.module_name.partition(".")[0] != "dagster_postgres":
        return None
    with unusable_config_as_error(home):
        utils: Any = import_module("dagster_postgres.utils")
        kind: Any = getattr(import_module(storage.module_name), storage.class_name)
        config, problems = process_schema(kind.config_type(), storage.config_dict)
        if problems:
            raise ConfigError(f"{home / 'dagster.yaml'}: {redact(' '.join(problems))}")
        # older releases of dagster-postgres know no tokens
        find_provider = getattr(utils, "get_token_provider_from_config", lambda _: None)
        provider = find_provider(config)
        # Dagster reads it with SQLAlchemy, which takes more than a URL may have
        parsed = make_url(utils.pg_url_from_config(config)).set(drivername="postgresql")
        url = parsed.render_as_string(hide_password=False).replace(" ", "%20")
    return PostgresqlOfInstance(url, provider and provider.get_token)


def event_storage_of(home: Path) -> ConfigurableClassData | None:
    """What the dagster.yaml of a DAGSTER_HOME says of its event log.

    Raises:
        ConfigError: Dagster cannot use it.
    """
    ref = instance_ref_of(home)
    with unusable_config_as_error(home):
        return ref.event_storage_data


def instance_ref_of(home: Path) -> InstanceRef:
    """What the dagster.yaml of a DAGSTER_HOME says; Dagster warns once that there is none.

    Raises:
        ConfigError: Dagster cannot use it.
    """
    with unusable_config_as_error(home), _warning_once(home):
        return InstanceRef.from_dir(str(home))


#: The homes of which this process has been told that they have no dagster.yaml.
_TOLD_OF: set[Path] = set()


@contextmanager
def _warning_once(home: Path) -> Iterator[None]:
    """Keep Dagster from warning again that a home has no dagster.yaml."""
    logger = logging.getLogger("dagster")

    def is_news(record: logging.LogRecord) -> bool:
        if not record.getMessage().startswith("No dagster instance configuration file"):
            return True
        is_first = home not in _TOLD_OF
        _TOLD_OF.add(home)
        return is_first

    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)


@contextmanager
def unusable_config_as_error(home: Path) -> Iterator[None]:
    """Say that Dagster cannot use the dagster.yaml of a DAGSTER_HOME, as a ``ConfigError``."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # of any kind; its text may have a password
        raise ConfigError(
            f"Dagster cannot use {home / 'dagster.yaml'} ({type(error).__name__}): run `dagster "
            "instance info` there to see why."
        ) from None
