"""Keeping a connection to Dagster's database open in the processes that execute steps and runs.

Dagster opens a connection for every statement, which takes longer than the statement, and a step
writes a dozen events. Here the storages of an instance share one engine that keeps one connection.
A thread that wants another one at the same time gets it, and it is closed when it comes back.
"""

from __future__ import annotations

import os
import select
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from dagster import DagsterInstance
from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import NullPool, Pool, QueuePool

from dagster_taskiq._dagster.run_table import remember_columns
from dagster_taskiq._dagster.storage import has_server, storage_engines

#: How old a connection may be that is used again. Load balancers drop an idle one without a word
#: after a while (Azure's after 240 s, AWS's after 350 s), and the next statement would wait for
#: minutes.
RECYCLE_SECONDS = 180

_keeping: weakref.WeakSet[Engine] = weakref.WeakSet()
_of_parents: list[Pool] = []


@contextmanager
def kept_connections(instance: DagsterInstance, count: int = 1) -> Iterator[None]:
    """Let the storages of the instance that are in one database keep one connection.

    Before each use it is looked at whether the server has closed it, so that a restart costs a new
    connection and no error. Storages without a server, such as SQLite, and those that keep
    connections already stay as they are. Afterwards all is as it was, and a connection that is
    still in use is closed when it comes back. What the table of runs has is known from then on.

    Args:
        count: how many are kept where several threads have used one at once.
    """
    remember_columns(instance)
    engines: dict[Any, Engine] = {}
    before = []
    for storage in storage_engines(instance):
        engine = storage.engine
        if _opens_each_time(engine):
            before.append((storage, engine))
            storage.engine = engines.setdefault(engine.url, engine)
    pools = [(engine, engine.pool) for engine in engines.values()]
    for engine, pool in pools:
        engine.pool = _keep(pool, count)
        _keeping.add(engine)
    try:
        yield
    finally:
        for storage, engine in before:
            storage.engine = engine
        for engine, pool in pools:
            _keeping.discard(engine)
            kept, engine.pool = engine.pool, pool
            event.listen(kept, "checkin", _close)
            kept.dispose()


def can_keep_connections(instance: DagsterInstance) -> bool:
    """Whether a storage of the instance opens a connection to a server for each statement."""
    return any(_opens_each_time(storage.engine) for storage in storage_engines(instance))


def _opens_each_time(engine: Engine) -> bool:
    return type(engine.pool) is NullPool and has_server(engine)


def _close(connection: Any, record: Any) -> None:
    """Close a connection that comes back to a pool that has ended."""
    del connection
    record.close()


def _keep(pool: Any, count: int) -> Pool:
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
    return keeping


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
    for engine in _keeping:
        _of_parents.append(engine.pool)
        engine.pool = engine.pool.recreate()


os.register_at_fork(after_in_child=_forget_after_fork)
