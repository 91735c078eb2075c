"""Whatever is done to the queue of a real server and to one in memory, they give the same answers.

What only time or a death shows (tasks of dead workers, outages, wake-ups) is in ``test_brokers``.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dagster_taskiq.brokers import Delivery, TaskBroker
from dagster_taskiq.brokers.base import Listener
from dagster_taskiq_tests.contract.broker_bench import (
    Harness,
    Kind,
    MemoryHarness,
    eventually,
    opened_harness,
    task,
)

T = TypeVar("T")

LISTENERS = st.integers(0, 1)
TASKS = st.sampled_from(["one", "two", "three", "four"])


class Side:
    """One of the two servers, with a sender and two listeners."""

    def __init__(self, harness: Harness, loop: asyncio.AbstractEventLoop) -> None:
        self.is_searchable = harness.is_searchable
        self._harness = harness
        self._loop = loop
        self._sender = harness.broker()
        self._opened: list[TaskBroker] = [self._sender]
        self.call(self._sender.startup())
        self._queue = ""
        self._listeners: Sequence[Listener] = ()
        self.in_hand: list[Delivery] = []

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(asyncio.wait_for(coroutine, 60))

    def begin(self) -> None:
        """Another example, on a queue of its own."""
        self.end()
        self._queue = self._harness.queue(uuid.uuid4().hex)
        brokers = [self._harness.broker(self._queue) for _ in range(2)]
        for broker in brokers:
            self.call(broker.startup())
        self._opened += brokers
        self._listeners = [broker.listener() for broker in brokers]

    def end(self) -> None:
        """Settle what is in hand and leave the queue."""
        for delivery in self.in_hand:
            self.call(delivery.ack())
        self.in_hand.clear()
        for broker in self._opened[1:]:
            self.call(broker.shutdown())
        del self._opened[1:]

    def close(self) -> None:
        self.end()
        self.call(self._sender.shutdown())

    def send(self, tasks: Sequence[tuple[str, int]]) -> None:
        messages = [task(self._queue, text, priority=priority) for text, priority in tasks]
        self.call(self._sender.kick_many(messages))

    def take(self, which: int) -> bytes | None:
        delivery = self.call(self._listeners[which].look())
        if delivery is None:
            return None
        self.in_hand.append(delivery)
        return delivery.data

    def ack(self, number: int) -> None:
        self.call(self.in_hand.pop(number % len(self.in_hand)).ack())

    def release(self, number: int) -> None:
        self.call(self.in_hand.pop(number % len(self.in_hand)).release())

    def withdraw(self, task_ids: Sequence[str]) -> set[str]:
        return self.call(self._sender.withdraw(self._queue, task_ids))

    def absent(self, task_ids: Sequence[str]) -> set[str]:
        return self.call(self._sender.absent(self._queue, task_ids))

    def depth(self) -> int:
        return self.call(self._sender.depth(self._queue))

    def await_depth(self, depth: int) -> None:
        """RabbitMQ confirms no release, so that it is seen on other channels a moment later."""

        async def is_reached() -> bool:
            return await self._sender.depth(self._queue) == depth

        self.call(eventually(is_reached))

    def peek(self) -> object:
        sender, queue = self._sender, self._queue
        ids = ("one", "two", "three", "four")
        return (
            self.call(sender.peek(queue, 3)),
            self.call(sender.by_priority(queue)),
            self.call(sender.places(queue, ids)),
        )


class Lockstep(RuleBasedStateMachine):
    sides: Sequence[Side]

    def both(self, act: Callable[[Side], object]) -> None:
        real, memory = [act(side) for side in self.sides]
        assert real == memory

    @initialize()
    def begin(self) -> None:
        for side in self.sides:
            side.begin()

    @rule(tasks=st.lists(st.tuples(TASKS, st.integers(0, 10)), min_size=1, max_size=3))
    def send(self, tasks: Sequence[tuple[str, int]]) -> None:
        self.both(lambda side: side.send(tasks))

    @rule(which=LISTENERS)
    def take(self, which: int) -> None:
        self.both(lambda side: side.take(which))

    @precondition(lambda self: self.sides[0].in_hand)
    @rule(number=st.integers(0, 9))
    def ack(self, number: int) -> None:
        self.both(lambda side: side.ack(number))

    @precondition(lambda self: self.sides[0].in_hand)
    @rule(number=st.integers(0, 9))
    def release(self, number: int) -> None:
        self.both(lambda side: side.release(number))

    @rule(task_ids=st.lists(TASKS, min_size=1, unique=True))
    def withdraw(self, task_ids: Sequence[str]) -> None:
        self.both(lambda side: side.withdraw(task_ids))

    @rule(task_ids=st.lists(TASKS, min_size=1, unique=True))
    def absent(self, task_ids: Sequence[str]) -> None:
        self.both(lambda side: side.absent(task_ids))

    @invariant()
    def they_have_the_same(self) -> None:
        real, memory = self.sides
        real.await_depth(memory.depth())
        self.both(Side.peek)

    def teardown(self) -> None:
        for side in self.sides:
            side.end()


@pytest.mark.parametrize("kind", ["redis", "valkey", "rabbitmq", "postgres"])
def test_a_queue_does_the_same_as_one_in_memory(kind: Kind) -> None:
    """Order, who gets what, what is sent again, released, withdrawn and missing."""
    compare_with_memory(kind)


def test_a_queue_that_is_read_from_floors_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each look begins at floors, and those are found anew before it."""
    module = "dagster_taskiq.brokers.postgresql_floors"
    monkeypatch.setattr(f"{module}._SLOW_SECONDS", -1.0)
    for seconds in ("_RAISE_SECONDS", "_SHORTEST_SECONDS", "_LONGEST_SECONDS"):
        monkeypatch.setattr(f"{module}.{seconds}", 0.0)
    compare_with_memory("postgres")


def compare_with_memory(kind: Kind) -> None:
    loop = asyncio.new_event_loop()
    with opened_harness(kind) as harness:
        memory = MemoryHarness(is_searchable=harness.is_searchable)
        sides = [Side(harness, loop), Side(memory, loop)]
        machine = type("LockstepHere", (Lockstep,), {"sides": sides})
        case = machine.TestCase  # type: ignore[attr-defined]
        case.settings = settings(
            max_examples=8,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        try:
            case("runTest").debug()
        finally:
            for side in sides:
                side.close()
            loop.close()
