"""How commands look at both servers: the read model of all that waits and runs."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace

import click

from dagster_taskiq.backend import open_backend
from dagster_taskiq.brokers import open_broker
from dagster_taskiq.cli.asking import ask_backend
from dagster_taskiq.config.settings import Settings
from dagster_taskiq.connections import Servers, find_running_servers
from dagster_taskiq.errors import DagsterTaskiqError, ServerError
from dagster_taskiq.overview import (
    MOST_WAITING,
    Overview,
    reach_servers,
    read_backend,
    read_overview,
)

_RESTS = "No process uses the embedded server: there is nothing to see."


def look(settings: Settings, *queues: str, most_ended: int = 0) -> Overview:
    """All that there is to see; nothing where the embedded server rests, which is said.

    Args:
        queues: that are read though nobody may know of them.
        most_ended: see ``read_overview``.

    Raises:
        DagsterTaskiqError: a server is away or refuses; with its own sentence.
    """
    overview = look_at_servers(settings, *queues, most_waiting=MOST_WAITING, most_ended=most_ended)
    for server in overview.servers:
        if server.problem:
            raise DagsterTaskiqError(server.problem)
    if not overview.servers:
        click.echo(_RESTS, err=True)
    return overview


def look_at_backend(settings: Settings, *, most_ended: int) -> Overview:
    """What there is to see without the broker; nothing where the embedded server rests.

    Args:
        most_ended: see ``read_overview``.

    Raises:
        ServerError: the backend is away or refuses.
    """
    overview = ask_backend(settings, lambda backend: read_backend(backend, most_ended))
    if overview is None:
        click.echo(_RESTS, err=True)
    return overview or Overview()


def look_at_servers(
    settings: Settings, *queues: str, most_waiting: int, most_ended: int = 0
) -> Overview:
    """The same, and only the servers where one of them is away.

    Args:
        most_waiting, most_ended: see ``read_overview``.
    """
    servers = find_running_servers(settings)
    if servers is None:
        return Overview()
    names = [settings.default_queue, *queues]
    return asyncio.run(_look(servers, names, most_waiting, most_ended))


async def _look(
    servers: Servers, queues: list[str], most_waiting: int, most_ended: int
) -> Overview:
    backend = open_backend(servers.backend, servers.signer)
    broker = open_broker(servers.broker)
    try:
        views = await reach_servers(servers, backend, broker)
        if any(view.problem for view in views):
            return Overview(servers=views)
        overview = await read_overview(servers, backend, broker, queues, most_waiting, most_ended)
        return replace(overview, servers=views)
    finally:
        for connected in (broker, backend):
            with suppress(ServerError):
                await connected.shutdown()
