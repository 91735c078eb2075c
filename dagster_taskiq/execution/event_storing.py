"""Getting events into Dagster's log, each of them once, whatever becomes of the database meanwhile.

A statement whose connection is lost has been executed or not, so the log is asked before it is
tried again. A batch that the log refuses as a whole is tried event by event.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy.exc import DBAPIError

from dagster_taskiq._dagster.names import EventLogEntry
from dagster_taskiq._dagster.storage import SqlEventLog
from dagster_taskiq.errors import DatabaseAwayError, EventsNotWrittenError
from dagster_taskiq.execution.database_errors import is_passing, words_of
from dagster_taskiq.execution.storage_patience import STATEMENT_TRIES, DatabasePatience

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """An event as the log's table has it.

    Attributes:
        values: by column.
        is_required: whether it is an event of Dagster's own, without which what the log says is
            wrong. As in Dagster, a log line that is refused is no error.
    """

    values: Mapping[str, Any]
    is_required: bool

    @property
    def size_bytes(self) -> int:
        """Of the event, which is nearly all of the row; it is in ASCII."""
        return len(self.values["event"])

    def __str__(self) -> str:
        kind = self.values["dagster_event_type"] or "a log line"
        step = f" of step {self.values['step_key']!r}" if self.values["step_key"] else ""
        return f"{kind}{step} ({self.size_bytes} bytes)"


class EventStore:
    """Writes to the event log of an instance.

    Args:
        log: where to.
        patience: with its database.
    """

    def __init__(self, log: SqlEventLog, patience: DatabasePatience) -> None:
        self._log = log
        self._patience = patience

    def row_of(self, event: EventLogEntry) -> Row:
        """The row of an event that concerns no other table."""
        return Row(self._log.row_of(event), is_required=event.dagster_event is not None)

    def store_event(self, event: EventLogEntry) -> None:
        """Have Dagster write an event, to other tables too if it is about an asset.

        Raises:
            EventsNotWrittenError: it is not known whether all tables have it.
            Exception: whatever Dagster and the driver raise.
        """

        def is_stored() -> bool:
            if not self._log.has_row(self._log.row_of(event)):
                return False
            if event.dagster_event is not None and event.dagster_event.asset_key is not None:
                raise EventsNotWrittenError(
                    "The connection to Dagster's database was lost while it wrote "
                    f"{event.dagster_event.event_type_value} of asset "
                    f"{event.dagster_event.asset_key.to_user_string()}. The event is in the log; "
                    "whether the asset's own record is up to date is not known."
                )
            return True

        self._store_once(partial(self._log.store_event, event), is_stored)

    def store_rows(self, rows: Sequence[Row]) -> None:
        """Write rows in their order, up to the first one that is refused and required.

        Raises:
            EventsNotWrittenError: that one, and those behind it, are not in the log.
            DatabaseAwayError: it did not come back; how far it got is for nobody to say.
        """
        if len(rows) > 1 and self._store_together(rows):
            return
        for row in rows:
            store = partial(self._log.store_rows, [row.values])
            try:
                self._store_once(store, partial(self._has, row))
            except DatabaseAwayError:
                raise
            except Exception as error:  # whatever the driver raises
                sentence = f"Dagster's log did not take {row}: {words_of(error)}"
                if row.is_required:
                    # not from it: it repeats the event's text
                    raise EventsNotWrittenError(sentence) from None
                logger.error("%s", sentence)

    def _store_together(self, rows: Sequence[Row]) -> bool:
        """Write rows in one statement, all or none; whether they are known to be in the log."""
        try:
            self._log.store_rows([row.values for row in rows])
        except DatabaseAwayError:
            raise
        except Exception as error:  # whatever the driver raises
            logger.warning(
                "Dagster's log did not take %d events at once: %s. They are written one by one.",
                len(rows),
                words_of(error),
            )
            return is_passing(error) and self._has(rows[-1])
        return True

    def _has(self, row: Row) -> bool:
        return self._log.has_row(row.values)

    def _store_once(self, store: Callable[[], None], is_stored: Callable[[], bool]) -> None:
        """Try until it is stored, while the database may take it a little later."""
        losses = 0

        def attempt() -> None:
            nonlocal losses
            try:
                store()
            except DBAPIError as error:
                losses += error.connection_invalidated
                if not is_passing(error) or not is_stored():
                    raise

        self._patience.keep_trying(
            attempt, lambda error: is_passing(error) and losses < STATEMENT_TRIES
        )
