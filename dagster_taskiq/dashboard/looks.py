"""The one reader behind all viewers: it looks at the servers while somebody looks at the page."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace

from dagster_taskiq.backend import Backend, open_backend
from dagster_taskiq.brokers import TaskBroker, open_broker
from dagster_taskiq.connections import Servers
from dagster_taskiq.dashboard.ended import EndMemory, Ends
from dagster_taskiq.dashboard.memory import Memory, Sample
from dagster_taskiq.errors import DagsterTaskiqError, ServerError
from dagster_taskiq.overview import (
    Overview,
    ServerView,
    reach_servers,
    read_backend,
    read_overview,
)

#: Between two looks, while somebody looks at the page.
LOOK_SECONDS = 2.0

#: Looks take at most a quarter of the time, where there is so much that one takes long.
_REST_SHARE = 3.0

#: How long a page waits for a look before it is shown with the one before.
PATIENCE_SECONDS = 4.0

#: How many of the tasks that wait in a queue are shown one by one.
MOST_WAITING = 50

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Look:
    """What there was to see at one moment.

    Attributes:
        number: of the look, from 1; 0 before the first.
        at: when it ended; seconds since the epoch.
        overview: where a server is away what was last seen, see ``stale``.
        is_resting: whether no process uses the embedded server, so that there is nothing to see.
        stale: what of the overview is from an earlier look: ``queues``, or also ``workers``.
        seen_at: when what is stale was seen; None where it never was.
        problem: what else went wrong, a sentence; empty for nothing.
        silent_seconds: for how long each worker has not been heard of that should have been, by
            its id.
        samples: of the last hour, the oldest first.
        ends: the attempts that have ended.
        began_at: when the first look began, which no sample is older than.
    """

    number: int = 0
    at: float = 0.0
    overview: Overview = field(default_factory=Overview)
    is_resting: bool = False
    stale: frozenset[str] = frozenset()
    seen_at: float | None = None
    problem: str = ""
    silent_seconds: Mapping[str, float] = field(default_factory=dict)
    samples: Sequence[Sample] = ()
    ends: Ends = field(default_factory=Ends)
    began_at: float = 0.0


@dataclass(frozen=True)
class Opened:
    """Servers with connections to them."""

    servers: Servers
    backend: Backend
    broker: TaskBroker


@asynccontextmanager
async def opened(servers: Servers) -> AsyncIterator[Opened]:
    """Connections to the servers, which are made when they are used first."""
    found = _open(servers)
    try:
        yield found
    finally:
        await _close(found)


def _open(servers: Servers) -> Opened:
    return Opened(
        servers, open_backend(servers.backend, servers.signer), open_broker(servers.broker)
    )


async def _close(found: Opened) -> None:
    for connected in (found.broker, found.backend):
        with suppress(ServerError):
            await connected.shutdown()


class Watch:
    """Looks at the servers when it is asked, and rests ``LOOK_SECONDS`` at least between looks.

    However many ask at once, there is one look at a time, on connections that stay open.

    Args:
        find: the servers; None where the embedded one rests. Called in a thread.
        queues: that are shown though nobody may know of them.
    """

    def __init__(self, find: Callable[[], Servers | None], queues: Iterable[str]) -> None:
        self._find = find
        self._queues = list(queues)
        self._opened: Opened | None = None
        self._memory = Memory()
        self._ends = EndMemory()
        self._looking: asyncio.Task[None] | None = None
        self._next_look = float("-inf")  # monotonic
        self._stopping = asyncio.Event()
        self.look = Look()

    async def latest(self) -> Look:
        """What there is to see now; the last look where the servers do not answer in time."""
        if time.monotonic() >= self._next_look:
            if self._looking is None or self._looking.done():
                self._looking = asyncio.create_task(self._look(), name="look at the servers")
            # the look is everybody's: a viewer who goes away does not end it
            await asyncio.wait([self._looking], timeout=PATIENCE_SECONDS)
        return self.look

    async def after(self, number: int) -> Look | None:
        """The first look that is newer than that of a number; None at the end."""
        while not self._stopping.is_set():
            look = await self.latest()
            if look.number != number:
                return look
            rest = self._next_look - time.monotonic()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), max(rest, 0.02))
        return None

    def stop(self) -> None:
        """Let those go that wait for another look."""
        self._stopping.set()

    async def close(self) -> None:
        """Close the connections."""
        if self._looking is not None and not self._looking.done():
            self._looking.cancel()
            with suppress(asyncio.CancelledError):
                await self._looking
        await self._disconnect()

    # --- one look ---

    async def _look(self) -> None:
        began, began_at = time.monotonic(), time.time()
        before = self.look
        try:
            look = await self._read(before)
        except DagsterTaskiqError as error:
            look = _stale(before, problem=str(error))
        except Exception:
            _log.exception("The look at the servers has failed")
            look = _stale(
                before, problem="The look has failed; the output of this page's process says how."
            )
        if look.stale or look.problem:
            await self._disconnect()  # the next look finds the servers anew
        else:
            ends = self._ends.note(look.overview.ended, time.time())
            look = replace(look, overview=self._memory.note(look.overview), ends=ends)
        now = time.monotonic()
        self._next_look = now + max(LOOK_SECONDS, _REST_SHARE * (now - began))
        self.look = replace(
            look,
            number=before.number + 1,
            at=time.time(),
            silent_seconds=self._memory.silent_seconds(),
            samples=self._memory.samples(),
            began_at=before.began_at or began_at,
        )

    async def _read(self, before: Look) -> Look:
        if self._opened is None:
            servers = await asyncio.to_thread(self._find)
            if servers is None:
                return Look(is_resting=True, ends=before.ends)
            self._opened = _open(servers)
        opened_ = self._opened
        views = await reach_servers(opened_.servers, opened_.backend, opened_.broker)
        try:
            return await self._read_reached(opened_, views, before)
        except ServerError as error:
            views = [_with_problem(it, error) for it in views]
            problem = "" if any(it.problem for it in views) else str(error)
            return _stale(before, views, problem)

    async def _read_reached(
        self, opened_: Opened, views: Sequence[ServerView], before: Look
    ) -> Look:
        away = {role for view in views if view.problem for role in view.roles}
        if "backend" in away:
            return _stale(before, views)
        if away:
            known = await read_backend(opened_.backend)
            overview = replace(known, servers=views, queues=before.overview.queues)
            seen_at = before.seen_at if before.stale else before.at or None
            return Look(
                overview=overview, stale=frozenset(["queues"]), seen_at=seen_at, ends=before.ends
            )
        overview = await read_overview(
            opened_.servers,
            opened_.backend,
            opened_.broker,
            [*self._queues, *self._memory.queues()],
            MOST_WAITING,
            self._ends.next_most,
        )
        return Look(overview=replace(overview, servers=views))

    async def _disconnect(self) -> None:
        found, self._opened = self._opened, None
        if found is not None:
            await _close(found)


def _stale(before: Look, views: Sequence[ServerView] | None = None, problem: str = "") -> Look:
    """What was seen before, with how the servers answer now."""
    overview = before.overview
    if views is not None:
        overview = replace(overview, servers=views)
    return Look(
        overview=overview,
        stale=frozenset(["workers", "queues"]),
        seen_at=before.seen_at if before.stale else before.at or None,
        problem=problem,
        ends=before.ends,
    )


def _with_problem(view: ServerView, error: ServerError) -> ServerView:
    if view.problem or view.address != error.address:
        return view
    return replace(view, product=None, seconds=None, problem=str(error))
