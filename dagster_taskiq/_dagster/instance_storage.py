"""Where the instance of a DAGSTER_HOME is, as Dagster reads its dagster.yaml.

``instance_home`` asks it, and only where that file names a storage.
"""

from __future__ import annotations

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
    storage = _event_storage(home)
    # Dagster's own storages are SQLite's; each of those on a server is a package of its own
    return storage is not None and storage.module_name.partition(".")[0] != "dagster"


def postgresql_of(home: Path) -> PostgresqlOfInstance | None:
    """The database of the instance of a DAGSTER_HOME, if that is a PostgreSQL.

    Raises:
        ConfigError: Dagster cannot use its dagster.yaml.
    """
    storage = _event_storage(home)
    if storage is None or storage.module_name.partition(".")[0] != "dagster_postgres":
        return None
    with _unusable_config_as_error(home):
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


def _event_storage(home: Path) -> ConfigurableClassData | None:
    with _unusable_config_as_error(home):
        return InstanceRef.from_dir(str(home)).event_storage_data


@contextmanager
def _unusable_config_as_error(home: Path) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # of any kind; its text may have a password
        raise ConfigError(
            f"Dagster cannot use {home / 'dagster.yaml'} ({type(error).__name__}): run `dagster "
            "instance info` there to see why."
        ) from None
