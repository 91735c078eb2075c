"""Where the instance of a DAGSTER_HOME is: in files, or in a database of which kind.

What dagster.yaml says of a storage is for Dagster to read. Most homes of a worker with a broker of
its own, and all with the embedded server, name none: there nobody waits for Dagster's import.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import yaml

#: The keys of dagster.yaml that may put the event log elsewhere than into files.
_STORAGE_KEYS = {"storage", "event_log_storage", "instance_class"}


@dataclass(frozen=True)
class PostgresqlOfInstance:
    """The PostgreSQL database of an instance's event log.

    Attributes:
        url: with its password, where it has one.
        fresh_password: makes a token for each new connection, of dagster.yaml's ``auth_provider``.
    """

    url: str
    fresh_password: Callable[[], str] | None


def has_database_server(home: Path) -> bool:
    """Whether the instance of a DAGSTER_HOME keeps its event log on a server, not in files.

    Raises:
        ConfigError: dagster.yaml names a storage, and Dagster cannot use the file.
    """
    return not _names_no_storage(home) and bool(_ask_dagster("has_database_server", home))


def postgresql_of(home: Path) -> PostgresqlOfInstance | None:
    """The database of the instance of a DAGSTER_HOME, if that is a PostgreSQL.

    Raises:
        ConfigError: see ``has_database_server``.
    """
    if _names_no_storage(home):
        return None
    found: PostgresqlOfInstance | None = _ask_dagster("postgresql_of", home)
    return found


def _ask_dagster(function: str, home: Path) -> Any:
    """What Dagster says, which is imported only here."""
    return resolve_name(f"{__package__}.instance_storage:{function}")(home)


def _names_no_storage(home: Path) -> bool:
    """Whether Dagster keeps the instance in files, as it does where nothing else is said."""
    if not home.is_dir():
        return False  # Dagster says what is wrong with it
    try:
        found = yaml.safe_load((home / "dagster.yaml").read_text(encoding="utf8"))
    except FileNotFoundError:
        return True
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False  # and with the file
    return found is None or (isinstance(found, dict) and not _STORAGE_KEYS & set(found))
