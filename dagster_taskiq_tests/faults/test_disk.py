"""The disk of the embedded server is full."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from dagster_taskiq_tests.acceptance.harness import open_stack, until
from dagster_taskiq_tests.faults.checks import (
    FAILURE,
    LONG_SECONDS,
    TEST_SECONDS,
    check_each_once,
    embedded_client,
    start,
)
from dagster_taskiq_tests.faults.jobs import VARIED_STEPS

pytestmark = pytest.mark.timeout(TEST_SECONDS)


@contextmanager
def small_disk(directory: Path, size_bytes: int) -> Iterator[None]:
    """Put a file system of its own there; skips where we may not."""
    directory.mkdir(mode=0o700)
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("Only root on Linux may mount a small disk for the embedded server.")
    options = f"size={size_bytes},mode=700"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "none", str(directory)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"No small disk can be mounted here: {mounted.stderr.strip()}.")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def fill(directory: Path) -> Path:
    """Use all the room that is left."""
    path = directory / "filler"
    with path.open("wb", buffering=0) as filler:
        try:
            while True:
                filler.write(b"x" * 4096)
        except OSError:
            return path


def test_the_disk_is_full(tmp_path: Path) -> None:
    """Worker and runs say so and wait; with room again all goes on, and nothing was lost.

    A run that begins meanwhile waits too, unless it has no patience. In the end the server is
    killed, and its file can be read: it was left whole.
    """
    with open_stack("embedded", tmp_path) as stack:
        directory = stack.home / "dagster_taskiq"
        with small_disk(directory, 4 << 20):
            worker = stack.worker(slots=2).await_ready()
            run = start(stack, "varied", lease_seconds=30)
            run.await_notes("ran", 3)
            filler = fill(directory)
            with embedded_client(stack) as client:
                until(lambda: _is_refused(client), "the server takes nothing")
                run.open_gate()
                run.await_notes("ended", 2)
                late = start(stack, "single", lease_seconds=30)
                hasty = start(stack, "single", lease_seconds=30, server_patience_seconds=0)
                worker.await_log("takes nothing now")
                assert "No space left on device" in worker.log
                assert "The run goes on when it is back." in late.await_message("takes nothing now")
                assert hasty.wait().status is FAILURE
                assert "takes nothing now" in hasty.output_of_process
                filler.unlink()
                until(lambda: not _is_refused(client), "the server takes something again")
                check_each_once(run.wait(LONG_SECONDS), VARIED_STEPS)
                check_each_once(late.wait(LONG_SECONDS), ["quick"])
                server = client.info("server")["process_id"]
            os.kill(server, signal.SIGKILL)
            check_each_once(start(stack, "single").wait(LONG_SECONDS), ["quick"])
            worker.terminate()
            assert worker.wait() == 0


def _is_refused(client: redis.Redis) -> bool:
    try:
        client.set("test-of-the-disk", "x" * 1000)
    except redis.RedisError:
        return True
    return False
