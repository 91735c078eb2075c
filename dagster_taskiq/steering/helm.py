"""The open servers that steering needs, and the name under which it is done."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from dagster_taskiq.backend import Backend, open_backend
from dagster_taskiq.brokers import TaskBroker, open_bell, open_broker
from dagster_taskiq.connections import Servers
from dagster_taskiq.errors import ServerError
from dagster_taskiq.messages.results import Place


@dataclass(frozen=True)
class Helm:
    """Servers on which ``startup`` was called, and who steers.

    Attributes:
        user: of the operating system, for the reasons that people read.
    """

    servers: Servers
    backend: Backend
    broker: TaskBroker
    host: str
    user: str

    @property
    def place(self) -> Place:
        """Where a task ends that is taken out of its queue."""
        return Place(f"{self.user}@{self.host}", "", self.host, os.getpid(), 0)

    def who_and_why(self, what: str, reason: str) -> str:
        """A sentence that says who has done what, and why."""
        why = f": {reason.removesuffix('.')}" if reason else ""
        return f"{what} by {self.user} on host {self.host}{why}."


@asynccontextmanager
async def opened_helm(servers: Servers) -> AsyncIterator[Helm]:
    """Reach both servers.

    Raises:
        ServerError: one is away or refuses.
    """
    bell = open_bell(servers.broker, servers.backend)
    backend = open_backend(servers.backend, servers.signer, bell)
    broker = open_broker(servers.broker)
    try:
        await backend.startup()
        await broker.startup()
        yield Helm(servers, backend, broker, socket.gethostname(), _user())
    finally:
        for connected in (broker, backend):
            with suppress(ServerError):
                await connected.shutdown()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a user id without a name, as in some containers
        return f"user {os.getuid()}"
