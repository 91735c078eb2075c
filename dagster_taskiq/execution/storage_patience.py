"""Waiting for Dagster's database while it is away.

A database that is restarted, fails over or has no connection left is back in seconds to minutes. A
step, or a run, that needs it meanwhile waits, and whatever was only read is read again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

from dagster import DagsterInstance
from sqlalchemy.engine import Connection
from sqlalchemy.engine.cursor import FullyBufferedCursorFetchStrategy
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql.expression import SelectBase

from dagster_taskiq._dagster.patches import is_interrupt_captured
from dagster_taskiq._dagster.storage import has_server, storage_engines
from dagster_taskiq.errors import DatabaseAwayError
from dagster_taskiq.execution.database_errors import is_passing, is_read_only, words_of

T = TypeVar("T")

logger = logging.getLogger(__name__)

#: Pause before the next try: the first one, and the longest.
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 2.0

#: How soon an interrupt is noticed.
_LOOK_SECONDS = 0.1

#: How often a statement is tried that loses its connection to a server which takes connections.
#: MySQL hangs up on a statement that is too large for it, for example.
STATEMENT_TRIES = 3


class DatabasePatience:
    """How long one waits for the database of an instance, from its first failure on.

    Args:
        seconds: 0 does not wait.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.begin_anew()

    def begin_anew(self) -> None:
        """Have patience again after it has run out, for another step."""
        self._is_away = False
        #: What has ended the patience; empty as long as there is some.
        self._ended_by = ""

    def keep_trying(
        self, do: Callable[[], T], may_pass: Callable[[Exception], bool] = is_passing
    ) -> T:
        """Do something that needs the database, again and again until it is done.

        Once patience has run out, each further call tries only once, until one succeeds.

        Args:
            do: may be called several times.
            may_pass: whether to try again after this error.

        Raises:
            DatabaseAwayError: the time is over, or this process was told to stop.
        """
        deadline: float | None = None
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                done = do()
            except DatabaseAwayError:
                raise  # somebody within has waited
            except Exception as error:
                if not self.seconds or not may_pass(error):
                    raise
                deadline = deadline or time.monotonic() + (0 if self._ended_by else self.seconds)
                self._pause(pause, deadline, error)
                pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)
            else:
                if self._is_away:
                    logger.warning("Dagster's database is back.")
                self.begin_anew()
                return done

    def _pause(self, seconds: float, deadline: float, error: Exception) -> None:
        if not self._is_away:
            self._is_away = True
            logger.warning(
                "Dagster's database is away: %s Waiting for it, up to %g s.",
                _sentence(error),
                self.seconds,
            )
        end = min(time.monotonic() + seconds, deadline)
        while time.monotonic() < end and not is_interrupt_captured():
            time.sleep(_LOOK_SECONDS)
        if is_interrupt_captured():
            self._ended_by = "this process was told to stop"
        elif time.monotonic() >= deadline:
            self._ended_by = self._ended_by or f"{self.seconds:g} s were over"
        else:
            return
        raise DatabaseAwayError(
            "Dagster's database is away; it was waited for until "
            f"{self._ended_by}: {_sentence(error)}"
        ) from error


def _sentence(error: Exception) -> str:
    words = words_of(error)
    return words if words.endswith((".", "?", "!")) else f"{words}."


@contextmanager
def patient_connections(instance: DagsterInstance, patience: DatabasePatience) -> Iterator[None]:
    """Let whatever connects to the instance's database wait for it, and read again.

    Storages without a server, such as SQLite, are left as they are, and so are those that wait
    already.
    """
    engines = {id(it.engine): it.engine for it in storage_engines(instance) if patience.seconds}
    ours = [it for it in engines.values() if has_server(it) and "_connection_cls" not in vars(it)]
    for engine in ours:
        vars(engine)["_connection_cls"] = partial(PatientConnection, patience)
    try:
        yield
    finally:
        for engine in ours:
            del vars(engine)["_connection_cls"]


class PatientConnection(Connection):
    """A connection that is waited for, and on which what is only read is read again."""

    def __init__(self, patience: DatabasePatience, *arguments: Any, **options: Any) -> None:
        self._patience = patience
        #: Whether the present transaction began by itself, and has done nothing but read.
        self._has_only_read = False
        patience.keep_trying(partial(super().__init__, *arguments, **options))

    def execute(self, statement: Any, *arguments: Any, **options: Any) -> Any:
        """See SQLAlchemy.

        A SELECT that loses its connection is executed on another one, unless something is lost
        with the connection that came before it in the same transaction.
        """
        is_first = not self.in_transaction()
        is_repeatable = _only_reads(statement) and (is_first or self._has_only_read)
        for is_last in (*(False,) * (STATEMENT_TRIES - 1), True):
            try:
                done = super().execute(statement, *arguments, **options)
            except DBAPIError as error:
                self._leave_read_only(error)
                if is_last or not is_repeatable or not is_passing(error):
                    raise
                logger.warning("Reading again from Dagster's database: %s", words_of(error))
            else:
                self._has_only_read = is_repeatable
                if is_repeatable and done.cursor is not None:
                    # all of its rows: they must survive that a later statement is repeated
                    done.cursor_strategy = FullyBufferedCursorFetchStrategy(done.cursor)
                return done
            with suppress(DBAPIError):  # it is that of the connection that is lost
                self.rollback()
            self._patience.keep_trying(lambda: self.connection)
        raise AssertionError

    def exec_driver_sql(self, statement: str, *arguments: Any, **options: Any) -> Any:
        """See SQLAlchemy; nothing is known of such a statement, so it is executed once."""
        self._has_only_read = False
        try:
            return super().exec_driver_sql(statement, *arguments, **options)
        except DBAPIError as error:
            self._leave_read_only(error)
            raise

    def _leave_read_only(self, error: DBAPIError) -> None:
        if is_read_only(error):
            self.invalidate()  # another connection may lead to another server

    def begin(self) -> Any:
        """See SQLAlchemy, which calls it, too; who asks for a transaction gets no other one."""
        self._has_only_read = False
        return super().begin()


def _only_reads(statement: Any) -> bool:
    is_locking = getattr(statement, "_for_update_arg", None) is not None
    return isinstance(statement, SelectBase) and not is_locking
