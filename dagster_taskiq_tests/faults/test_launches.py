"""A worker ends with a launched run that has hardly begun: the run goes on elsewhere, once."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import aio_pika
import pytest
from dagster import DagsterEventType

from dagster_taskiq.launch import launch_watch
from dagster_taskiq.messages.envelope import QueueKind, physical_queue
from dagster_taskiq.servers.embedded.server import release_embedded_server
from dagster_taskiq.servers.postgresql_schema import schema_name
from dagster_taskiq.tags import QUEUE_TAG
from dagster_taskiq_tests.acceptance.harness import BrokerKind, Stack
from dagster_taskiq_tests.acceptance.launched import launch, open_launching_stack
from dagster_taskiq_tests.faults import FAULT_VARIABLE
from dagster_taskiq_tests.faults.checks import (
    LONG_SECONDS,
    TEST_SECONDS,
    embedded_client,
    fatal_worker,
)
from dagster_taskiq_tests.server_nodes import execute_sql

pytestmark = pytest.mark.timeout(TEST_SECONDS)

#: Where a worker can die before its run has begun: when it has taken the message, when it has
#: claimed the run, when its child is about to get it, and while the child loads the run's code.
BEFORE_BEGIN = ("taken", "claimed", "acked", "loading")


@pytest.mark.parametrize("kind", ["redis", "rabbitmq", "postgres"])
def test_a_worker_is_killed_with_a_launched_run(kind: BrokerKind, tmp_path: Path) -> None:
    """Before the run has begun another worker starts it, though nobody looks after it.

    Once Dagster's log has its start, it is resumed as any run is whose worker is dead, also if
    the worker could not tell anybody any more that it had begun.
    """
    with open_launching_stack(kind, tmp_path, resumes=1) as stack:
        points = (*BEFORE_BEGIN, "begun")
        victims = {
            # which has not given the task to a child while a template loads its code
            point: fatal_worker(
                stack, point, "--run-slots", "1", "--no-warm-code", slots=0, queues=[point]
            )
            for point in points
        }
        runs = {
            point: launch(stack, "loads_slowly", tags={QUEUE_TAG: point}) for point in BEFORE_BEGIN
        }
        begun = launch(stack, "gated_then_more", tags={QUEUE_TAG: "begun"})
        for victim in victims.values():
            assert victim.wait(LONG_SECONDS) == -signal.SIGKILL, victim.log
        heir = stack.worker("--run-slots", "2", queues=["dagster", *points]).await_ready()
        for point, run in runs.items():
            assert run.wait(LONG_SECONDS).is_success, point
            assert len(run.notes("ran")) == len(run.events(DagsterEventType.RUN_START)) == 1
        heir.await_log(f"Run {begun.run_id} is STARTED: it is not started any more.")
        begun.monitor()
        begun.open_gate()
        assert begun.wait(LONG_SECONDS).is_success
        assert len(begun.events(DagsterEventType.RUN_START)) == 1
        assert len(begun.notes("started")) == len(begun.notes("ran")) == 1


@pytest.mark.parametrize("options", [[], ["--no-warm-code"]], ids=["warm", "cold"])
def test_a_worker_is_stopped_with_a_launched_run(options: list[str], tmp_path: Path) -> None:
    """A second SIGTERM while a run's code loads does not fail the run: another worker starts it."""
    with open_launching_stack("redis", tmp_path) as stack:
        leaver = stack.worker("--run-slots", "1", *options, environment={FAULT_VARIABLE: "loading"})
        run = launch(stack, "loads_slowly")
        leaver.await_log(f"Run {run.run_id}: starting in slot")
        leaver.terminate()
        leaver.await_log("Stopping: no new tasks")
        leaver.terminate()
        assert leaver.wait(LONG_SECONDS) != 0
        stack.worker("--run-slots", "1").await_ready()
        assert run.wait(LONG_SECONDS).is_success
        assert len(run.notes("ran")) == len(run.events(DagsterEventType.RUN_START)) == 1


def test_a_launched_run_of_another_protocol(tmp_path: Path) -> None:
    """It waits for a worker that can execute it, and its log says so from the start."""
    with open_launching_stack("redis", tmp_path) as stack:
        fatal_worker(stack, "other protocol", "--run-slots", "1").await_ready()
        run = launch(stack, "in_process_single")
        said = run.await_message("Sent the run to queue")
        assert "can execute tasks of this version" in said
        assert "protocol 3)" in run.debug_info()
        stack.worker("--run-slots", "1").await_ready()
        assert run.wait(LONG_SECONDS).is_success
        assert len(run.notes("ran")) == 1


@pytest.mark.parametrize("kind", ["embedded", "rabbitmq", "postgres"])
def test_a_server_loses_launched_runs(
    kind: BrokerKind,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """A run whose message is lost before a worker has it is sent again, and executed once."""
    monkeypatch.setattr(launch_watch, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(launch_watch, "IN_HAND_SECONDS", 0.5)
    with open_launching_stack(kind, tmp_path) as stack:
        monkeypatch.setenv("DAGSTER_HOME", str(stack.home))  # where the embedded server lives
        request.addfinalizer(lambda: release_embedded_server(stack.home))
        runs = [launch(stack, "in_process_single") for _ in range(3)]
        _lose_everything(stack)
        for run in runs:
            run.await_message("No server knew of the run any more")
        stack.worker("--run-slots", "2").await_ready()
        for run in runs:
            assert run.wait(LONG_SECONDS).is_success
            assert len(run.notes("ran")) == len(run.events(DagsterEventType.RUN_START)) == 1


def _lose_everything(stack: Stack) -> None:
    if stack.broker is None:
        with embedded_client(stack) as client:
            client.flushall()
        return
    if stack.backend is None:
        schema = schema_name(stack.broker.key_prefix)
        execute_sql(stack.broker.url, f'TRUNCATE "{schema}".messages')
        return
    queue = physical_queue(stack.backend.key_prefix, QueueKind.RUNS, "dagster")

    async def purge() -> None:
        async with await aio_pika.connect(stack.broker.url) as connection:
            channel = await connection.channel()
            await (await channel.get_queue(queue)).purge()

    asyncio.run(purge())
