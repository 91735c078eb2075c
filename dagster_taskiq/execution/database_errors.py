"""Which errors of Dagster's database pass by themselves: see ``server_refusals``."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy.exc import DBAPIError, OperationalError

from dagster_taskiq.servers.server_refusals import (
    MYSQL_REFUSALS,
    POSTGRESQL_REFUSALS,
    Outlook,
    find_refusal,
)


def is_passing(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, is of a database that is away for a while.

    A lost connection is: it does not tell whether the server has executed the statement.
    """
    return any(_passes(it) for it in _chain(error) if isinstance(it, DBAPIError))


def is_read_only(error: DBAPIError) -> bool:
    """Whether the server refuses to write, as a standby does."""
    return _sqlstate_of(error) == "25006" or _mysql_number(error) in (1290, 1792, 1836)


def words_of(error: BaseException) -> str:
    """What the database said, in one line, without the statement and its values."""
    said = next((it.orig for it in _chain(error) if isinstance(it, DBAPIError)), None)
    return " ".join(str(said or error).split())


def _passes(error: DBAPIError) -> bool:
    if error.connection_invalidated:
        return True
    number, code = _mysql_number(error), _sqlstate_of(error)
    if number is not None:
        refusal = find_refusal(MYSQL_REFUSALS, f"{number} {error.orig}")
    elif code or isinstance(error, OperationalError):
        refusal = find_refusal(POSTGRESQL_REFUSALS, f"{code} {error.orig}")
    else:
        return False  # a mistake of the client's, whatever it says
    return refusal.outlook is Outlook.PASSES


def _sqlstate_of(error: DBAPIError) -> str:
    """PostgreSQL's code of an error; empty where it came without one."""
    found = getattr(error.orig, "pgcode", None) or getattr(error.orig, "sqlstate", None)
    return str(found or "")


def _mysql_number(error: DBAPIError) -> int | None:
    number = getattr(error.orig, "errno", None)
    return number if isinstance(number, int) else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
