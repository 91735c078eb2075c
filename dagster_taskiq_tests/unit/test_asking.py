"""What commands learn of a backend that goes meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from dagster_taskiq.cli import asking
from dagster_taskiq.config.settings import Settings
from dagster_taskiq.connections import Servers
from dagster_taskiq.errors import UnreachableServerError
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.servers.kinds import ServerOptions


@pytest.fixture
def gone(tmp_path: Path) -> Servers:
    """An embedded server that nobody uses any more."""
    options = ServerOptions(f"unix://{tmp_path}/server.sock")
    return Servers(options, options, Signer(), tmp_path)


def test_an_embedded_server_that_stops_meanwhile_rests(
    gone: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for who asks a moment later: its last user, a worker, has ended."""
    found = iter([gone, None])
    monkeypatch.setattr(asking, "find_running_servers", lambda _: next(found))
    assert asking.ask_backend(Settings(), lambda backend: backend.workers()) is None


def test_a_server_that_cannot_be_reached_is_an_error(
    gone: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is still meant."""
    monkeypatch.setattr(asking, "find_running_servers", lambda _: gone)
    with pytest.raises(UnreachableServerError, match=r"server\.sock"):
        asking.ask_backend(Settings(), lambda backend: backend.workers())
