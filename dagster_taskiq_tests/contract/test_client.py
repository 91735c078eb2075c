"""What the execution loop's client sends is safe against what the server may have forgotten."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest
import redis

from dagster_taskiq.backend import TaskState, open_backend
from dagster_taskiq.connections import Servers
from dagster_taskiq.execution.event_batches import EventWriter
from dagster_taskiq.loop.client import Client
from dagster_taskiq.loop.dispatcher import StepTask
from dagster_taskiq.messages.envelope import Envelope, QueueKind, physical_queue
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.messages.withheld_steps import Withheld, WithheldGroup
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq_tests.servers import redis_options

TASK = StepTask("0c4d2a3e-5b7b-4b0e-8d3f-0d4c4d1f7a55", "step", 1, "queue", 5, dict)

PATIENCE_SECONDS = 20.0


class Bench:
    """A client, and the server's side of it."""

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self.client = Client(
            servers=Servers(options, options, Signer()),
            run_id="run",
            generation=0,
            is_resumable=False,
            lease_seconds=1.0,
            cancel_grace_seconds=1.0,
            events=EventWriter(),
        )
        self.client.open()

    def flush(self) -> None:
        """The server forgets everything, as FLUSHALL does; the client has noticed."""
        with redis.Redis.from_url(self.options.url) as server:
            keys = list(server.scan_iter(f"*{self.options.key_prefix}*", count=1000))
            server.delete(*keys)
        self.client.inspect([TASK])

    def held_back(self) -> Withheld:
        """What others see that the run holds back."""

        async def look() -> Withheld:
            backend = open_backend(self.options, Signer())
            try:
                return next((run.withheld for run in await backend.runs()), Withheld())
            finally:
                await backend.shutdown()

        return asyncio.run(look())

    def await_held_back(self, withheld: Withheld) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.held_back() != withheld:
            assert time.monotonic() < deadline, "what the run holds back is not told"
            time.sleep(0.05)

    def sent_in(self) -> str:
        """The epoch of the task that waits in the queue."""
        name = physical_queue(self.options.key_prefix, QueueKind.STEPS, TASK.queue)
        with redis.Redis.from_url(self.options.url) as server:
            (data,) = server.hvals(f"{name}:payloads")
        return Envelope.from_bytes(data, Signer()).epoch


@pytest.fixture
def bench() -> Iterator[Bench]:
    with redis_options() as options:
        bench = Bench(options)
        yield bench
        bench.client.close()


def test_a_repeated_submission_is_of_the_epoch_of_the_first(bench: Bench) -> None:
    """It may have arrived, and its claim been forgotten: a new epoch would have it run twice."""
    bench.client.submit([TASK])
    first = bench.sent_in()
    bench.flush()
    bench.client.submit([TASK])
    assert bench.sent_in() == first


def test_a_task_that_was_judged_is_sent_in_the_epoch_of_the_verdict(bench: Bench) -> None:
    """In that one nobody has it; if it is over by the time it is sent, nothing is known."""
    bench.client.submit([TASK])
    first = bench.sent_in()
    bench.flush()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not bench.client.inspect([TASK]).is_conclusive:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert bench.client.reopen(TASK.task_id)
    bench.client.submit([TASK])
    second = bench.sent_in()
    assert second != first
    bench.flush()
    bench.client.submit([TASK])
    assert bench.sent_in() == second


def test_what_is_acknowledged_is_not_remembered(bench: Bench) -> None:
    """A run of a million steps must not keep a word of each."""
    bench.client.submit([TASK])
    bench.client.acknowledge([TASK.task_id])
    assert bench.client._sent_in == {}


def test_a_cancel_is_no_proof_before_live_workers_have_asserted_their_claims(bench: Bench) -> None:
    """After a flush the server says of every task that it has never started."""
    assert bench.client.cancel([TASK], "enough") == {TASK.task_id: TaskState.CANCELLED}
    bench.flush()
    assert bench.client.cancel([TASK], "enough") == {TASK.task_id: TaskState.EXPIRED}
    deadline = time.monotonic() + PATIENCE_SECONDS
    while bench.client.cancel([TASK], "enough")[TASK.task_id] is TaskState.EXPIRED:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_is_held_back_is_told_until_the_run_ends() -> None:
    """Again to a server that has forgotten it, as soon as that knows the run."""
    withheld = Withheld((WithheldGroup("pool", "It is full.", (("step", 1.5),)),), 2)
    with redis_options() as options:
        bench = Bench(options)
        try:
            bench.client.note_withheld(withheld)
            bench.await_held_back(withheld)
            bench.flush()
            bench.await_held_back(withheld)
            bench.client.note_withheld(Withheld())
            bench.await_held_back(Withheld())
            bench.client.note_withheld(withheld)
            bench.await_held_back(withheld)
        finally:
            bench.client.close()
        assert bench.held_back() == Withheld()


def test_a_background_task_that_fails_ends_the_loop(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that nobody has thought of is raised in the loop, which would wait for ever."""

    async def fail(*_: object, **__: object) -> None:
        raise ValueError("nobody has thought of this")

    monkeypatch.setattr(bench.client._backend, "renew_run", fail)
    with pytest.raises(ValueError, match="nobody has thought of this"):
        bench.client.wait(PATIENCE_SECONDS)
