"""The launcher's way to its servers where one of them is silent."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from dagster_taskiq.connections import Servers
from dagster_taskiq.errors import LauncherClosedError, ServerError, UnreachableServerError
from dagster_taskiq.launch import run_client
from dagster_taskiq.launch.background import Background
from dagster_taskiq.launch.run_client import RunClient
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.servers.kinds import ServerOptions

SECONDS = 30.0


class FakeServer:
    """A broker and backend; from the second time on it answers when a test lets it."""

    def __init__(self) -> None:
        self.tries = 0
        self.answer = threading.Event()
        self.error: ServerError | None = None

    async def startup(self) -> None: ...

    async def shutdown(self) -> None: ...

    async def epoch(self) -> None:
        await self.inspect()

    async def inspect(self, *_: Any) -> None:
        self.tries += 1
        if self.tries > 1:
            await asyncio.to_thread(self.answer.wait, SECONDS)
        if self.error:
            raise self.error

    async def depth(self, _: str) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    server = FakeServer()
    server.error = UnreachableServerError("redis://fake", "Cannot reach redis://fake.")
    monkeypatch.setattr(run_client, "open_broker", lambda _: server)
    monkeypatch.setattr(run_client, "open_backend", lambda *_: server)
    monkeypatch.setattr(run_client, "_LOOK_SECONDS", 0.005)
    return server


@pytest.fixture
def client(server: FakeServer) -> Iterator[RunClient]:
    options = ServerOptions("redis://fake")
    background = Background()
    client = RunClient(Servers(options, options, Signer([])), background)
    yield client
    background.close()
    server.answer.set()
    client.close()


def test_launches_wait_for_a_silent_server_once(
    client: RunClient, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next ones fail with the same words, though the server would keep them, until it is back.

    The first try of the server fails here as if it had taken long; each later one hangs.
    """
    monkeypatch.setattr(run_client, "_SILENT_SECONDS", 0.0)
    for _ in range(3):
        with pytest.raises(UnreachableServerError, match="Cannot reach redis://fake"):
            client.reach("queue")
    assert server.tries <= 2
    server.error = None
    server.answer.set()
    until_it_reaches(client)


def test_questions_and_cancels_do_not_wait_for_a_silent_server_either(
    client: RunClient, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run monitoring asks for the health of one run after the other."""
    monkeypatch.setattr(run_client, "_SILENT_SECONDS", 0.0)
    calls = (
        lambda: client.look("run", "task"),
        lambda: client.state_of("run", "task"),
        lambda: client.cancel("run", "task", "queue", "why"),
        client.queue_waits,
    )
    for call in calls:
        with pytest.raises(UnreachableServerError, match="Cannot reach redis://fake"):
            call()
    assert server.tries <= 2


def test_a_server_that_refuses_connections_is_asked_each_time(
    client: RunClient, server: FakeServer
) -> None:
    """It keeps nobody waiting, and the first launch after its return succeeds."""
    server.answer.set()
    for tries in range(1, 4):
        with pytest.raises(UnreachableServerError):
            client.reach("queue")
        assert server.tries == tries
    server.error = None
    client.reach("queue")


def test_a_launcher_that_has_ended_reaches_no_server(server: FakeServer) -> None:
    """Nor does it connect anew, whether it had ever been connected or not."""
    server.error = None
    server.answer.set()
    for is_connected in (True, False):
        options = ServerOptions("redis://fake")
        background = Background()
        client = RunClient(Servers(options, options, Signer([])), background)
        if is_connected:
            client.reach("queue")
        background.close()
        client.close()
        tries = server.tries
        with pytest.raises(LauncherClosedError):
            client.reach("queue")
        assert server.tries == tries


def until_it_reaches(client: RunClient) -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            return client.reach("queue")
        except UnreachableServerError:
            assert time.monotonic() < deadline
            time.sleep(0.005)
