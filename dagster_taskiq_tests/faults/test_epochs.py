"""The backend forgets, in the middle of a run: its epoch changes, and nothing runs twice."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from dagster_taskiq.defaults import RECONCILE_SECONDS
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq.servers.postgresql_schema import schema_name
from dagster_taskiq.tags import QUEUE_TAG
from dagster_taskiq_tests.acceptance.harness import BrokerKind, Run, Stack, open_stack, until
from dagster_taskiq_tests.acceptance.test_launcher import launch, open_launching_stack
from dagster_taskiq_tests.faults.checks import (
    LONG_SECONDS,
    TEST_SECONDS,
    check_each_once,
    embedded_client,
    start,
)
from dagster_taskiq_tests.faults.jobs import VARIED_STEPS
from dagster_taskiq_tests.server_nodes import PostgresNode, execute_sql
from dagster_taskiq_tests.servers import (
    PrivateRedis,
    amqp_options,
    crashable_postgres,
    private_redis,
    redis_options,
)

pytestmark = pytest.mark.timeout(TEST_SECONDS)

#: Longer than a worker is frozen here, also where the machine is loaded.
LONG_LEASE_SECONDS = 40.0

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


def serve(run: Run, server: PrivateRedis) -> None:
    """Save in a snapshot that the first step waits in the queue, and start a worker for it."""
    run.await_message("Sending step")
    with server.client() as client:
        until(lambda: client.keys("*"), "the run is on the server")
        client.save()
    run.stack.worker(slots=2)


@pytest.mark.parametrize("kind", ["redis", "rabbitmq"])
def test_the_backend_forgets(kind: BrokerKind, tmp_path: Path) -> None:
    """Flushed, gone back to a snapshot, or replaced by an empty one: each attempt runs once.

    What runs goes on, what was queued on the server is sent again, and what an old snapshot has
    brought back is dropped.
    """
    with ExitStack() as exits:
        parts = []
        for fault in FAULTS:
            entered = open_private_stack(kind, tmp_path / fault.__name__)
            stack, server = exits.enter_context(entered)
            parts.append((fault, server, start(stack, "varied")))
        for _, server, run in parts:
            serve(run, server)
        for _, _, run in parts:
            # something done, two steps running, three queued, and one to come
            run.await_notes("ran", 3, LONG_SECONDS)
        for fault, server, _ in parts:
            fault(server)
        for _, _, run in parts:
            until(lambda: "restarted or emptied" in run.output_of_process, "the run has noticed")  # noqa: B023
            run.open_gate()
        for _, _, run in parts:
            check_each_once(run.wait(LONG_SECONDS), VARIED_STEPS)


def crash(node: PostgresNode) -> None:
    """Lose what was committed asynchronously, as `pg_ctl stop -m immediate` does."""
    node.process.send_signal(signal.SIGQUIT)
    node.process.wait()
    node.restart()


def empty(node: PostgresNode, backend: ServerOptions) -> None:
    tables = [f'"{schema_name(backend.key_prefix)}".{name}' for name in ("runs", "tasks")]
    execute_sql(node.url, f"TRUNCATE {', '.join(tables)}")


def await_epochs(run: Run, count: int) -> None:
    until(
        lambda: run.output_of_process.count("what is missing there is judged") >= count,
        f"the run has noticed {count} of them",
    )


def test_a_postgresql_forgets(tmp_path: Path) -> None:
    """It crashes, and then its tables are emptied by hand: each attempt runs once.

    Beside each broker, whose messages know nothing of it.
    """
    with ExitStack() as exits:
        parts = []
        for options_of in (redis_options, amqp_options):
            broker = exits.enter_context(options_of())
            node, backend = exits.enter_context(crashable_postgres(broker.key_prefix))
            directory = tmp_path / options_of.__name__
            directory.mkdir()
            stack = exits.enter_context(open_stack("redis", directory))
            stack.broker, stack.backend = broker, backend
            stack.worker(slots=2).await_ready()
            parts.append((backend, start(stack, "varied")))
        for _, run in parts:
            run.await_notes("ran", 3, LONG_SECONDS)
        crash(node)
        for backend, run in parts:
            await_epochs(run, 1)
            empty(node, backend)
        for _, run in parts:
            await_epochs(run, 2)
            run.open_gate()
        for _, run in parts:
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


def test_a_run_is_resumed_when_its_backend_has_forgotten_it(tmp_path: Path) -> None:
    """The new loop does not send again what is running, though nobody has asserted that it is.

    The worker that runs it is frozen meanwhile, for less than its lease, and another one is idle.
    """
    with open_launching_stack("redis", tmp_path, resumes=1) as stack:
        stack.worker("--run-slots", "1", slots=0, queues=["runs"], name="runs")
        steps = ("--run-slots", "0")
        holder = stack.worker(*steps, slots=1, name="holder").await_ready()
        run = launch(
            stack, "gated_then_more", tags={QUEUE_TAG: "runs"}, lease_seconds=LONG_LEASE_SECONDS
        )
        run.await_notes("started")
        stack.worker(*steps, slots=1, name="idle").await_ready()
        holder.process.send_signal(signal.SIGSTOP)
        run.signal_process(signal.SIGKILL)
        run.await_death()
        with stack.redis() as client:
            client.delete(*client.scan_iter(f"{stack.prefix}*", count=1000))
        stack.instance.resume_run(run.run_id, cast("Any", None), attempt_number=1)
        run.await_message("Resumed the run; 1 steps")
        time.sleep(2 * RECONCILE_SECONDS)  # whoever thinks that the step is gone would send it
        holder.process.send_signal(signal.SIGCONT)
        run.open_gate()
        assert run.wait().is_success
        assert len(run.notes("started")) == len(run.notes("ran")) == 1
        assert [text for text in run.messages() if "again" in text] == []
