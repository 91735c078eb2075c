"""The DAGSTER_HOME of a command and of all that it starts."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dagster_taskiq.servers.embedded.server import embedded_directory, release_embedded_server

#: How long the embedded server may take to stop.
SERVER_STOP_SECONDS = 15.0

#: Pause between two looks at a keeper that is to end.
_LOOK_SECONDS = 0.02


@contextmanager
def dagster_home(home: Path, server_stop_seconds: float = SERVER_STOP_SECONDS) -> Iterator[None]:
    """Make a directory the DAGSTER_HOME of this process and of those that it starts.

    At the end its embedded server is not used by this process any more.

    Args:
        server_stop_seconds: how long to wait for that server's end, which does not come while
            others use it.
    """
    before = os.environ.get("DAGSTER_HOME")
    os.environ["DAGSTER_HOME"] = str(home)
    try:
        yield
    finally:
        if before is None:
            del os.environ["DAGSTER_HOME"]
        else:
            os.environ["DAGSTER_HOME"] = before
        release_embedded_server(home)
        _wait_for_end_of_server(home, server_stop_seconds)


def _wait_for_end_of_server(home: Path, seconds: float) -> None:
    """Return when the embedded server's keeper has ended, or after that time."""
    path = embedded_directory(home) / "keeper.lock"
    if not path.exists():
        return
    deadline = time.monotonic() + seconds
    with path.open("rb") as lock:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_LOOK_SECONDS)
            else:
                return
