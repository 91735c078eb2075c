"""Events get into a log once each, in their order, whatever the log takes and loses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import pytest
from sqlalchemy.exc import OperationalError

from dagster_taskiq._dagster.storage import SqlEventLog
from dagster_taskiq.errors import DatabaseAwayError, EventsNotWrittenError
from dagster_taskiq.execution.event_batches import EventWriter
from dagster_taskiq.execution.event_storing import EventStore, Row
from dagster_taskiq.execution.storage_patience import DatabasePatience


class ServerSaysError(Exception):
    """As a driver raises it."""

    def __init__(self, text: str, code: str = "") -> None:
        super().__init__(text)
        self.pgcode = code


def lost() -> OperationalError:
    return OperationalError(
        "INSERT", {}, ServerSaysError("server closed the connection"), connection_invalidated=True
    )


def refused(text: str, code: str) -> OperationalError:
    return OperationalError("INSERT", {}, ServerSaysError(text, code))


class FakeLog:
    """A log that takes statements up to a size, and none with certain events.

    Attributes:
        events: that it has.
        statements: how many events each statement had.
        losses: connections that the next statements lose, and whether they have been executed.
        hangs_up: whether it answers a statement that is too large by closing the connection.
    """

    def __init__(self, limit: int = 10_000, refused: str = "") -> None:
        self._limit = limit
        self._refused = refused
        self.events: list[str] = []
        self.statements: list[int] = []
        self.losses: list[bool] = []
        self.hangs_up = False

    def store_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        texts = [row["event"] for row in rows]
        self.statements.append(len(texts))
        if sum(map(len, texts)) > self._limit:
            raise (
                lost() if self.hangs_up else OperationalError("", {}, ServerSaysError("x", "54000"))
            )
        if self._refused and self._refused in texts:
            raise refused("No space left\n on device", "53100")
        if self.losses:
            if self.losses.pop(0):
                self.events += texts
            raise lost()
        self.events += texts

    def has_row(self, row: Mapping[str, Any]) -> bool:
        return row["event"] in self.events


def store_of(log: FakeLog, patience_seconds: float = 20.0) -> EventStore:
    return EventStore(cast("SqlEventLog", log), DatabasePatience(patience_seconds))


def row(text: str, *, is_required: bool = True, kind: str = "STEP_OUTPUT") -> Row:
    values = {"event": text, "dagster_event_type": kind, "step_key": "a_step"}
    return Row(values, is_required=is_required)


ROWS = [row(text) for text in "abc"]


def test_what_is_too_much_together_is_written_one_by_one() -> None:
    """In the order of the events."""
    log = FakeLog(limit=2)
    store_of(log).store_rows(ROWS)
    assert log.events == ["a", "b", "c"]
    assert log.statements == [3, 1, 1, 1]


def test_a_server_that_hangs_up_on_what_is_too_much_is_not_away() -> None:
    """MySQL may: what it takes alone is written, and what not is an error, soon."""
    log = FakeLog(limit=2)
    log.hangs_up = True
    store_of(log).store_rows(ROWS)
    assert log.events == ["a", "b", "c"]
    with pytest.raises(EventsNotWrittenError, match=r"STEP_OUTPUT of step 'a_step' \(3 bytes\)"):
        store_of(log).store_rows([row("d"), row("eee"), row("f")])
    assert log.events == ["a", "b", "c", "d"]


def test_what_follows_a_refused_event_is_not_written() -> None:
    """As Dagster would not have come to it."""
    log = FakeLog(refused="b")
    with pytest.raises(EventsNotWrittenError, match="No space left on device"):
        store_of(log).store_rows(ROWS)
    assert log.events == ["a"]


def test_a_refused_log_line_is_no_error() -> None:
    """As in Dagster."""
    log = FakeLog(refused="b")
    store_of(log).store_rows([row("a"), row("b", is_required=False), row("c")])
    assert log.events == ["a", "c"]


@pytest.mark.parametrize("was_executed", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_a_lost_connection_loses_and_doubles_nothing(was_executed: bool, count: int) -> None:
    """Whether the server had executed the statement or not."""
    log = FakeLog()
    log.losses = [was_executed]
    store_of(log).store_rows(ROWS[:count])
    assert log.events == ["a", "b", "c"][:count]


def test_a_statement_that_loses_each_connection_is_given_up() -> None:
    """Though the server takes connections all the time."""
    log = FakeLog()
    log.losses = [False] * 100
    with pytest.raises(EventsNotWrittenError, match="server closed the connection"):
        store_of(log).store_rows(ROWS[:1])
    assert len(log.statements) < 10


def test_a_server_that_is_away_is_waited_for_in_vain() -> None:
    """The error says for how long; the next events do not wait as long again."""

    class AwayLog(FakeLog):
        def store_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
            self.statements.append(len(rows))
            raise refused("it starts up", "57P03")

    log = AwayLog()
    store = store_of(log, patience_seconds=0.3)
    with pytest.raises(DatabaseAwayError, match=r"0\.3 s were over: it starts up"):
        store.store_rows(ROWS)
    tries = len(log.statements)
    assert tries > 2
    with pytest.raises(DatabaseAwayError):
        store.store_rows(ROWS[:1])
    assert len(log.statements) == tries + 1


def test_statements_are_bounded_in_rows_and_bytes() -> None:
    """A large event goes alone."""
    log = FakeLog(limit=2**30)
    writer = EventWriter(store_of(log))
    texts = [f"{number}" for number in range(600)] + ["x" * 2**21] + ["y" * 2**19] * 3
    for text in texts:
        writer._rows.append(row(text))
    writer._write()
    assert log.events == texts
    assert log.statements == [500, 100, 1, 2, 1]
