"""What commands that steer queues and tasks share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import click

from dagster_taskiq.config.settings import Settings
from dagster_taskiq.connections import find_running_servers
from dagster_taskiq.errors import DagsterTaskiqError
from dagster_taskiq.overview import Overview, read_overview
from dagster_taskiq.steering.helm import Helm, opened_helm

T = TypeVar("T")

yes_option = click.option("--yes", is_flag=True, help="Do not ask.")


def steer(settings: Settings, act: Callable[[Helm], Awaitable[T]]) -> T:
    """Do something with both servers open.

    Raises:
        DagsterTaskiqError: a server is away or refuses, or the embedded server rests.
    """

    async def steered() -> T:
        servers = find_running_servers(settings)
        if servers is None:
            raise DagsterTaskiqError(
                "No process uses the embedded server: there is nothing to steer."
            )
        async with opened_helm(servers) as helm:
            return await act(helm)

    return asyncio.run(steered())


async def overview_of(helm: Helm, *queues: str, most_waiting: int = 0) -> Overview:
    """All that there is to see; see ``read_overview``."""
    return await read_overview(helm.servers, helm.backend, helm.broker, queues, most_waiting)
