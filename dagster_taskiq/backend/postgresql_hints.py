"""How a run's loop learns that results have come, from PostgreSQL: by hints, and by looking.

Each NOTIFY wakes every session that listens in the database, whatever it listens to, so only runs'
loops do, and only where the broker has no bell. Where hints do not arrive, as behind a pooler that
gives each transaction another session, the loop looks often.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from collections.abc import Awaitable, Callable, Collection

import psycopg
from psycopg import pq

from dagster_taskiq.errors import ServerError
from dagster_taskiq.servers.bell import Bell, Hearing
from dagster_taskiq.servers.postgresql_client import server_errors
from dagster_taskiq.servers.postgresql_pool import Connection

logger = logging.getLogger(__name__)

#: How often a loop looks for results, behind hints and without them.
_LOOK_SECONDS = 5.0
_LOOK_WITHOUT_HINTS_SECONDS = 0.25

#: How long the first hint of a new listener may take, which is sent to see whether it arrives.
_TEST_SECONDS = 1.0

#: A wait that is shorter is no reason to listen.
_SHORT_SECONDS = 0.2

#: How long a hint may take, before its bell is doubted.
_HINT_SECONDS = 1.0

#: Pause before a bell is tried again that could not be heard.
_LISTEN_AGAIN_SECONDS = 2.0


def channel_of(schema: str, run_id: str) -> str:
    """The channel of a run's hints: a short name, whatever they are."""
    digest = hashlib.md5(f"{schema}\n{run_id}".encode(), usedforsecurity=False).hexdigest()
    return f"dagster_taskiq_{digest}"


class _Listener(Hearing):
    """A connection that hears the hints of one channel."""

    def __init__(self, connection: Connection, arrived: asyncio.Event) -> None:
        super().__init__(arrived)
        self._pgconn = connection.pgconn
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._descriptor = self._pgconn.socket
        self._loop.add_reader(self._descriptor, self._read)

    def _read(self) -> None:
        try:
            self._pgconn.consume_input()
            while notification := self._pgconn.notifies():
                self.hear(notification.extra.decode())
            is_lost = self._pgconn.status != pq.ConnStatus.OK
        except psycopg.Error:
            is_lost = True
        if is_lost:
            self.close()

    def close(self) -> None:
        """See ``Hearing``."""
        if not self.is_lost:
            self._loop.remove_reader(self._descriptor)
            self._pgconn.finish()
            self.lose()


class NotifyBell(Bell):
    """NOTIFY and LISTEN; whether hints arrive is found out once, and said once.

    A mailbox is a channel. The backend rings in the step that stores a result.

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
        self._address = address
        self._connect = connect
        self._notify = notify

    def ring(self, mailbox: str, hint: str) -> None:
        """See ``Bell``: there is nothing left to do."""

    async def listen(self, mailbox: str, arrived: asyncio.Event) -> Hearing | None:
        """See ``Bell``: a listener that has heard its first hint."""
        with server_errors(self._address):
            return await self._listen(mailbox, arrived)

    async def _listen(self, channel: str, arrived: asyncio.Event) -> _Listener | None:
        connection = await self._connect()
        if connection.prepare_threshold is None:
            connection.pgconn.finish()
            self._give_up("a pooler is in between")
            return None
        try:
            await connection.execute(f'LISTEN "{channel}"')
            listener = _Listener(connection, arrived)
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

    async def close(self) -> None:
        """See ``Bell``: the connections are the listeners' own."""


async def _heard(listener: _Listener, arrived: asyncio.Event) -> None:
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

    Args:
        name: that the bell rings for.
        bell: which brings the hints.

    Attributes:
        seen: by task id, the version of the result that was handed out. A task that was refused
            and sent again has another one.
    """

    def __init__(self, name: str, bell: Bell) -> None:
        self.seen: dict[str, str] = {}
        self._name = name
        self._bell = bell
        self._hearing: Hearing | None = None
        self._listening: asyncio.Task[None] | None = None
        self._arrived = asyncio.Event()
        self._looks_at = 0.0
        self._listens_at = 0.0
        #: What had been heard when the last look began.
        self._heard_now: set[str] = set()
        #: Whether nobody has listened throughout the time before the next look.
        self._is_first_look = True
        #: The tasks whose results a look has found, of which no hint has come, and when that was.
        self._unheard: set[str] = set()
        self._unheard_at = 0.0
        self._is_closed = False

    def take_hints(self) -> list[str] | None:
        """The tasks that are said to have results; None when it is time to look for all."""
        now = asyncio.get_running_loop().time()
        hints: set[str] = set()
        if self._hearing:
            hints, self._hearing.hints = self._hearing.hints, hints
            self._unheard -= hints
        if now < self._looks_at:
            return list(hints)
        self._heard_now = hints
        if self._unheard and self._hearing and now >= self._unheard_at + _HINT_SECONDS:
            # its connection may be dead without a word: another one is made
            self._hearing.close()
            self._hearing = None
        pause = _LOOK_SECONDS if self._is_listening else _LOOK_WITHOUT_HINTS_SECONDS
        self._looks_at = now + pause * random.uniform(0.7, 1.3)
        return None

    def note_found(self, task_ids: Collection[str]) -> None:
        """What the look has found that was not handed out yet: hints of it are to come."""
        is_whole = self._is_listening and not self._is_first_look
        self._is_first_look = not self._is_listening
        if is_whole and not self._unheard:
            self._unheard = set(task_ids) - self._heard_now
            self._unheard_at = asyncio.get_running_loop().time()

    async def wait(self, seconds: float) -> None:
        """Until there is a hint, or it is time to look, or the time is over."""
        loop = asyncio.get_running_loop()
        if self._may_listen(loop.time()) and seconds > _SHORT_SECONDS:
            # beside the looks, which a bell that is away must not hold up
            self._listening = asyncio.create_task(self._listen(), name="listen")
        if self._is_listening and self._hearing and self._hearing.hints:
            return
        self._arrived.clear()
        left = min(seconds, self._looks_at - loop.time())
        try:
            await asyncio.wait_for(self._arrived.wait(), max(0.0, left))
        except asyncio.TimeoutError:
            pass
        if self._hearing and self._hearing.is_lost:
            self._hearing = None
            self._looks_at = 0.0

    async def _listen(self) -> None:
        try:
            self._hearing = await self._bell.listen(self._name, self._arrived)
        except ServerError as error:
            logger.debug("No hints are heard for now: %s", error)  # the looks say it aloud
        if self._hearing is None:
            self._listens_at = asyncio.get_running_loop().time() + _LISTEN_AGAIN_SECONDS
            return
        # what came before it listened has no hint
        self._is_first_look, self._unheard = True, set()
        self._looks_at = 0.0
        self._arrived.set()

    @property
    def _is_listening(self) -> bool:
        return self._hearing is not None and not self._hearing.is_lost

    def _may_listen(self, now: float) -> bool:
        is_busy = self._listening is not None and not self._listening.done()
        is_idle = not self._is_listening and not is_busy and not self._is_closed
        return self._bell.works and is_idle and now >= self._listens_at

    def close(self) -> None:
        """End the hearing, and begin no other one."""
        self._is_closed = True
        if self._listening:
            self._listening.cancel()
        if self._hearing:
            self._hearing.close()
            self._hearing = None
