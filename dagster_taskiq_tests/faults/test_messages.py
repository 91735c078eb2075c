"""Messages that a worker cannot do anything with: a word to who waits, else refused and counted.

The embedded server has the same broker as Redis.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from taskiq import BrokerMessage

from dagster_taskiq.brokers import open_broker
from dagster_taskiq.messages.envelope import PROTOCOL, QueueKind, physical_queue
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq_tests.acceptance.harness import BrokerKind, Stack, open_stack, until
from dagster_taskiq_tests.acceptance.test_queues_and_priority import taken_by
from dagster_taskiq_tests.acceptance.test_worker import GARBAGE
from dagster_taskiq_tests.faults.checks import (
    LONG_SECONDS,
    TEST_SECONDS,
    check_each_once,
    fatal_worker,
    start,
)
from dagster_taskiq_tests.faults.jobs import VARIED_STEPS
from dagster_taskiq_tests.messages import STEP_TASK

pytestmark = pytest.mark.timeout(TEST_SECONDS)

FORGED_COUNT = 1000


def forgeries(queue: str) -> list[bytes]:
    """A real message cut short at some places, and all that is no task."""
    whole = STEP_TASK.to_message(queue, Signer()).message
    cuts = [whole[: len(whole) * number // 10] for number in range(1, 10)]
    return list(itertools.islice(itertools.cycle([*GARBAGE, *cuts]), FORGED_COUNT))


async def send_forgeries(stack: Stack) -> None:
    """Put them all into the default queue, before whatever else waits there."""
    assert stack.broker is not None
    # a loaded machine may take its time for a thousand
    broker = open_broker(replace(stack.broker, connect_timeout_seconds=60))
    await broker.startup()
    queue = physical_queue(stack.prefix, QueueKind.STEPS, "dagster")
    labels = {"queue_name": queue, "priority": 10}
    try:
        await broker.kick_many(
            [
                BrokerMessage(task_id=f"f{n}", task_name="x", message=data, labels=labels)
                for n, data in enumerate(forgeries(queue))
            ]
        )
    finally:
        await broker.shutdown()


@pytest.mark.parametrize("kind", ["redis", "rabbitmq"])
def test_a_thousand_forged_messages(kind: BrokerKind, tmp_path: Path) -> None:
    """All are refused, acked and counted, and the worker goes on with all its slots.

    There are a thousand before the worker's first step, and another thousand while both its slots
    are held.
    """
    with open_stack(kind, tmp_path) as stack:
        asyncio.run(send_forgeries(stack))
        run = start(stack, "varied")
        run.await_message("Sending step")
        stack.worker(slots=2).await_ready()
        until(lambda: stack.refused_count() == FORGED_COUNT, "all are refused", LONG_SECONDS)
        run.await_notes("ran", 3)
        asyncio.run(send_forgeries(stack))
        run.open_gate()
        check_each_once(run.wait(LONG_SECONDS), VARIED_STEPS)
        until(lambda: stack.refused_count() == 2 * FORGED_COUNT, "all are refused", LONG_SECONDS)
        assert asyncio.run(stack.depth("dagster")) == 0


def test_a_worker_of_another_version(stack: Stack) -> None:
    """It leaves the steps to a worker that can execute them; the log says why they wait."""
    fatal_worker(stack, "other protocol", slots=2).await_ready()
    run = start(stack, "varied")
    said = run.await_message("can execute tasks of this version")
    assert f"protocol {PROTOCOL}:" in said
    assert f"protocol {PROTOCOL + 1})" in said
    right = stack.worker(slots=2)
    right.await_ready()
    run.open_gate()
    check_each_once(run.wait(LONG_SECONDS), VARIED_STEPS)
    assert {worker for worker, _ in taken_by(run).values()} == {right.full_name}
