"""Which errors of Dagster's database pass by themselves, by the server's code."""

from __future__ import annotations

import re
from collections.abc import Iterator

from sqlalchemy.exc import DBAPIError, OperationalError

#: SQLSTATEs of a server that starts, stops, changes over or is out of connections, and of a
#: statement that lost against another one. A full disk is none of them: a server that answers so
#: may do it for days. Those of a lost connection, class 08, come in addition.
_PASSING_SQLSTATES = {
    "25006": "read-only: a standby, after a failover",
    "40001": "serialization failure",
    "40P01": "deadlock",
    "53300": "too many connections",
    "55P03": "lock not available",
    "57P01": "shut down by an administrator",
    "57P02": "shut down after a crash",
    "57P03": "cannot connect now: it starts, stops or recovers",
    "57P05": "idle session timeout",
}

#: The same of MySQL and MariaDB, by their error numbers.
_PASSING_MYSQL_ERRORS = {
    1040: "too many connections",
    1053: "server shutdown in progress",
    1203: "too many connections of this user",
    1205: "lock wait timeout",
    1213: "deadlock",
    1290: "read-only",
    1792: "read-only transaction",
    1836: "read-only mode",
    2002: "cannot connect through the socket",
    2003: "cannot connect",
    2005: "unknown host",
    2006: "server has gone away",
    2013: "lost connection",
    2055: "lost connection",
}

#: What libpq says of a connection that no waiting brings about. It gives no code, and the text is
#: the server's, so in other languages than English such an error is waited for as well.
_FINAL_WORDS = re.compile(
    r"authentication failed|no pg_hba\.conf entry|does not exist|permission denied|"
    r"certificate|does not support SSL|invalid (?:connection option|port)|no password supplied"
)


def is_passing_sqlstate(code: str) -> bool:
    """Whether what PostgreSQL refuses with this code it may well take a little later."""
    return code.startswith("08") or code in _PASSING_SQLSTATES


def is_passing(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, is of a database that is away for a while.

    A lost connection is: it does not tell whether the server has executed the statement.
    """
    return any(_passes(it) for it in _chain(error) if isinstance(it, DBAPIError))


def is_read_only(error: DBAPIError) -> bool:
    """Whether the server refuses to write, as a standby does."""
    return sqlstate_of(error) == "25006" or _mysql_number(error) in (1290, 1792, 1836)


def sqlstate_of(error: DBAPIError) -> str:
    """PostgreSQL's code of an error; empty where it came without one."""
    found = getattr(error.orig, "pgcode", None) or getattr(error.orig, "sqlstate", None)
    return str(found or "")


def words_of(error: BaseException) -> str:
    """What the database said, in one line, without the statement and its values."""
    said = next((it.orig for it in _chain(error) if isinstance(it, DBAPIError)), None)
    return " ".join(str(said or error).split())


def _passes(error: DBAPIError) -> bool:
    if error.connection_invalidated:
        return True
    number = _mysql_number(error)
    if number is not None:
        return number in _PASSING_MYSQL_ERRORS
    code = sqlstate_of(error)
    if code:
        return is_passing_sqlstate(code)
    return isinstance(error, OperationalError) and not _FINAL_WORDS.search(str(error.orig))


def _mysql_number(error: DBAPIError) -> int | None:
    number = getattr(error.orig, "errno", None)
    return number if isinstance(number, int) else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
