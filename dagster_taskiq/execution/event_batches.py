"""Writing the events of a step or a run to Dagster's database several at a time.

Dagster writes each event by itself and waits for it, which takes most of the time of a short step.
Here the events in which Dagster speaks of its own doing go to a thread. It writes those that have
come together in one statement, in their order, within `DELAY_SECONDS`. An event of the user's code
(a log line above DEBUG, a materialization) is written at once, after those before it.

No reader finds a log that is behind: a caller that connects to the database through the instance
first waits until everything is written.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TypeVar

from dagster import DagsterInstance
from sqlalchemy.engine import Connection, Engine

from dagster_taskiq._dagster.names import DagsterEventType, EventLogEntry
from dagster_taskiq._dagster.storage import sql_event_log, storage_engines
from dagster_taskiq.aio.patched_library import (
    Empty,
    SimpleQueue,
    get_ident,
    has_real_threads,
    next_of,
)
from dagster_taskiq.errors import EventsNotWrittenError
from dagster_taskiq.execution.event_storing import EventStore, Row
from dagster_taskiq.execution.storage_patience import DatabasePatience

T = TypeVar("T")

logger = logging.getLogger(__name__)

#: How long an event may wait for others. It is what a process that is killed may not have
#: written yet, far below what somebody who looks at the run notices.
DELAY_SECONDS = 0.02

#: How many events are written in one statement: with seven columns they are far from the 65,535
#: values for which PostgreSQL's protocol has room.
_ROWS = 500

#: How large they may be together; a larger one is written alone. Escaped it is twice as much at
#: most, and MySQL takes statements of 4 MiB and more (``max_allowed_packet``) unless it is told
#: otherwise.
_STATEMENT_BYTES = 2**20

#: The kinds that may wait. All others are written by Dagster itself, some of them into more than
#: one table; so are log lines, which have no kind, unless they are for debugging: each IO manager
#: writes one for each value.
MAY_WAIT = frozenset(
    {
        DagsterEventType.ENGINE_EVENT,
        DagsterEventType.HANDLED_OUTPUT,
        DagsterEventType.HOOK_COMPLETED,
        DagsterEventType.HOOK_SKIPPED,
        DagsterEventType.LOADED_INPUT,
        DagsterEventType.LOGS_CAPTURED,
        DagsterEventType.RESOURCE_INIT_STARTED,
        DagsterEventType.RESOURCE_INIT_SUCCESS,
        DagsterEventType.STEP_FAILURE,
        DagsterEventType.STEP_INPUT,
        DagsterEventType.STEP_OUTPUT,
        DagsterEventType.STEP_RESTARTED,
        DagsterEventType.STEP_SKIPPED,
        DagsterEventType.STEP_START,
        DagsterEventType.STEP_SUCCESS,
        DagsterEventType.STEP_UP_FOR_RETRY,
    }
)

#: Those after which nothing is worth waiting for.
ENDS = frozenset(
    {
        DagsterEventType.STEP_FAILURE,
        DagsterEventType.STEP_SUCCESS,
        DagsterEventType.STEP_UP_FOR_RETRY,
    }
)

_writers: weakref.WeakSet[EventWriter] = weakref.WeakSet()


@contextmanager
def batched_events(instance: DagsterInstance, patience: DatabasePatience) -> Iterator[EventWriter]:
    """Write the events of this instance in batches.

    An instance whose log is not in a database with a server, such as SQLite's files, is left as it
    is. The engines of its storages must not be exchanged meanwhile.

    Args:
        instance: whose events.
        patience: with its database.

    Yields:
        the writer, to be flushed where events must be in the log.

    Raises:
        EventsNotWrittenError: they could not be written; also from ``flush``, and from Dagster
            where it reports the next event of a kind that may wait.
    """
    log = sql_event_log(instance)
    if log is None:
        yield EventWriter()
        return
    writer = EventWriter(EventStore(log, patience))
    engines = {id(it.engine): it.engine for it in storage_engines(instance)}
    with ExitStack() as stack:
        stack.callback(writer.close)
        stack.enter_context(log.store_replaced_by(writer.store))
        for engine in engines.values():
            stack.enter_context(_calling_first(writer.wait_until_written, engine))
        yield writer
        writer.flush()


@contextmanager
def _calling_first(do: Callable[[], None], engine: Engine) -> Iterator[None]:
    """Do something before each connection of the engine is opened or taken from its pool."""
    attributes = vars(engine)
    before = attributes.get("connect")
    connect = engine.connect

    def do_and_connect() -> Connection:
        do()
        return connect()

    attributes["connect"] = do_and_connect
    try:
        yield
    finally:
        if before is None:
            del attributes["connect"]
        else:
            attributes["connect"] = before


class EventWriter:
    """Events that wait, and the thread that writes them.

    Only the thread writes, since the one that reports events may be interrupted by a signal at any
    point, and nobody could say then what had been written. For the same reason they share nothing
    but queues, whose operations are one instruction.

    Args:
        events: where to; None where nothing is batched, and ``store`` never called.
    """

    def __init__(self, events: EventStore | None = None) -> None:
        self._events = events
        self.begin_anew()
        _writers.add(self)

    def begin_anew(self) -> None:
        """Start with nothing, as a forked process does: what waits is for its parent to write."""
        self._rows: deque[Row] = deque()
        self._arrivals: SimpleQueue[None] = SimpleQueue()
        self._urgent: SimpleQueue[_Written] = SimpleQueue()
        self._is_writing = False
        self._is_closed = False
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        self._writer = 0

    def store(self, event: EventLogEntry) -> None:
        """Take an event, or have Dagster write it at once if it must not wait."""
        assert self._events is not None
        if self._is_closed or not _may_wait(event):
            self._store_now(event)
            return
        self._raise_error()
        if self._thread is None and not has_real_threads():
            self._store_now(event)
            return
        if self._thread is None:  # first, so that no event waits for a thread that is not there
            self._thread = threading.Thread(target=self._live, name="event-writer", daemon=True)
            self._thread.start()
        # made here, where time is, and not when somebody waits for the last one
        self._rows.append(self._events.row_of(event))
        self._arrivals.put(None)
        if event.dagster_event and event.dagster_event.event_type in ENDS:
            self.begin_writing()

    def _store_now(self, event: EventLogEntry) -> None:
        assert self._events is not None
        if event.step_key is not None and event.dagster_event is not None:
            self.wait_until_written()
            self._raise_error()
        self._events.store_event(event)

    def begin_writing(self) -> None:
        """Write what waits now, beside what the caller does until it calls ``flush``."""
        if self._rows:
            self._urgent.put(_Written())
            self._arrivals.put(None)

    def flush(self) -> None:
        """Return when everything is written.

        Raises:
            EventsNotWrittenError: something was not, now or since the last call.
        """
        self.wait_until_written()
        try:
            self._raise_error()
        finally:
            self._error = None

    def wait_until_written(self) -> None:
        """Return when everything is written or could not be."""
        is_writer = get_ident() == self._writer  # it connects in order to write
        if not is_writer and (self._rows or self._is_writing):
            written = _Written()
            self._urgent.put(written)
            self._arrivals.put(None)
            written.wait()

    def close(self) -> None:
        """Write what waits and end the thread."""
        if self._thread is not None:
            self._is_closed = True
            self._arrivals.put(None)
            self._thread.join()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise EventsNotWrittenError(str(self._error)) from self._error

    def _live(self) -> None:
        self._writer = get_ident()
        while not self._is_closed:
            self._arrivals.get()
            waiting = [] if self._is_closed else _take(self._urgent, DELAY_SECONDS)
            # in this order: what is not among the rows any more is being written, what arrives
            # from now on is announced anew, and who waits has put its rows there before
            self._is_writing = True
            _take_all(self._arrivals)
            waiting += _take_all(self._urgent)
            self._write()
            self._is_writing = False
            for written in waiting:
                written.say()

    def _write(self) -> None:
        while self._rows and self._events is not None:
            rows = self._next_rows()
            if self._error is not None:
                continue  # Dagster would not have come to what follows a refused event
            try:
                self._events.store_rows(rows)
            except Exception as error:  # whatever the driver raises
                logger.error("Events are not in Dagster's log: %s", error)
                self._error = error

    def _next_rows(self) -> list[Row]:
        rows = [self._rows.popleft()]
        size_bytes = rows[0].size_bytes
        while self._rows and len(rows) < _ROWS:
            size_bytes += self._rows[0].size_bytes
            if size_bytes > _STATEMENT_BYTES:
                break
            rows.append(self._rows.popleft())
        return rows


def _may_wait(event: EventLogEntry) -> bool:
    if event.dagster_event is None:
        return int(event.level) <= logging.DEBUG
    return event.dagster_event.event_type in MAY_WAIT


class _Written:
    """Says once to one thread that what it waits for is done."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[None] = SimpleQueue()

    def say(self) -> None:
        self._queue.put(None)

    def wait(self) -> None:
        self._queue.get()


def _take(queue: SimpleQueue[T], seconds: float) -> list[T]:
    """The next item, if one comes in time."""
    try:
        return [next_of(queue, seconds)]
    except Empty:
        return []


def _take_all(queue: SimpleQueue[T]) -> list[T]:
    items = []
    with suppress(Empty):
        while True:
            items.append(queue.get_nowait())
    return items


def _begin_after_fork() -> None:
    for writer in _writers:
        writer.begin_anew()


os.register_at_fork(after_in_child=_begin_after_fork)
