"""The exporter: what belongs to no worker, read when it is scraped."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from http import HTTPStatus

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from dagster_taskiq.backend import Backend, open_backend
from dagster_taskiq.brokers import TaskBroker, open_broker
from dagster_taskiq.connections import Servers
from dagster_taskiq.defaults import CONNECT_TIMEOUT_SECONDS
from dagster_taskiq.errors import DagsterTaskiqError, ServerError
from dagster_taskiq.messages.attempt_ends import Counter
from dagster_taskiq.monitoring import definitions as the
from dagster_taskiq.monitoring.exposition import family, metrics_page
from dagster_taskiq.monitoring.overview_metrics import Reading, demand_of, metrics_of
from dagster_taskiq.monitoring.pages import Page, PageServer, lines
from dagster_taskiq.overview import Overview, ServerView, reach_servers, read_backend, read_overview

logger = logging.getLogger(__name__)

#: What was read, with the counters of the backend's history.
_Seen = tuple[Overview, Mapping[Counter, int]]

#: For how long a reading serves all who ask.
CACHE_SECONDS = 5.0

#: How long each part of a reading may take: Prometheus gives a scrape up after 10 s.
_REACH_SECONDS = CONNECT_TIMEOUT_SECONDS + 0.5
_READ_SECONDS = 3.0
_SHUTDOWN_SECONDS = 0.5


class Exporter:
    """Serves ``/metrics``, ``/health`` and ``/demand`` of a deployment.

    Args:
        host, port: see ``PageServer``.
        find_servers: finds them; None where an embedded one is meant that rests.
        queues: that are told though nobody listens to them and no task waits there.

    Raises:
        ConfigError: nothing can listen there.
    """

    def __init__(
        self,
        host: str,
        port: int,
        find_servers: Callable[[], Servers | None],
        queues: Iterable[str],
    ) -> None:
        self._find_servers = find_servers
        self._queues = list(queues)
        self._problems: list[str] = []
        self._turn = threading.Lock()
        self._reading: tuple[float, Reading] | None = None
        registry = CollectorRegistry()
        registry.register(_Readings(self.read, self._queues))
        ProcessCollector(registry=registry)
        self._server = PageServer(
            host,
            port,
            {
                "/metrics": metrics_page(registry),
                "/health": self._health_page,
                "/demand": self._demand_page,
            },
        )

    @property
    def url(self) -> str:
        """Without a path."""
        return self._server.url

    def start(self) -> None:
        """Answer from now on, in threads of its own."""
        self._server.start()

    def close(self) -> None:
        """Stop to listen."""
        self._server.close()

    def read(self) -> Reading:
        """What there is to see, not older than ``CACHE_SECONDS``; any thread may ask."""
        with self._turn:
            if self._reading is None or time.monotonic() - self._reading[0] >= CACHE_SECONDS:
                reading = self._read_now()
                self._reading = time.monotonic(), reading
                self._say(reading)
            return self._reading[1]

    def _read_now(self) -> Reading:
        began, read_at = time.monotonic(), time.time()
        seen: _Seen = Overview(), {}
        problem = ""
        try:
            servers = self._find_servers()
            if servers is None:
                problem = "No process uses the embedded server: there is nothing to see."
            else:
                seen = asyncio.run(_look(servers, self._queues))
        except DagsterTaskiqError as error:  # of a file that was changed meanwhile, for example
            problem = str(error)
        return Reading(*seen, read_at, time.monotonic() - began, problem)

    def _say(self, reading: Reading) -> None:
        """Say in the log what is new about the servers."""
        problems = reading.problems
        for problem in problems:
            if problem not in self._problems:
                logger.warning("%s The metrics say so meanwhile.", problem)
        if self._problems and not problems:
            logger.warning("The servers answer again.")
        self._problems = problems

    def _health_page(self, _accept: str) -> Page:
        """It is healthy when it answers: a restart of it brings no server back."""
        return Page(lines(["The exporter is running.", *self._problems]))

    def _demand_page(self, _accept: str) -> Page:
        """The demand of each queue, in which a server that is away is not taken for emptiness."""
        reading = self.read()
        if reading.problems:
            return Page(lines(reading.problems), HTTPStatus.SERVICE_UNAVAILABLE)
        body = json.dumps(demand_of(reading.overview, self._queues)).encode()
        return Page(body + b"\n", content_type="application/json")


class _Readings(Collector):
    def __init__(self, read: Callable[[], Reading], queues: Sequence[str]) -> None:
        self._read = read
        self._queues = queues

    def describe(self) -> Iterator[Metric]:
        """What there is, without a look at anything."""
        yield from (family(definition, {}) for definition in the.EXPORTER_METRICS)

    def collect(self) -> Iterator[Metric]:
        """The values of now, or of a few seconds ago."""
        yield from metrics_of(self._read(), self._queues)


async def _look(servers: Servers, queues: list[str]) -> _Seen:
    """All that the servers which answer tell."""
    backend, broker = open_backend(servers.backend, servers.signer), open_broker(servers.broker)
    try:
        views = await _reach(servers, backend, broker)
        return await _read(servers, backend, broker, views, queues)
    finally:
        for connected in (broker, backend):
            with suppress(ServerError, asyncio.TimeoutError):
                await asyncio.wait_for(connected.shutdown(), _SHUTDOWN_SECONDS)


async def _reach(servers: Servers, backend: Backend, broker: TaskBroker) -> list[ServerView]:
    try:
        return await asyncio.wait_for(reach_servers(servers, backend, broker), _REACH_SECONDS)
    except (ServerError, asyncio.TimeoutError) as error:
        views = [
            ServerView(("broker",), None, servers.broker.address, None),
            ServerView(("backend",), None, servers.backend.address, None),
        ]
        for role in ("broker", "backend"):
            views = _with_problem(views, role, error)
        return views


async def _read(
    servers: Servers,
    backend: Backend,
    broker: TaskBroker,
    views: list[ServerView],
    queues: list[str],
) -> _Seen:
    """All of it, or without the broker what the backend tells."""

    async def all_of_it() -> _Seen:
        overview = await read_overview(servers, backend, broker, queues, most_waiting=0)
        return overview, await backend.counts()

    async def without_queues() -> _Seen:
        return await read_backend(backend), await backend.counts()

    reads: Sequence[tuple[str, Callable[[], Awaitable[_Seen]]]] = (
        ("broker", all_of_it),
        ("backend", without_queues),
    )
    for role, read in reads:
        away = {role for view in views if view.problem for role in view.roles}
        if away & {role, "backend"}:
            continue
        try:
            overview, counts = await asyncio.wait_for(read(), _READ_SECONDS)
        except (ServerError, asyncio.TimeoutError) as error:
            views = _with_problem(views, role, error)
        else:
            return replace(overview, servers=views), counts
    return Overview(servers=views), {}


def _with_problem(
    views: list[ServerView], role: str, error: ServerError | asyncio.TimeoutError
) -> list[ServerView]:
    """The servers, with the error at the one that it is of, else at the one with the role."""
    address = error.address if isinstance(error, ServerError) else ""
    is_of = [view.address == address for view in views]
    if not any(is_of):
        is_of = [role in view.roles for view in views]
    return [
        replace(view, problem=str(error) or f"{view.address} did not answer in time.")
        if is_meant
        else view
        for view, is_meant in zip(views, is_of, strict=True)
    ]
