"""The backend forgets, in the middle of a run: its epoch changes, and nothing runs twice."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from dagster_taskiq_tests.acceptance.harness import BrokerKind, Run, Stack, open_stack, until
from dagster_taskiq_tests.faults.checks import LONG_SECONDS, check_each_once, embedded_client, start
from dagster_taskiq_tests.faults.jobs import VARIED_STEPS
from dagster_taskiq_tests.servers import PrivateRedis, private_redis

#: A server that keeps nothing by itself, only what it is told to save.
_SNAPSHOTS = {"appendonly": "no", "save": ""}


@contextmanager
def open_private_stack(kind: BrokerKind, directory: Path) -> Iterator[tuple[Stack, PrivateRedis]]:
    """A stack whose backend, and broker if that is Redis, is a server of its own."""
    directory.mkdir()
    with private_redis(settings=_SNAPSHOTS) as server, open_stack(kind, directory) as stack:
        options = server.options
        if kind == "redis":
            stack.broker = options
        else:
            assert stack.broker is not None
            stack.backend = options
        yield stack, server


def flush(server: PrivateRedis) -> None:
    with server.client() as client:
        client.flushall()


def go_back(server: PrivateRedis) -> None:
    """Lose all since the last snapshot."""
    server.kill()
    server.restart()


def replace_by_empty(server: PrivateRedis) -> None:
    server.kill()
    for path in server.directory.glob("*.rdb"):
        path.unlink()
    shutil.rmtree(server.directory / "appendonlydir", ignore_errors=True)
    server.restart()


FAULTS: tuple[Callable[[PrivateRedis], None], ...] = (flush, go_back, replace_by_empty)


def begin(stack: Stack, server: PrivateRedis) -> Run:
    """A ``varied`` with something done, two steps running, three queued, and one to come.

    The snapshot is from before any of it: the first step waits in the queue there.
    """
    run = start(stack, "varied")
    run.await_message("Sending step")
    with server.client() as client:
        until(lambda: client.keys("*"), "the run is on the server")
        client.save()
    stack.worker(slots=2).await_ready()
    run.await_notes("ran", 3)
    return run


@pytest.mark.parametrize("kind", ["redis", "rabbitmq"])
def test_the_backend_forgets(kind: BrokerKind, tmp_path: Path) -> None:
    """Flushed, gone back to a snapshot, or replaced by an empty one: each attempt runs once.

    What runs goes on, what was queued on the server is sent again, and what an old snapshot has
    brought back is dropped.
    """
    with ExitStack() as exits:
        runs = []
        for fault in FAULTS:
            entered = open_private_stack(kind, tmp_path / fault.__name__)
            stack, server = exits.enter_context(entered)
            runs.append((fault, server, begin(stack, server)))
        for fault, server, _ in runs:
            fault(server)
        for _, _, run in runs:
            until(lambda: "restarted or emptied" in run.output_of_process, "the run has noticed")  # noqa: B023
            run.open_gate()
        for _, _, run in runs:
            check_each_once(run.wait(LONG_SECONDS), VARIED_STEPS)


def test_the_embedded_server_forgets(tmp_path: Path) -> None:
    """The same where nobody but us can flush it."""
    with open_stack("embedded", tmp_path) as stack:
        stack.worker(slots=2).await_ready()
        run = start(stack, "varied")
        run.await_notes("ran", 3)
        with embedded_client(stack) as client:
            client.flushall()
        until(lambda: "restarted or emptied" in run.output_of_process, "the run has noticed")
        run.open_gate()
        check_each_once(run.wait(LONG_SECONDS), VARIED_STEPS)
