"""What orders change in a worker that lives: slots, queues, pauses. Only its processes are fake."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest

from dagster_taskiq.backend.memory import MemoryBackend, MemoryServer
from dagster_taskiq.brokers import Admission
from dagster_taskiq.brokers.memory import MemoryBroker, MemoryQueues
from dagster_taskiq.connections import Servers
from dagster_taskiq.errors import UnreachableServerError
from dagster_taskiq.messages.control import OrderKind
from dagster_taskiq.messages.envelope import Envelope, QueueKind, step_task_id
from dagster_taskiq.messages.queue_pauses import QueuePause
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.messages.worker_records import WorkerRecord
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq.steering.workers import answers_of, give_order
from dagster_taskiq.worker import steering
from dagster_taskiq.worker.child_messages import Executed
from dagster_taskiq.worker.options import WorkerOptions
from dagster_taskiq.worker.parts import WorkerParts
from dagster_taskiq.worker.worker import Worker
from dagster_taskiq_tests.messages import STEP_TASK
from dagster_taskiq_tests.unit.worker_stand_ins import FakeGuard, FakeSlot, finished

SECONDS = 30.0

#: How long what does not happen is waited for.
IN_VAIN_SECONDS = 0.3

PAUSE = QueuePause("dagster", "", 1.0, "h")


class Scene:
    """A worker with some slots on servers in memory; its steps end when they are let go."""

    def __init__(self, slots: int = 1, *queues: str) -> None:
        self.queues = MemoryQueues()
        self.backend = MemoryBackend(MemoryServer())
        self.sender = MemoryBroker(self.queues)
        options = ServerOptions("redis://nobody", key_prefix="p")
        self.servers = Servers(options, options, Signer())
        self.options = WorkerOptions("w", queues or ("dagster",), slots=slots)
        self.running: dict[str, asyncio.Event] = {}
        self.done: list[str] = []
        self.most = 0
        self.slots: list[FakeSlot] = []
        self.epoch = ""

    def worker(self, on_ready: Callable[[], None]) -> Worker:
        def open_broker(_kind: QueueKind, queues: Any, admission: Admission) -> MemoryBroker:
            return MemoryBroker(self.queues, queues, admission)

        def make_slot(options: Any, _observer: object) -> FakeSlot:
            slot = FakeSlot(options.child.slot)
            slot.act = self._act
            if slot.number:  # not the one that speaks with Dagster
                self.slots.append(slot)
            return slot

        parts = WorkerParts(self.backend, FakeGuard(), open_broker, make_slot)
        return Worker(self.servers, self.options, on_ready=on_ready, parts=parts)

    async def _act(self, _slot: FakeSlot, order: Any) -> Executed:
        key = order.payload
        self.running[key] = asyncio.Event()
        self.most = max(self.most, len(self.running))
        await self.running[key].wait()
        del self.running[key]
        self.done.append(key)
        return finished()

    async def send(self, *keys: str, queue: str = "dagster") -> None:
        for key in keys:
            task: Envelope = replace(
                STEP_TASK,
                task_id=step_task_id("run", key, 1),
                step_key=key,
                queue=queue,
                epoch=self.epoch,
                payload=key,
            )
            physical = self.servers.physical_queue(QueueKind.STEPS, queue)
            await self.sender.kick(task.to_message(physical, Signer()))

    def let_go(self, *keys: str) -> None:
        for key in keys or list(self.running):
            self.running[key].set()

    async def record(self) -> WorkerRecord:
        (record,) = await self.backend.workers()
        return record

    async def order(self, kind: str, **details: Any) -> WorkerRecord:
        """Have the worker obey; its record afterwards."""
        signer = self.servers.signer
        told = await give_order(self.backend, signer, [await self.record()], kind, **details)
        assert await answers_of(self.backend, told, SECONDS)
        return await self.record()


async def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.005)


def play(scene: Scene, scenario: Callable[[Scene], Coroutine[Any, Any, None]]) -> Scene:
    """Run a scenario beside the worker, let all its steps go, and drain it."""

    async def run() -> None:
        scene.epoch = await scene.backend.open_run(
            "run", generation=0, token="t", is_resumable=False, lease_seconds=600
        )
        ready = asyncio.Event()
        worker = scene.worker(ready.set)
        running = asyncio.create_task(worker.run())
        await asyncio.wait_for(ready.wait(), SECONDS)
        await asyncio.wait_for(scenario(scene), SECONDS)
        worker.drain()
        while not running.done():
            scene.let_go()
            await asyncio.sleep(0.005)
        assert await running

    asyncio.run(run())
    return scene


def test_slots_grow_and_shrink_and_no_step_is_lost() -> None:
    async def scenario(scene: Scene) -> None:
        await scene.send(*"abcdefg")
        await until(lambda: set(scene.running) == {"a"})
        grown = await scene.order(OrderKind.SLOTS, queue_kind="steps", slots=3)
        await until(lambda: set(scene.running) == set("abc"))
        assert (grown.slots, [slot.number for slot in scene.slots]) == (3, [1, 2, 3])
        shrunk = await scene.order(OrderKind.SLOTS, queue_kind="steps", slots=1)
        assert (shrunk.slots, shrunk.busy_slots) == (1, 3)
        for key in "abcdefg":
            await until(lambda key=key: key in scene.running)
            scene.let_go(key)
        await until(lambda: len(scene.done) == 7)

    scene = play(Scene(), scenario)
    assert scene.done == [*"abcdefg"]
    assert scene.most == 3


def test_the_last_order_for_slots_counts() -> None:
    """Also while the worker still waits for slots to become free for the one before."""

    async def scenario(scene: Scene) -> None:
        await scene.send(*"abcd")
        await until(lambda: len(scene.running) == 2)
        for count in (1, 2, 4):
            await scene.order(OrderKind.SLOTS, queue_kind="steps", slots=count)
        await until(lambda: len(scene.running) == 4)

    assert len({slot.number for slot in play(Scene(slots=2), scenario).slots}) == 4


@pytest.mark.parametrize("count", [0, -1, 10**6, "3", None])
def test_an_order_that_cannot_be_read_changes_nothing(
    count: object, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(scene: Scene) -> None:
        signer = scene.servers.signer
        records = [await scene.record()]
        unreadable = {"queue_kind": "steps", "slots": count}
        told = await give_order(scene.backend, signer, records, OrderKind.SLOTS, **unreadable)
        record = await scene.order(OrderKind.PING)  # obeyed after it
        assert (record.slots, record.refused) == (1, 1)
        assert not set(told.ping_ids.values()) & set((await scene.record()).pings)

    play(Scene(), scenario)
    assert "it names no number of slots between 1 and 1000" in caplog.text


def test_a_paused_worker_takes_nothing_until_it_is_resumed() -> None:
    async def scenario(scene: Scene) -> None:
        await scene.send("a")
        await until(lambda: "a" in scene.running)
        paused = await scene.order(OrderKind.PAUSE, reason="the disk\x1b is full")
        assert (paused.state, paused.busy_slots) == ("paused", 1)
        assert paused.pause_reason == "the disk\N{REPLACEMENT CHARACTER} is full"
        await scene.send("b")
        scene.let_go("a")
        await until(lambda: scene.done == ["a"])
        await scene.order(OrderKind.PING)
        assert not scene.running
        resumed = await scene.order(OrderKind.RESUME)
        assert (resumed.state, resumed.pause_reason) == ("running", "")
        await until(lambda: "b" in scene.running)

    play(Scene(slots=2), scenario)


def test_a_worker_listens_on_more_queues_and_on_fewer() -> None:
    async def scenario(scene: Scene) -> None:
        await scene.send("a", queue="far")
        added = await scene.order(OrderKind.ADD_QUEUES, queues=["far", "dagster"])
        assert added.queues == ("dagster", "far")
        await until(lambda: "a" in scene.running)
        removed = await scene.order(OrderKind.REMOVE_QUEUES, queues=["dagster"])
        assert removed.queues == ("far",)
        await scene.send("b")
        await scene.send("c", queue="far")
        await until(lambda: "c" in scene.running)
        assert "b" not in scene.running

    play(Scene(slots=3), scenario)


def test_a_queue_is_paused_for_a_worker_that_lives_and_for_one_that_starts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)

    async def scenario(scene: Scene) -> None:
        await scene.send("a")
        await scene.send("b", queue="far")
        await until(lambda: "b" in scene.running)
        assert "a" not in scene.running  # from the start
        await scene.backend.resume_queue("dagster")
        await scene.order(OrderKind.LOOK_AT_QUEUES)
        await until(lambda: "a" in scene.running)
        await scene.backend.pause_queue(PAUSE)
        await scene.order(OrderKind.LOOK_AT_QUEUES)
        await scene.send("c")
        await scene.order(OrderKind.PING)
        assert "c" not in scene.running

    scene = Scene(3, "dagster", "far")
    asyncio.run(scene.backend.pause_queue(PAUSE))
    play(scene, scenario)
    assert "Queue dagster is paused" in caplog.text
    assert "Queue dagster is resumed" in caplog.text


def test_of_two_looks_the_later_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the answer to the earlier one is slow."""

    async def scenario(scene: Scene) -> None:
        look, goes_on = scene.backend.paused_queues, asyncio.Event()

        async def slow() -> dict[str, QueuePause]:
            found = await look()
            scene.backend.paused_queues = look  # type: ignore[method-assign]
            is_asked.set()
            await goes_on.wait()
            return found

        is_asked = asyncio.Event()
        scene.backend.paused_queues = slow  # type: ignore[method-assign]
        await is_asked.wait()  # by the worker itself
        await scene.backend.pause_queue(PAUSE)
        ordered = asyncio.create_task(scene.order(OrderKind.LOOK_AT_QUEUES))
        await asyncio.wait({ordered}, timeout=IN_VAIN_SECONDS)  # were it obeyed before the answer
        goes_on.set()
        await ordered
        await scene.send("a")
        await scene.order(OrderKind.PING)
        assert "a" not in scene.running

    monkeypatch.setattr(steering, "_LOOK_SECONDS", 0.01)
    play(Scene(), scenario)


def test_an_order_to_look_that_brings_nothing_is_not_said_to_be_obeyed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The worker looks again by itself."""

    async def scenario(scene: Scene) -> None:
        look = scene.backend.paused_queues

        async def away() -> dict[str, QueuePause]:
            scene.backend.paused_queues = look  # type: ignore[method-assign]
            raise UnreachableServerError("memory://test", "Cannot reach memory://test.")

        await scene.backend.pause_queue(PAUSE)
        scene.backend.paused_queues = away  # type: ignore[method-assign]
        records = [await scene.record()]
        told = await give_order(
            scene.backend, scene.servers.signer, records, OrderKind.LOOK_AT_QUEUES
        )
        record = await scene.order(OrderKind.PING)  # which is obeyed after it
        assert not set(told.ping_ids.values()) & set(record.pings)

    play(Scene(), scenario)
