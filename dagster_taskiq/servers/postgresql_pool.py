"""The connections of a process to one PostgreSQL, which broker and backend share.

Each event loop has one pool for each server and way to reach it. A connection is for one call at a
time, and few calls are under way at once: a call takes about a millisecond, and each connection is
a process of the server, whose ``max_connections`` is 100 as it comes.

A server that says nothing is given up by closing the connection: psycopg's own way to cancel a call
asks the server, and waits for its answer.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakSet, WeakValueDictionary

import psycopg
from psycopg import conninfo

from dagster_taskiq.errors import RefusedByServerError, UnreachableServerError

Connection = psycopg.AsyncConnection[Any]

T = TypeVar("T")

#: How many calls are under way at the same time. Each listener adds one, since it always looks:
#: so looks, which are slow where much has passed through a queue, leave the others their turn.
_CALLS_AT_ONCE = 2

#: How long a call waits for the end of another one before it takes a connection that is there. An
#: idle worker's looks take less, so that it comes down to two again after a busy time.
_SHORT_SECONDS = 0.002

#: How long it waits then before there is one more, as long as it takes to open one. An urgent one
#: is first in line, and waits for longer before it goes past the limit.
_PATIENCE_SECONDS = 0.01
_URGENT_PATIENCE_SECONDS = 0.05

#: A connection that nobody has used for this time is closed.
_IDLE_SECONDS = 60.0

#: A connection that is older is closed after its call, so that what a new one does is done now and
#: then by every process: it enters the schema, and takes a fresh password.
_OLDEST_SECONDS = 3600.0

#: SQLSTATEs after which another connection may do better: the server became a standby, or our
#: schema is gone, which a new connection makes again.
OTHER_CONNECTION = ("25006", "0A000", "3F000", "42P01", "42883")


@dataclass(frozen=True)
class Target:
    """A server and the way to reach it; equal ones share their connections.

    Attributes:
        conninfo: as libpq reads it, with the password.
        connect_timeout_seconds: after which a server that does not answer is unreachable.
        fresh_password: see ``ServerOptions``.
        address: for errors.
    """

    conninfo: str
    connect_timeout_seconds: float
    fresh_password: Callable[[], str] | None
    address: str = field(compare=False)

    def silent(self, missing: str) -> UnreachableServerError:
        """The error of a server that says nothing."""
        text = (
            f"Cannot reach {self.address}: no {missing} within {self.connect_timeout_seconds:g} s."
        )
        return UnreachableServerError(self.address, text)


@dataclass(eq=False)
class Link:
    """A connection of a pool; times are the event loop's.

    Attributes:
        life: of the pool, in which it was made.
        used_at: when its last call ended.
        is_new: whether it was made for its present call.
        greeted: the users of the pool who have greeted it.
    """

    connection: Connection
    life: int
    opened_at: float
    used_at: float = 0.0
    is_new: bool = True
    greeted: WeakSet[Any] = field(default_factory=WeakSet)


class Pool:
    """Connections for one call at a time, of one event loop.

    Calls wait in line for one, the urgent ones in front. Who has waited for a moment gets one more
    connection, up to a limit, which does not hold for urgent calls.

    Attributes:
        users: who uses it now; without users it keeps no connection.
        listeners: those of them who look for messages all the time.
    """

    def __init__(self, target: Target) -> None:
        self.users: WeakSet[Any] = WeakSet()
        self.listeners: WeakSet[Any] = WeakSet()
        self._target = target
        self._loop = asyncio.get_running_loop()
        #: Those that are not in use, the last used last: it is used first, so that those that are
        #: not needed are the first to be closed.
        self._idle: list[Link] = []
        #: How many there are: idle, in use, and about to be made.
        self._count = 0
        #: Who waits for a connection, or for None, which stands for the place of a new one.
        self._line: deque[asyncio.Future[Link | None]] = deque()
        #: It ends with a lost connection: older ones have no further call.
        self._life = 0
        self._reaper: asyncio.TimerHandle | None = None

    def join(self, user: object, *, is_listener: bool) -> None:
        """Use it; whoever has none any more needs not leave."""
        self.users.add(user)
        if is_listener:
            self.listeners.add(user)

    def leave(self, user: object) -> None:
        """Use it no more; calls that are under way go on, their connections close behind them."""
        self.users.discard(user)
        self.listeners.discard(user)
        if not self.users:
            self._close_idle()

    @asynccontextmanager
    async def link(self, *, is_urgent: bool) -> AsyncIterator[Link]:
        """A connection for one call, whose errors say whether it can have another one.

        Args:
            is_urgent: whether it goes before others, and past the limit.

        Raises:
            UnreachableServerError: a new one was not there in time.
            psycopg.Error, OSError: there is none.
        """
        link = await self._take(is_urgent)
        try:
            yield link
        except BaseException as error:
            if _spares_connection(error) and not link.connection.closed:
                self._give_back(link)
            else:
                if not isinstance(error, asyncio.CancelledError) and link.life == self._life:
                    self._life += 1
                    self._close_idle()
                self._close(link)
            raise
        self._give_back(link)

    # --- a call's turn ---

    @property
    def _most_calls(self) -> int:
        """At the same time, apart from urgent ones."""
        return _CALLS_AT_ONCE + len(self.listeners)

    async def _take(self, is_urgent: bool) -> Link:
        link: Link | None = None
        if self._idle and self._count - len(self._idle) < _CALLS_AT_ONCE:
            link = self._idle.pop()
        elif self._count:
            link = await self._wait(is_urgent)
        else:
            self._count = 1
        if link is not None:
            link.is_new = False
            return link
        life = self._life
        try:
            return Link(await self.connect(), life, self._loop.time())
        except BaseException:
            self._pass_on(None)
            raise

    async def _wait(self, is_urgent: bool) -> Link | None:
        turn: asyncio.Future[Link | None] = self._loop.create_future()
        if is_urgent:
            self._line.appendleft(turn)
        else:
            self._line.append(turn)
        self._loop.call_later(_SHORT_SECONDS, self._take_idle, turn, is_urgent)
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._pass_on(turn.result())
            raise

    def _take_idle(self, turn: asyncio.Future[Link | None], is_urgent: bool) -> None:
        """Give who has waited for a moment what is there, or let it wait for one more."""
        if turn.done():
            return
        if self._idle:
            turn.set_result(self._idle.pop())
            return
        # not before this: an event loop that was held up hears of answers only after its timers
        seconds = _URGENT_PATIENCE_SECONDS if is_urgent else _PATIENCE_SECONDS
        self._loop.call_later(seconds, self._grow, turn, is_urgent)

    def _grow(self, turn: asyncio.Future[Link | None], is_urgent: bool) -> None:
        """Have one more connection, if there may be one, for who has waited."""
        if turn.done():
            return
        if self._idle:
            turn.set_result(self._idle.pop())
        elif is_urgent or self._count < self._most_calls:
            self._count += 1
            turn.set_result(None)

    def _pass_on(self, link: Link | None) -> None:
        """Give a connection, or the place of one, to the first in line."""
        if link is None and self._idle:
            self._count -= 1
            link = self._idle.pop()
        while self._line:
            turn = self._line.popleft()
            if not turn.done():
                turn.set_result(link)
                return
        if link is not None:
            self._keep(link)
        else:
            self._count -= 1

    def _give_back(self, link: Link) -> None:
        link.used_at = self._loop.time()
        is_old = link.life != self._life or link.used_at > link.opened_at + _OLDEST_SECONDS
        if is_old or not self.users:
            self._close(link)
        elif self._count > self._most_calls:
            self._count -= 1
            link.connection.pgconn.finish()
        else:
            self._pass_on(link)

    def _close(self, link: Link) -> None:
        link.connection.pgconn.finish()
        self._pass_on(None)

    # --- connections without a call ---

    def _keep(self, link: Link) -> None:
        self._idle.append(link)
        if self._reaper is None:
            self._reaper = self._loop.call_later(_IDLE_SECONDS, self._reap)

    def _reap(self) -> None:
        self._reaper = None
        old = self._loop.time() - _IDLE_SECONDS
        while self._idle and self._idle[0].used_at <= old:
            self._count -= 1
            self._idle.pop(0).connection.pgconn.finish()
        if self._idle:
            at = self._idle[0].used_at + _IDLE_SECONDS
            self._reaper = self._loop.call_at(at, self._reap)

    def _close_idle(self) -> None:
        if self._reaper is not None:
            self._reaper.cancel()
            self._reaper = None
        idle, self._idle = self._idle, []
        self._count -= len(idle)
        for link in idle:
            link.connection.pgconn.finish()

    # --- new ones ---

    async def connect(self) -> Connection:
        """A connection that is not the pool's, for the caller to close.

        It commits each statement by itself.

        Raises:
            UnreachableServerError: it was not there in time.
            psycopg.Error, OSError: there is none.
        """
        try:
            return await asyncio.wait_for(self._open(), self._target.connect_timeout_seconds)
        except asyncio.TimeoutError:
            raise self._target.silent("connection") from None

    async def _open(self) -> Connection:
        arguments = self._target.conninfo
        if self._target.fresh_password is not None:
            password = await asyncio.to_thread(self._target.fresh_password)
            arguments = conninfo.make_conninfo(arguments, password=password)
        return await psycopg.AsyncConnection.connect(
            arguments, autocommit=True, prepare_threshold=None
        )

    async def within(self, connection: Connection, work: Awaitable[T]) -> T:
        """Do something on a connection, and hang up where it takes too long or is cancelled.

        Raises:
            UnreachableServerError: it was not done in time.
        """
        task = asyncio.ensure_future(work)
        try:
            done, _ = await asyncio.wait({task}, timeout=self._target.connect_timeout_seconds)
        except asyncio.CancelledError:
            _hang_up(connection)
            await _ended(task)
            raise
        if not done:
            _hang_up(connection)
            await _ended(task)
            raise self._target.silent("answer")
        return task.result()


_pools: WeakValueDictionary[tuple[asyncio.AbstractEventLoop, Target], Pool] = WeakValueDictionary()


def pool_of(target: Target) -> Pool:
    """The pool of the running event loop; it lives as long as somebody has it."""
    key = (asyncio.get_running_loop(), target)
    pool = _pools.get(key)
    if pool is None:
        _pools[key] = pool = Pool(target)
    return pool


def _spares_connection(error: BaseException) -> bool:
    """Whether an error says nothing against the connection of its call."""
    code = error.sqlstate if isinstance(error, psycopg.Error) else None
    is_refused_by_us = isinstance(error, RefusedByServerError)
    return is_refused_by_us or (code is not None and code not in OTHER_CONNECTION)


def _hang_up(connection: Connection) -> None:
    """Let libpq see the end of its connection at once; the descriptor stays until it has."""
    with suppress(psycopg.Error, OSError):
        copy = socket.socket(fileno=os.dup(connection.pgconn.socket))
        try:
            copy.shutdown(socket.SHUT_RDWR)
        finally:
            copy.close()


async def _ended(task: asyncio.Future[Any]) -> None:
    await asyncio.wait({task}, timeout=1)
    if not task.done():
        task.cancel()
    elif not task.cancelled():
        task.exception()
