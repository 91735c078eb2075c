"""Calls of PostgreSQL, and what their errors mean for people.

libpq's way to read URLs counts, so that a URL means here what it means to Dagster. The connections
are those of the process (``postgresql_pool``).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import conninfo, errors

from dagster_taskiq.errors import ConfigError, ServerError, UnreachableServerError
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq.servers.postgresql_pool import (
    OTHER_CONNECTION,
    Connection,
    Link,
    Pool,
    Target,
    pool_of,
)
from dagster_taskiq.servers.server_refusals import (
    POSTGRESQL_SERVER_REFUSALS,
    Outlook,
    find_refusal,
    refusal_error,
)
from dagster_taskiq.servers.urls import redact

#: SQLSTATEs of a transaction that lost against another one, and may be repeated at once.
_REPEATED = ("40001", "40P01")


class Connections:
    """What broker or backend has of the connections of its process.

    Args:
        options: how to reach the server; who has the same ones shares the connections.
        greet: what is done on a connection before its first call of this user.
        is_listener: whether this user looks for messages all the time.

    Raises:
        ConfigError: libpq cannot read the URL.
    """

    def __init__(
        self,
        options: ServerOptions,
        greet: Callable[[Connection], Awaitable[None]],
        *,
        is_listener: bool = False,
    ) -> None:
        self._target = Target(
            _conninfo_of(options),
            options.connect_timeout_seconds,
            options.fresh_password,
            options.address,
        )
        self._greet = greet
        self._is_listener = is_listener
        self._pool: Pool | None = None

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
            is_urgent: whether it goes before the others that wait for a connection.
            is_repeatable: whether it bears to be executed twice, where the server may have got it
                before the connection broke.

        Raises:
            UnreachableServerError: it did not answer in time.
            psycopg.Error, OSError: see ``server_errors``.
        """
        pool = self._join()
        link: Link | None = None
        try:
            async with pool.link(is_urgent=is_urgent) as link:
                return await self._call_on(pool, link, statement, values)
        except psycopg.Error as error:
            is_used = link is not None and not link.is_new
            is_stale = is_used and (
                error.sqlstate in OTHER_CONNECTION or (is_repeatable and _is_lost(error))
            )
            if not is_stale and error.sqlstate not in _REPEATED:
                raise
        async with pool.link(is_urgent=is_urgent) as link:
            return await self._call_on(pool, link, statement, values)

    async def _call_on(
        self, pool: Pool, link: Link, statement: str, values: Sequence[Any]
    ) -> list[tuple[Any, ...]]:
        if self not in link.greeted:
            await pool.within(link.connection, self._greet(link.connection))
            link.greeted.add(self)
        return await pool.within(link.connection, _fetch(link.connection, statement, values))

    async def product(self) -> str:
        """Name and version of the server; errors as of ``call``."""
        ((text,),) = await self.call("SHOW server_version")
        return f"PostgreSQL {text.partition(' ')[0]}"

    async def connect(self) -> Connection:
        """A new connection, for the caller to close; it commits each statement by itself.

        Raises:
            UnreachableServerError: it did not answer in time.
            psycopg.Error, OSError: see ``server_errors``.
        """
        pool = self._join()
        connection = await pool.connect()
        try:
            await pool.within(connection, self._greet(connection))
        except BaseException:
            connection.pgconn.finish()
            raise
        return connection

    def close(self) -> None:
        """Use the connections no more, but for the calls under way; a later call uses them again.

        The last user closes them.
        """
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.leave(self)

    def _join(self) -> Pool:
        if self._pool is None:
            self._pool = pool_of(self._target)
            self._pool.join(self, is_listener=self._is_listener)
        return self._pool


async def _fetch(
    connection: Connection, statement: str, values: Sequence[Any]
) -> list[tuple[Any, ...]]:
    cursor = connection.cursor(binary=True)
    await cursor.execute(statement, values)
    return await cursor.fetchall() if cursor.description else []


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
