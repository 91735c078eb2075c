"""Connections to PostgreSQL, and what their errors mean for people.

libpq's way to read URLs counts, so that a URL means here what it means to Dagster. A server that
says nothing is given up by closing the connection: psycopg's own way to cancel a call asks the
server, and waits for its answer.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import psycopg
from psycopg import conninfo, errors

from dagster_taskiq.errors import ConfigError, ServerError, UnreachableServerError
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq.servers.server_refusals import (
    POSTGRESQL_SERVER_REFUSALS,
    Outlook,
    find_refusal,
    refusal_error,
)
from dagster_taskiq.servers.urls import redact

Connection = psycopg.AsyncConnection[Any]

#: How many calls of a process are under way at the same time, apart from urgent ones.
_MOST_CALLS = 4

#: A connection that nobody has used for this time is closed.
_IDLE_SECONDS = 60.0

#: A connection that is older is closed after its call, so that what a new one does is done now and
#: then by every process: it enters the schema, and takes a fresh password.
_OLDEST_SECONDS = 3600.0

#: SQLSTATEs after which another connection may do better: the server became a standby, or our
#: schema is gone, which a new connection makes again.
_OTHER_CONNECTION = ("25006", "0A000", "3F000", "42P01", "42883")

#: SQLSTATEs of a transaction that lost against another one, and may be repeated at once.
_REPEATED = ("40001", "40P01")


class _Idle(NamedTuple):
    """A connection that is not in use; times are the event loop's."""

    connection: Connection
    opened_at: float
    since: float


class Connections:
    """Connections of one process, each for one call at a time; urgent calls wait for no others.

    Args:
        options: how to reach the server.
        greet: what is done on each new connection.

    Raises:
        ConfigError: libpq cannot read the URL.
    """

    def __init__(
        self, options: ServerOptions, greet: Callable[[Connection], Awaitable[None]]
    ) -> None:
        self._conninfo = _conninfo_of(options)
        self._fresh_password = options.fresh_password
        self._address = options.address
        self._seconds = options.connect_timeout_seconds
        self._greet = greet
        self._turns = asyncio.Semaphore(_MOST_CALLS)
        self._idle: list[_Idle] = []
        self._reaper: asyncio.TimerHandle | None = None
        self._is_open = True

    async def call(
        self,
        statement: str,
        values: Sequence[Any] = (),
        *,
        is_urgent: bool = False,
        is_repeatable: bool = True,
    ) -> list[tuple[Any, ...]]:
        """The rows that a statement answers with.

        It is sent a second time where the first connection was one that the server had closed
        meanwhile, or where it lost against another transaction.

        Args:
            statement: with its places as psycopg has them.
            values: of the places.
            is_urgent: whether it waits for no other call.
            is_repeatable: whether it bears to be executed twice, where the server may have got it
                before the connection broke.

        Raises:
            UnreachableServerError: it did not answer in time.
            psycopg.Error, OSError: see ``server_errors``.
        """
        async with nullcontext() if is_urgent else self._turns:
            is_used = bool(self._idle)
            try:
                return await self._call_once(statement, values)
            except psycopg.Error as error:
                is_stale = is_used and (
                    error.sqlstate in _OTHER_CONNECTION or (is_repeatable and _is_lost(error))
                )
                if not is_stale and error.sqlstate not in _REPEATED:
                    raise
            return await self._call_once(statement, values)

    async def product(self) -> str:
        """Name and version of the server; errors as of ``call``."""
        ((text,),) = await self.call("SHOW server_version")
        return f"PostgreSQL {text.partition(' ')[0]}"

    async def _call_once(self, statement: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        async with self._one() as connection:
            fetch = _fetch(connection, statement, values)
            rows: list[tuple[Any, ...]] = await self._within(connection, fetch)
            return rows

    @asynccontextmanager
    async def _one(self) -> Any:
        self._is_open = True
        if self._idle:
            connection, opened_at, _ = self._idle.pop()
        else:
            connection, opened_at = await self.connect(), asyncio.get_running_loop().time()
        try:
            yield connection
        except BaseException as error:
            code = error.sqlstate if isinstance(error, psycopg.Error) else None
            if code is None or code in _OTHER_CONNECTION or connection.closed:
                connection.pgconn.finish()
                if not isinstance(error, asyncio.CancelledError):
                    self._close_idle()
            else:
                self._give_back(connection, opened_at)
            raise
        self._give_back(connection, opened_at)

    async def _within(self, connection: Connection, work: Awaitable[Any]) -> Any:
        """Do something on a connection, and hang up where it takes too long or is cancelled."""
        task = asyncio.ensure_future(work)
        try:
            done, _ = await asyncio.wait({task}, timeout=self._seconds)
        except asyncio.CancelledError:
            _hang_up(connection)
            await _ended(task)
            raise
        if not done:
            _hang_up(connection)
            await _ended(task)
            raise self._silent("answer")
        return task.result()

    def _silent(self, missing: str) -> UnreachableServerError:
        text = f"Cannot reach {self._address}: no {missing} within {self._seconds:g} s."
        return UnreachableServerError(self._address, text)

    async def connect(self) -> Connection:
        """A new connection, for the caller to close; it commits each statement by itself.

        Raises:
            UnreachableServerError: it did not answer in time.
            psycopg.Error, OSError: see ``server_errors``.
        """
        try:
            connection: Connection = await asyncio.wait_for(self._open(), self._seconds)
        except asyncio.TimeoutError:
            raise self._silent("connection") from None
        try:
            await self._within(connection, self._greet(connection))
        except BaseException:
            connection.pgconn.finish()
            raise
        return connection

    async def _open(self) -> Connection:
        conninfo_now = self._conninfo
        if self._fresh_password is not None:
            password = await asyncio.to_thread(self._fresh_password)
            conninfo_now = conninfo.make_conninfo(conninfo_now, password=password)
        return await psycopg.AsyncConnection.connect(
            conninfo_now, autocommit=True, prepare_threshold=None
        )

    def close(self) -> None:
        """Close them all; those in use when their call ends. A later call opens new ones."""
        self._is_open = False
        self._close_idle()

    def _close_idle(self) -> None:
        idle, self._idle = self._idle, []
        for one in idle:
            one.connection.pgconn.finish()

    def _give_back(self, connection: Connection, opened_at: float) -> None:
        loop = asyncio.get_running_loop()
        if not self._is_open or loop.time() > opened_at + _OLDEST_SECONDS:
            connection.pgconn.finish()
            return
        # the last used is used first, so that those that are not needed are the first to be closed
        self._idle.append(_Idle(connection, opened_at, loop.time()))
        if self._reaper is None:
            self._reaper = loop.call_later(_IDLE_SECONDS, self._reap, loop)

    def _reap(self, loop: asyncio.AbstractEventLoop) -> None:
        self._reaper = None
        old = loop.time() - _IDLE_SECONDS
        for one in self._idle:
            if one.since <= old:
                one.connection.pgconn.finish()
        self._idle = [one for one in self._idle if one.since > old]
        if self._idle:
            self._reaper = loop.call_at(self._idle[0].since + _IDLE_SECONDS, self._reap, loop)


async def _fetch(
    connection: Connection, statement: str, values: Sequence[Any]
) -> list[tuple[Any, ...]]:
    cursor = connection.cursor(binary=True)
    await cursor.execute(statement, values)
    return await cursor.fetchall() if cursor.description else []


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


def _is_lost(error: psycopg.Error) -> bool:
    code = error.sqlstate or ""
    return not code or code.startswith(("08", "57P"))


def _conninfo_of(options: ServerOptions) -> str:
    try:
        given = conninfo.conninfo_to_dict(options.client_url)
    except psycopg.Error as error:
        # its text may repeat a part of the password
        text = str(error).strip()
        reason = text if text.startswith("invalid URI query parameter") else "it is no URL of libpq"
        raise ConfigError(f"The URL {options.address} cannot be used: {reason}.") from None
    patience_ms = round(options.connect_timeout_seconds * 1000)
    arguments: dict[str, Any] = {
        "application_name": options.key_prefix,
        "keepalives_idle": 5,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": max(1000, patience_ms),
    }
    if "," in str(given.get("host", "")):
        arguments["target_session_attrs"] = "read-write"
    return conninfo.make_conninfo("", **{**arguments, **given})


@contextmanager
def server_errors(address: str) -> Iterator[None]:
    """Turn psycopg's errors into ours, with the address and without the password.

    Raises:
        UnreachableServerError: no connection, no answer in time, or a refusal that will pass.
        RefusedByServerError: the server answered with another error.
    """
    try:
        yield
    except (psycopg.Error, OSError) as error:
        raise _ours(address, error) from error


def _ours(address: str, error: Exception) -> ServerError:
    text = _sentence(error)
    if not isinstance(error, psycopg.Error):
        return UnreachableServerError(address, f"Cannot reach {address}: {text}.")
    code = error.sqlstate or ""
    if not code and not isinstance(error, errors.OperationalError):
        code = "client"  # psycopg could not send it
    refusal = find_refusal(POSTGRESQL_SERVER_REFUSALS, f"{code} {text}")
    is_passing = refusal.outlook is Outlook.PASSES
    if not code:
        verb = f"Cannot reach {address}" if is_passing else f"{address} refuses the connection"
    else:
        verb = f"{address} takes nothing now" if is_passing else f"{address} refused a command"
    return refusal_error(address, refusal, f"{verb}: {text}.")


def _sentence(error: BaseException) -> str:
    said = error.diag.message_primary if isinstance(error, psycopg.Error) else None
    text = " ".join(redact(str(said or error)).split()).rstrip(".")
    return text or type(error).__name__
