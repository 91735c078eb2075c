"""Which errors of a database are waited for, and which are not."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy.exc import DataError, DBAPIError, OperationalError, ProgrammingError

from dagster_taskiq.execution.database_errors import is_passing, words_of


class ServerSaysError(Exception):
    """As a driver raises it."""

    def __init__(self, text: str, **attributes: Any) -> None:
        super().__init__(text)
        vars(self).update(attributes)


def _error(
    text: str,
    kind: type[DBAPIError] = OperationalError,
    *,
    is_lost: bool = False,
    **attributes: Any,
) -> DBAPIError:
    return kind("INSERT INTO event_logs", {"event": "secret"}, ServerSaysError(text, **attributes),
                connection_invalidated=is_lost)  # fmt: skip


@pytest.mark.parametrize("code", ["08006", "08001", "57P01", "57P03", "53300", "40001", "25006"])
def test_codes_that_pass(code: str) -> None:
    """A server that is away, full of connections, or a standby."""
    assert is_passing(_error("a text", pgcode=code))
    assert is_passing(_error("a text", sqlstate=code))


@pytest.mark.parametrize("code", ["53100", "42P01", "22001", "28P01", "3D000", "57014"])
def test_codes_that_are_final(code: str) -> None:
    """A disk that is full, what does not exist or fit, a password, a statement's timeout."""
    assert not is_passing(_error("a text", pgcode=code))


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("connection to server at 127.0.0.1 failed: Connection refused", True),
        ("FATAL:  the database system is starting up", True),
        ("FATAL:  sorry, too many clients already", True),
        ("could not translate host name", True),
        ("timeout expired", True),
        ('FATAL:  password authentication failed for user "me"', False),
        ('FATAL:  database "it" does not exist', False),
    ],
)
def test_connections_that_fail_without_a_code(text: str, passes: bool) -> None:
    """PostgreSQL's client library gives none."""
    assert is_passing(_error(text)) is passes


@pytest.mark.parametrize(("number", "passes"), [(1040, True), (2003, True), (1153, False)])
def test_numbers_of_mysql(number: int, passes: bool) -> None:
    """Its codes are numbers, and its SQLSTATEs say nothing."""
    assert is_passing(_error("a text", errno=number, sqlstate="HY000")) is passes


def test_a_lost_connection_passes() -> None:
    """Whatever the driver calls it."""
    assert is_passing(_error("a text", ProgrammingError, is_lost=True))


def test_errors_of_a_client_are_final() -> None:
    """Only what concerns the server may pass."""
    assert not is_passing(_error("cannot adapt", DataError))
    assert not is_passing(ValueError("a text"))


def test_an_error_is_found_behind_another() -> None:
    """Dagster raises its own from the database's; people get the database's words, no values."""
    found = RuntimeError("too many retries")
    found.__cause__ = _error("it\n starts up", pgcode="57P03")
    assert is_passing(found)
    assert words_of(found) == "it starts up"
    assert words_of(ValueError("a text")) == "a text"
