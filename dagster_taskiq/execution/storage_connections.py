"""Keeping a connection to Dagster's database open in the processes that use it often.

Dagster opens a connection for every statement, which takes longer than the statement. A step writes
a dozen events, and a launch has a dozen statements. Here the storages of an instance share one
engine that keeps one connection, until nobody has used it for a while. A thread that wants another
one at the same time gets it, and it is closed when it comes back.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from dagster import DagsterInstance
from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import NullPool, Pool, QueuePool

from dagster_taskiq._dagster.known_schema import remember_schema
from dagster_taskiq._dagster.storage import has_server, storage_engines
from dagster_taskiq.aio.patched_library import Empty, SimpleQueue, has_real_threads, next_of
from dagster_taskiq.defaults import DATABASE_IDLE_SECONDS

#: How old a connection may be that is used again. Load balancers drop an idle one without a word
#: after a while (Azure's after 240 s, AWS's after 350 s), and the next statement would wait for
#: minutes.
RECYCLE_SECONDS = 180

_keeping: dict[Engine, IdleCloser] = {}
_of_parents: list[Pool] = []


@contextmanager
def kept_connections(
    instance: DagsterInstance, idle_seconds: float = DATABASE_IDLE_SECONDS, count: int = 1
) -> Iterator[None]:
    """Let the storages of the instance that are in one database keep one connection.

    Before each use it is looked at whether the server has closed it, so that a restart costs a new
    connection and no error. Storages without a server, such as SQLite, and those that keep
    connections already stay as they are. Afterwards all is as it was, and a connection that is
    still in use is closed when it comes back. What the table of runs has is known from then on.

    Args:
        instance: whose storages.
        idle_seconds: how long the connection is kept that nobody uses; 0 keeps none.
        count: how many are kept where several threads have used one at once.
    """
    remember_schema(instance)
    engines: dict[Any, Engine] = {}
    before = []
    for storage in storage_engines(instance) if idle_seconds else ():
        engine = storage.engine
        if _opens_each_time(engine):
            before.append((storage, engine))
            storage.engine = engines.setdefault(engine.url, engine)
    pools = [(engine, engine.pool) for engine in engines.values()]
    for engine, pool in pools:
        closer = IdleCloser(idle_seconds, partial(_close_idle, engine))
        engine.pool = _keep(pool, closer, count)
        _keeping[engine] = closer
    try:
        yield
    finally:
        for storage, engine in before:
            storage.engine = engine
        for engine, pool in pools:
            _keeping.pop(engine).end()
            kept, engine.pool = engine.pool, pool
            event.listen(kept, "checkin", _close)
            kept.dispose()


def _opens_each_time(engine: Engine) -> bool:
    return type(engine.pool) is NullPool and has_server(engine)


def _close(connection: Any, record: Any) -> None:
    """Close a connection that comes back to a pool that has ended."""
    del connection
    record.close()


def _close_idle(engine: Engine) -> None:
    engine.pool.dispose()  # leaves alone what is in use


def _keep(pool: Any, closer: IdleCloser, count: int) -> Pool:
    """A pool that connects as the given one does, and listens to the same events."""
    # as its `recreate` does, which cannot change the class
    keeping = QueuePool(
        pool._creator,  # noqa: SLF001
        pool_size=count,
        max_overflow=-1,
        recycle=RECYCLE_SECONDS,
        dialect=pool._dialect,  # noqa: SLF001
        _dispatch=pool.dispatch,
    )
    event.listen(keeping, "checkout", partial(_check, pool._dialect))  # noqa: SLF001
    event.listen(keeping, "checkin", closer.note_use)
    return keeping


class IdleCloser:
    """The thread that closes what has not been used for a time; it begins with the first use.

    Where threads are not real, or no more are to be had, there is none, and nothing is closed.

    Args:
        seconds: that time.
        close: closes what is not in use, in this object's thread.
    """

    def __init__(self, seconds: float, close: Callable[[], None]) -> None:
        self._seconds = seconds
        self._close = close
        self._is_over = False
        self.begin_anew()

    def begin_anew(self) -> None:
        """Know of no use and no thread, as a forked process does."""
        self._used_at = 0.0
        #: Whether the thread will look by itself at what becomes idle.
        self._is_watching = False
        self._words: SimpleQueue[None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        #: Held to start the thread: a second one would take the word that ends the first.
        self._starting = threading.Lock()

    def note_use(self, *_: Any) -> None:
        """Something is idle from now on."""
        self._used_at = time.monotonic()
        if self._is_watching:
            return
        if self._thread is None:
            self._start()
        if self._thread is not None:
            self._words.put(None)

    def _start(self) -> None:
        with self._starting:
            if self._thread is None and has_real_threads():
                thread = threading.Thread(target=self._live, name="idle-closer", daemon=True)
                with suppress(RuntimeError):  # no step fails for want of a thread that tidies up
                    thread.start()
                    self._thread = thread

    def end(self) -> None:
        """End the thread."""
        self._is_over = True
        self._words.put(None)
        if self._thread is not None:
            self._thread.join()

    def _live(self) -> None:
        seconds: float | None = None
        while True:
            with suppress(Empty):
                next_of(self._words, seconds)
            if self._is_over:
                # an interrupt of its start leaves a thread that nobody knows, and a second one
                self._words.put(None)
                return
            seconds = self._close_or_wait()

    def _close_or_wait(self) -> float | None:
        """How long nothing has to be done; None until the next use."""
        # first: whoever uses something after this look says so
        self._is_watching = False
        left = self._used_at + self._seconds - time.monotonic()
        if left > 0:
            self._is_watching = True
            return left
        self._close()
        return None


def _check(dialect: Any, connection: Any, record: Any, proxy: Any) -> None:
    """Have a connection exchanged that the server has closed.

    One that lives has nothing to be read between statements, but for a rare notice. So it is only
    asked when there is something, and always where the driver does not show its socket: to ask
    each time would take as long as a write.
    """
    del record, proxy
    if hasattr(connection, "fileno"):
        poll = select.poll()
        poll.register(connection.fileno())
        # without POLLIN nobody has hung up
        if not any(found & ~select.POLLOUT for _, found in poll.poll(0)):
            return
    try:
        is_alive = dialect.do_ping(connection)
    except Exception:  # whatever the driver raises
        is_alive = False
    if not is_alive:
        raise DisconnectionError


def _forget_after_fork() -> None:
    """Keep a process that a step forks from writing into its parent's connection or closing it."""
    for engine, closer in _keeping.items():
        closer.begin_anew()
        _of_parents.append(engine.pool)
        engine.pool = engine.pool.recreate()


os.register_at_fork(after_in_child=_forget_after_fork)
