"""Servers are restarted in the middle of runs, and everybody finds them again."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest
from dagster import DagsterEventType, DagsterRunStatus
from dagster._core.launcher import WorkerStatus

from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq_tests.acceptance.harness import Run, Stack, open_stack, until
from dagster_taskiq_tests.acceptance.launched import launch, open_launching_stack
from dagster_taskiq_tests.faults.checks import (
    LONG_SECONDS,
    TEST_SECONDS,
    check_each_once,
    embedded_client,
    start,
)
from dagster_taskiq_tests.faults.jobs import MANY_STEPS, VARIED_STEPS
from dagster_taskiq_tests.servers import private_postgres, private_rabbitmq, private_redis

pytestmark = pytest.mark.timeout(TEST_SECONDS)

_STEP_START = DagsterEventType.STEP_START


def begin_many(stack: Stack) -> Run:
    """Four steps of ``many`` run, and two hundred wait behind them."""
    stack.worker(slots=4).await_ready()
    run = start(stack, "many")
    run.await_notes("ran", 4)
    assert {note.step for note in run.notes("ran")} == set(MANY_STEPS[:4])
    return run


def check_many(run: Run) -> None:
    """All have run once, the four that ran during the restart to their end."""
    run.open_gate()
    check_each_once(run.wait(2 * LONG_SECONDS), MANY_STEPS)
    assert len(run.notes("ended")) == 4


def test_redis_is_restarted(tmp_path: Path) -> None:
    """Killed and started again with its append-only file: 200 queued and 4 running run once."""
    with private_redis() as server, open_stack("redis", tmp_path) as stack:
        stack.broker = server.options
        run = begin_many(stack)
        server.kill()
        server.restart()
        check_many(run)


def test_rabbitmq_is_restarted(tmp_path: Path) -> None:
    """Stopped in order and started again with its disk: 200 queued and 4 running run once."""
    with (
        private_rabbitmq() as node,
        open_stack("rabbitmq", tmp_path) as stack,
    ):
        stack.broker = ServerOptions(url=node.url, key_prefix=stack.prefix)
        run = begin_many(stack)
        node.restart()
        check_many(run)


def test_the_embedded_server_is_restarted(tmp_path: Path) -> None:
    """Killed, and started again by its keeper: 200 queued and 4 running run once."""
    with open_stack("embedded", tmp_path) as stack:
        run = begin_many(stack)
        with embedded_client(stack) as client:
            server = psutil.Process(client.info("server")["process_id"])
        server.send_signal(signal.SIGKILL)
        check_many(run)


def test_postgresql_is_restarted(tmp_path: Path) -> None:
    """Dagster's storage goes away and comes back while steps run: children and loop reconnect.

    It has no part in how tasks travel, so one broker is enough. The steps write nothing just then,
    since Dagster itself would not survive that.
    """
    with private_postgres() as node:
        storage = {"storage": {"postgres": {"postgres_url": node.url}}}
        with open_stack("redis", tmp_path, dagster_yaml=storage) as stack:
            stack.worker(slots=2).await_ready()
            run = start(stack, "varied")
            run.await_notes("ran", 3)
            until(lambda: len(run.steps(_STEP_START)) == 3, "all has been written")
            node.restart()
            run.open_gate()
            check_each_once(run.wait(LONG_SECONDS), VARIED_STEPS)
            second = start(stack, "varied")
            second.open_gate()
            check_each_once(second.wait(LONG_SECONDS), VARIED_STEPS)


def test_the_only_server_crashes(tmp_path: Path) -> None:
    """Dagster's PostgreSQL, which is queue and state too: what waits is kept and runs once.

    Claims may be lost with it, so the loop waits for a lease before it goes by Dagster's log.
    """
    with private_postgres() as node:
        storage = {"storage": {"postgres": {"postgres_url": node.url}}}
        with open_stack("nothing", tmp_path, dagster_yaml=storage) as stack:
            worker = stack.worker(slots=2).await_ready()
            assert "No broker is set" in worker.log
            run = start(stack, "varied")
            run.await_notes("ran", 3)
            until(lambda: len(run.steps(_STEP_START)) == 3, "all has been written")
            node.kill()
            node.restart()
            run.open_gate()
            check_each_once(run.wait(LONG_SECONDS), VARIED_STEPS)


def test_postgresql_is_restarted_under_the_launcher(tmp_path: Path) -> None:
    """A launched run, its process and the launcher that is asked after it outlive the restart."""
    with private_postgres() as node:
        storage = {"storage": {"postgres": {"postgres_url": node.url}}}
        with open_launching_stack("redis", tmp_path, dagster_yaml=storage) as stack:
            stack.worker(slots=1).await_ready()
            run = launch(stack, "gated_then_more")
            run.await_notes("started")
            node.restart()
            assert run.health().status is WorkerStatus.RUNNING
            run.open_gate()
            assert run.wait().is_success
            again = launch(stack, "to_cancel")
            again.await_notes("started")
            node.restart()
            assert again.terminate() is True
            assert again.wait().status is DagsterRunStatus.CANCELED
