"""How commands ask the backend; ``looking`` asks the broker too, which takes Taskiq."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from dagster_taskiq.backend import Backend, open_backend
from dagster_taskiq.config.settings import Settings
from dagster_taskiq.connections import Servers, find_running_servers
from dagster_taskiq.errors import UnreachableServerError
from dagster_taskiq.messages.worker_records import WorkerRecord

T = TypeVar("T")


def ask_backend(settings: Settings, ask: Callable[[Backend], Awaitable[T]]) -> T | None:
    """What a question to the backend brings; None where no process uses the embedded server.

    Raises:
        ServerError: the backend is away or refuses.
    """
    servers = find_running_servers(settings)
    if servers is None:
        return None
    try:
        return ask_servers(servers, ask)
    except UnreachableServerError:
        if find_running_servers(settings) is None:  # it has stopped meanwhile, with its last user
            return None
        raise


def ask_servers(servers: Servers, ask: Callable[[Backend], Awaitable[T]]) -> T:
    """The same of servers that are known."""

    async def asked() -> T:
        backend = open_backend(servers.backend, servers.signer)
        try:
            await backend.startup()
            return await ask(backend)
        finally:
            await backend.shutdown()

    return asyncio.run(asked())


def read_workers(settings: Settings) -> list[WorkerRecord]:
    """The workers that are listed, by name; errors as of ``ask_backend``."""
    return ask_backend(settings, lambda backend: backend.workers()) or []


def read_all_workers(settings: Settings) -> tuple[list[WorkerRecord], list[WorkerRecord]]:
    """The same, and the workers that are lost."""

    async def ask(backend: Backend) -> tuple[list[WorkerRecord], list[WorkerRecord]]:
        return await backend.workers(), await backend.lost_workers()

    return ask_backend(settings, ask) or ([], [])
