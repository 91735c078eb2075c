"""How commands look at both servers: the read model of all that waits and runs."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace

import click

from dagster_taskiq.backend import open_backend
from dagster_taskiq.brokers import open_broker
from dagster_taskiq.config.settings import Settings
from dagster_taskiq.connections import Servers, find_running_servers
from dagster_taskiq.errors import DagsterTaskiqError, ServerError
from dagster_taskiq.overview import MOST_WAITING, Overview, reach_servers, read_overview


def look(settings: Settings, *queues: str) -> Overview:
    """All that there is to see; nothing where the embedded server rests, which is said.

    Args:
        queues: that are read though nobody may know of them.

    Raises:
        DagsterTaskiqError: a server is away or refuses; with its own sentence.
    """
    overview = look_at_servers(settings, *queues, most_waiting=MOST_WAITING)
    for server in overview.servers:
        if server.problem:
            raise DagsterTaskiqError(server.problem)
    if not overview.servers:
        click.echo("No process uses the embedded server: there is nothing to see.", err=True)
    return overview


def look_at_servers(settings: Settings, *queues: str, most_waiting: int) -> Overview:
    """The same, and only the servers where one of them is away.

    Args:
        most_waiting: see ``read_overview``.
    """
    servers = find_running_servers(settings)
    if servers is None:
        return Overview()
    return asyncio.run(_look(servers, [settings.default_queue, *queues], most_waiting))


async def _look(servers: Servers, queues: list[str], most_waiting: int) -> Overview:
    backend = open_backend(servers.backend, servers.signer)
    broker = open_broker(servers.broker)
    try:
        views = await reach_servers(servers, backend, broker)
        if any(view.problem for view in views):
            return Overview(servers=views)
        overview = await read_overview(servers, backend, broker, queues, most_waiting)
        return replace(overview, servers=views)
    finally:
        for connected in (broker, backend):
            with suppress(ServerError):
                await connected.shutdown()
