"""A signing key: what has no signature of it is not executed, not obeyed and not believed."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import yaml
from dagster import DagsterInstance, DagsterRunStatus
from taskiq import BrokerMessage

from dagster_taskiq.brokers import open_broker
from dagster_taskiq.defaults import SIGNING_KEY_VARIABLE
from dagster_taskiq.messages.control import cancel_order, worker_order
from dagster_taskiq.messages.envelope import QueueKind, physical_queue, step_task_id
from dagster_taskiq.messages.results import Outcome, Place, TaskResult
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq_tests.acceptance.harness import (
    DAGSTER_YAML,
    PATIENCE_SECONDS,
    BrokerKind,
    Run,
    Stack,
    WorkerProcess,
    open_stack,
    until,
)
from dagster_taskiq_tests.acceptance.test_launcher import launch
from dagster_taskiq_tests.messages import STEP_TASK

KEY, OTHER_KEY = "key-of-the-deployment-" + "k" * 32, "key-of-somebody-else--" + "o" * 32
WITH_KEY = {SIGNING_KEY_VARIABLE: KEY}

LEASE_SECONDS = 3.0


@contextmanager
def open_signed_stack(kind: BrokerKind, directory: Path) -> Iterator[Stack]:
    """A stack whose launcher has the key, and so has the environment of its commands."""
    with open_stack(kind, directory) as stack:
        launcher = {
            "module": "dagster_taskiq.launcher",
            "class": "TaskiqRunLauncher",
            "config": {**stack.config, "signing_key": {"env": SIGNING_KEY_VARIABLE}},
        }
        settings = {**DAGSTER_YAML, "run_launcher": launcher}
        (stack.home / "dagster.yaml").write_text(yaml.safe_dump(settings))
        stack.instance = DagsterInstance.from_config(str(stack.home))
        stack.exit_stack.callback(stack.instance.dispose)
        # not for longer: what the tests start later must not inherit it
        with mock.patch.dict(os.environ, WITH_KEY):
            assert stack.instance.run_launcher
        yield stack


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack on Redis with a worker that has the key."""
    with open_signed_stack("redis", tmp_path_factory.mktemp("signed")) as stack:
        stack.worker(name="signing", environment=WITH_KEY).await_ready()
        yield stack


def record_of(stack: Stack, name: str = "signing") -> Any:
    return next(it for it in stack.worker_records() if it.name.startswith(f"{name}@"))


def await_refusals(stack: Stack, before: int, count: int) -> None:
    """Wait until the worker says that it has refused so many more."""
    until(lambda: record_of(stack).refused >= before + count, f"{count} are refused")


# --- with the key on both sides ---


@pytest.mark.parametrize("kind", ["redis", "rabbitmq"])
def test_everything_works_with_a_key(kind: BrokerKind, tmp_path: Path) -> None:
    """Runs, launched runs, cancels and orders; and the steps cannot read the key.

    The key is in no message or key on the servers either.
    """
    with open_signed_stack(kind, tmp_path) as stack:
        worker = stack.worker(name="signing", environment=WITH_KEY, is_fresh=True).await_ready()
        assert stack.run("diamond", environment=WITH_KEY).is_success
        told = stack.run("telling", environment=WITH_KEY)
        (can_read,) = told.await_notes("can read")
        assert KEY not in "".join(can_read.more["texts"])
        assert launch(stack, "single").wait().is_success
        run = stack.start("one_to_cancel", environment=WITH_KEY)
        run.await_notes("started")
        run.signal()
        run.wait()
        run.await_notes("cleaned")
        with stack.redis() as client:
            for key in client.scan_iter(f"*{stack.prefix}*"):
                assert KEY.encode() not in client.dump(key)
        assert record_of(stack).refused == 0
        file = stack.settings_file(signing_key=[OTHER_KEY, KEY])
        denied = stack.try_cli("worker", "terminate", "signing", "-y", str(file))
        assert denied.returncode == 1
        assert "signed with another signing_key" in denied.stderr
        file = stack.settings_file(signing_key=[KEY, OTHER_KEY])
        stack.cli("worker", "terminate", "signing", "-y", str(file))
        assert worker.wait() == 0
        assert KEY not in worker.log


# --- what is forged ---


def forged_tasks(prefix: str) -> list[bytes]:
    """A task that would run, unsigned, signed with another key, and signed for another queue."""
    signers = [Signer(), Signer([OTHER_KEY], prefix), Signer([KEY], "another deployment")]
    messages = [STEP_TASK.to_message("q", signer) for signer in signers]
    elsewhere = replace(STEP_TASK, queue="another-queue").to_message("q", Signer([KEY], prefix))
    return [message.message for message in [*messages, elsewhere]]


def test_a_thousand_forged_tasks(signed: Stack) -> None:
    """They are refused and acked, and said a few times; the worker goes on at full width."""
    before = record_of(signed).refused
    assert signed.broker is not None
    queue = physical_queue(signed.prefix, QueueKind.STEPS, "dagster")
    forged = forged_tasks(signed.prefix)

    async def send() -> None:
        assert signed.broker is not None
        broker = open_broker(signed.broker)
        await broker.startup()
        labels = {"queue_name": queue, "priority": 9}
        messages = [
            BrokerMessage(
                task_id=f"{number}", task_name="x", message=forged[number % 4], labels=labels
            )
            for number in range(1000)
        ]
        await broker.kick_many(messages)
        await broker.shutdown()

    asyncio.run(send())
    runs = [signed.start("one_gated", environment=WITH_KEY) for _ in range(2)]
    for run in runs:
        run.await_notes("started")  # at once, in both slots
    for run in runs:
        run.open_gate()
        assert run.wait().is_success
    await_refusals(signed, before, 1000)
    assert record_of(signed).refused == before + 1000
    listed = signed.cli("worker", "list", "-y", str(signed.settings_file()))
    assert str(before + 1000) in listed
    assert asyncio.run(signed.depth("dagster")) == 0


def test_a_forged_order_is_not_obeyed(signed: Stack) -> None:
    """Unsigned, with another key, for another worker, or garbage: the worker works on."""
    record = record_of(signed)
    orders = [
        worker_order(Signer(), record, "terminate"),
        worker_order(Signer([OTHER_KEY], signed.prefix), record, "terminate"),
        worker_order(
            Signer([KEY], signed.prefix), replace(record, worker_id="another"), "terminate"
        ),
        # as a record would have it that lies about its name
        worker_order(Signer([KEY], signed.prefix), replace(record, name="another@h"), "terminate"),
        "garbage",
        "[" * 100_000,
    ]
    with signed.redis() as client:
        client.rpush(f"{signed.prefix}:control:{record.worker_id}", *orders)
    await_refusals(signed, record.refused, len(orders))
    assert record_of(signed).state == "running"


def test_a_forged_cancel_or_result_ends_no_step(signed: Stack) -> None:
    """Neither by the mailbox of the worker nor by the record of the run nor by a result."""
    run = signed.start("one_gated", environment=WITH_KEY, lease_seconds=LEASE_SECONDS)
    (started,) = run.await_notes("started")
    record = record_of(signed)
    task_id = step_task_id(run.run_id, started.step, 1)
    order = cancel_order(Signer([OTHER_KEY], signed.prefix), task_id, "enough")
    place = Place("w", "w", "h", 1, 1)
    forged = TaskResult(Outcome.FINISHED, place).to_bytes(Signer(), task_id)
    with signed.redis() as client:
        client.rpush(f"{signed.prefix}:control:{record.worker_id}", order)
        client.hset(f"{signed.prefix}:run:{run.run_id}", f"c:{task_id}", order)
        client.set(f"{signed.prefix}:result:{task_id}", forged)
        client.rpush(f"{signed.prefix}:run:{run.run_id}:mailbox", task_id)
        until(lambda: not client.exists(f"{signed.prefix}:result:{task_id}"), "it is dropped")
    await_refusals(signed, record.refused, 2)  # the record's order counts once
    time.sleep(LEASE_SECONDS / 2)  # some renewals more, each of which finds the order
    assert record_of(signed).refused == record.refused + 2
    run.open_gate()
    assert run.wait().is_success
    assert len(run.notes("started")) == 1
    assert "it is not signed" in run.output_of_process


def test_a_forged_result_of_a_finished_step_gives_way_to_the_log(signed: Stack) -> None:
    """Whoever replaces a stored result does not decide what came of the step."""
    run = signed.start("one_gated", environment=WITH_KEY, lease_seconds=LEASE_SECONDS)
    (started,) = run.await_notes("started")
    task_id = step_task_id(run.run_id, started.step, 1)
    run.signal(signal.SIGSTOP)
    try:
        run.open_gate()
        key = f"{signed.prefix}:result:{task_id}"
        with signed.redis() as client:
            until(lambda: client.exists(key), "the step has its result")
            stored = cast("bytes", client.get(key))
            assert b'"reason": ""' in stored
            client.set(key, stored.replace(b'"reason": ""', b'"reason": "forged"'))
    finally:
        run.signal(signal.SIGCONT)
    assert run.wait().is_success
    assert "another signing_key, or for something else" in run.output_of_process


# --- what is genuine, and sent a second time ---


def captured_task(stack: Stack, pid: int, start: Callable[[], Run]) -> tuple[Run, BrokerMessage]:
    """A run that waits at the gate of its step, and the message of that step."""
    assert stack.broker is not None
    queue = physical_queue(stack.prefix, QueueKind.STEPS, "dagster")

    async def take() -> bytes:
        assert stack.broker is not None
        broker = open_broker(stack.broker, [queue])
        await broker.startup()
        async with aclosing(broker.deliveries()) as deliveries:
            delivery = await asyncio.wait_for(anext(deliveries), PATIENCE_SECONDS)
            await delivery.release()
        await broker.shutdown()
        return delivery.data

    os.kill(pid, signal.SIGSTOP)
    try:
        run = start()
        data = asyncio.run(take())
    finally:
        os.kill(pid, signal.SIGCONT)
    (started,) = run.await_notes("started")
    labels = {"queue_name": queue, "priority": 9}
    task_id = step_task_id(run.run_id, started.step, 1)
    return run, BrokerMessage(task_id=task_id, task_name="x", message=data, labels=labels)


def test_a_captured_step_is_not_executed_again(signed: Stack) -> None:
    """Nobody who deletes its claim and sends its task again gets it executed beside itself.

    The deletion stops the step; its end is that of a step whose lease is lost, not the copy's.
    """
    record = record_of(signed)
    run, message = captured_task(
        signed,
        record.pid,
        lambda: signed.start("one_gated", environment=WITH_KEY, lease_seconds=LEASE_SECONDS),
    )

    async def send() -> None:
        assert signed.broker is not None
        broker = open_broker(signed.broker)
        await broker.startup()
        await broker.kick(message)
        await broker.shutdown()

    with signed.redis() as client:
        client.delete(f"{signed.prefix}:claim:{message.task_id}")
        client.hdel(f"{signed.prefix}:run:{run.run_id}", f"t:{message.task_id}")
    asyncio.run(send())
    await_refusals(signed, record.refused, 1)
    assert run.wait().status is DagsterRunStatus.FAILURE
    assert len(run.notes("started")) == 1
    begun = [text for text in run.messages("gated") if "Executing step" in text]
    assert len(begun) == 1
    assert run.kinds("gated") == ["START", "FAILURE"]


# --- a key on one side only ---


def test_a_run_without_the_key_says_why_it_waits(signed: Stack) -> None:
    """Its log names the worker and what to set; so does the worker's, and nothing is executed."""
    before = record_of(signed).refused
    run = signed.start("diamond", lease_seconds=LEASE_SECONDS)
    said = run.await_message("refuses it, since it is not signed")
    assert "Worker signing@" in said
    assert SIGNING_KEY_VARIABLE in said
    await_refusals(signed, before, 1)
    run.signal()
    run.wait()
    assert run.status is DagsterRunStatus.FAILURE
    assert not run.notes()


def test_a_launched_run_of_another_key_says_why_it_waits(signed: Stack) -> None:
    """In its log, from the start."""
    with ExitStack() as stack:
        worker = signed.worker(
            "--run-slots", "1", slots=0, name="other", queues=["other"],
            environment={SIGNING_KEY_VARIABLE: OTHER_KEY},
        )  # fmt: skip
        stack.callback(worker.close)
        worker.await_ready()
        run = launch(signed, "single", tags={"dagster-taskiq/queue": "other"})
        said = run.await_message("Sent the run to queue")
        assert "It waits. Worker other@" in said
        assert "signed with another signing_key" in said
        worker.await_log("signature was made with another signing_key")
        assert run.terminate()
    assert run.status is DagsterRunStatus.CANCELED


def test_a_worker_without_the_key_takes_signed_tasks(tmp_path: Path) -> None:
    """It ignores signatures; the run refuses its results, and reads in Dagster's log what came."""
    with open_stack("redis", tmp_path) as stack:
        worker: WorkerProcess = stack.worker().await_ready()
        run = stack.run("diamond", environment=WITH_KEY)
        assert run.is_success
        assert "Refused a result" in run.output_of_process
        assert "set the same where it comes from" in run.output_of_process
        assert run.output_of_process.count("Refused a result") == 1
        assert "need no signature" in worker.log
