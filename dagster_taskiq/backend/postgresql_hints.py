"""How a run's loop learns that results have come, from PostgreSQL: by NOTIFY, or by looking.

Each NOTIFY wakes every session that listens in the database, whatever it listens to, so only runs'
loops do. A hint may be lost and never is the truth: behind it the loop looks all the same, seldom.
Where hints do not arrive, as behind a pooler that gives each transaction another session, it looks
often.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from collections.abc import Awaitable, Callable

import psycopg
from psycopg import pq

from dagster_taskiq.servers.postgresql_client import Connection

logger = logging.getLogger(__name__)

#: How often a loop looks for results, behind hints and without them.
_LOOK_SECONDS = 5.0
_LOOK_WITHOUT_HINTS_SECONDS = 0.25

#: How long the first hint of a new listener may take, which is sent to see whether it arrives.
_TEST_SECONDS = 1.0

#: A wait that is shorter is no reason to listen.
_SHORT_SECONDS = 0.2


def channel_of(schema: str, run_id: str) -> str:
    """The channel of a run's hints: a short name, whatever they are."""
    digest = hashlib.md5(f"{schema}\n{run_id}".encode(), usedforsecurity=False).hexdigest()
    return f"dagster_taskiq_{digest}"


class Listener:
    """A connection that hears the hints of one channel."""

    def __init__(self, connection: Connection, arrived: asyncio.Event) -> None:
        self.hints: set[str] = set()
        #: Of the connection's end.
        self.is_lost = False
        self.has_heard = False
        self._pgconn = connection.pgconn
        self._connection = connection
        self._arrived = arrived
        self._loop = asyncio.get_running_loop()
        self._descriptor = self._pgconn.socket
        self._loop.add_reader(self._descriptor, self._read)

    def _read(self) -> None:
        try:
            self._pgconn.consume_input()
            while notification := self._pgconn.notifies():
                self.has_heard = True
                self.hints.add(notification.extra.decode())
            is_lost = self._pgconn.status != pq.ConnStatus.OK
        except psycopg.Error:
            is_lost = True
        if is_lost:
            self.close()
        self._arrived.set()

    def close(self) -> None:
        """Hear no more."""
        if not self.is_lost:
            self.is_lost = True
            self._loop.remove_reader(self._descriptor)
            self._pgconn.finish()


class Push:
    """Whether hints arrive from this server, which is found out once, and said once.

    Args:
        address: of the server.
        connect: makes a connection.
        notify: sends a hint to a channel by another connection.
    """

    def __init__(
        self,
        address: str,
        connect: Callable[[], Awaitable[Connection]],
        notify: Callable[[str], Awaitable[object]],
    ) -> None:
        self.works = True
        self._address = address
        self._connect = connect
        self._notify = notify

    async def listen(self, channel: str, arrived: asyncio.Event) -> Listener | None:
        """A listener that has heard its first hint; None where hints do not arrive.

        Raises:
            UnreachableServerError: it did not answer in time.
            psycopg.Error, OSError: see ``server_errors``.
        """
        if not self.works:
            return None
        connection = await self._connect()
        if connection.prepare_threshold is None:
            connection.pgconn.finish()
            self._give_up("a pooler is in between")
            return None
        try:
            await connection.execute(f'LISTEN "{channel}"')
            listener = Listener(connection, arrived)
        except BaseException:
            connection.pgconn.finish()
            raise
        try:
            # from another connection: from its own it would arrive through a pooler too
            await self._notify(channel)
            await _heard(listener, arrived)
        except BaseException:
            listener.close()
            raise
        if not listener.has_heard:
            if not listener.is_lost:
                self._give_up("notifications do not arrive")
            listener.close()
            return None
        return listener

    def _give_up(self, reason: str) -> None:
        self.works = False
        logger.warning(
            "%s does not wake who waits (%s): results are looked for every %g s instead.",
            self._address,
            reason,
            _LOOK_WITHOUT_HINTS_SECONDS,
        )


async def _heard(listener: Listener, arrived: asyncio.Event) -> None:
    deadline = asyncio.get_running_loop().time() + _TEST_SECONDS
    while not listener.has_heard and not listener.is_lost:
        left = deadline - asyncio.get_running_loop().time()
        arrived.clear()
        try:
            await asyncio.wait_for(arrived.wait(), left)
        except asyncio.TimeoutError:
            return


class Mailbox:
    """What a loop knows of the results of one run.

    Attributes:
        seen: by task id, the version of the result that was handed out. A task that was refused
            and sent again has another one.
    """

    def __init__(self, channel: str, push: Push) -> None:
        self.seen: dict[str, str] = {}
        self._channel = channel
        self._push = push
        self._listener: Listener | None = None
        self._arrived = asyncio.Event()
        self._looks_at = 0.0
        self._is_closed = False

    def take_hints(self) -> list[str] | None:
        """The tasks that are said to have results; None when it is time to look for all."""
        now = asyncio.get_running_loop().time()
        if now >= self._looks_at:
            pause = _LOOK_SECONDS if self._is_listening else _LOOK_WITHOUT_HINTS_SECONDS
            self._looks_at = now + pause * random.uniform(0.7, 1.3)
            if self._listener:
                self._listener.hints.clear()
            return None
        hints: set[str] = set()
        if self._listener:
            hints, self._listener.hints = self._listener.hints, hints
        return [hint for hint in hints if hint]

    async def wait(self, seconds: float) -> None:
        """Until there is a hint, or it is time to look, or the time is over.

        Raises:
            UnreachableServerError: it did not answer in time.
            psycopg.Error, OSError: see ``server_errors``.
        """
        loop = asyncio.get_running_loop()
        if self._may_listen and seconds > _SHORT_SECONDS:
            self._listener = await self._push.listen(self._channel, self._arrived)
            # what came before it listened has no hint
            self._looks_at = 0.0
            return
        if self._is_listening and self._listener and self._listener.hints:
            return
        self._arrived.clear()
        left = min(seconds, self._looks_at - loop.time())
        try:
            await asyncio.wait_for(self._arrived.wait(), max(0.0, left))
        except asyncio.TimeoutError:
            pass
        if self._listener and self._listener.is_lost:
            self._listener = None
            self._looks_at = 0.0

    @property
    def _is_listening(self) -> bool:
        return self._listener is not None and not self._listener.is_lost

    @property
    def _may_listen(self) -> bool:
        return self._push.works and not self._is_listening and not self._is_closed

    def close(self) -> None:
        """Close the listener's connection, and make no other one."""
        self._is_closed = True
        if self._listener:
            self._listener.close()
            self._listener = None
