"""A station, and a whole worker, with stand-ins for processes and servers."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, cast
from unittest.mock import MagicMock

import pytest

from dagster_taskiq.brokers import Admission, Delivery
from dagster_taskiq.brokers.memory import MemoryBroker, MemoryQueues
from dagster_taskiq.connections import Servers
from dagster_taskiq.errors import NoProcessError, WorkerFailedError
from dagster_taskiq.messages.control import OrderReader
from dagster_taskiq.messages.envelope import Envelope, QueueKind
from dagster_taskiq.messages.notes import read_note
from dagster_taskiq.messages.results import TaskResult
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.messages.time_limits import TimeLimits
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq.worker import slot_pool
from dagster_taskiq.worker.admission import StationAdmission
from dagster_taskiq.worker.child_messages import Executed
from dagster_taskiq.worker.leases import LeaseKeeper
from dagster_taskiq.worker.options import WorkerOptions
from dagster_taskiq.worker.parts import WorkerParts
from dagster_taskiq.worker.receiver import DeliveryFormatter, SettlingReceiver
from dagster_taskiq.worker.run_watch import RunWatch
from dagster_taskiq.worker.station import Station
from dagster_taskiq.worker.tools import Tools
from dagster_taskiq.worker.worker import Worker
from dagster_taskiq_tests.messages import STEP_TASK
from dagster_taskiq_tests.unit.worker_stand_ins import (
    PLACE,
    FakeBackend,
    FakeBroker,
    FakeGuard,
    FakeSlot,
    Witness,
    finished,
)

SECONDS = 30.0

UNSIGNED = Signer()


async def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.005)


class Scene:
    """A station of steps with two slots."""

    def __init__(self, signer: Signer = UNSIGNED) -> None:
        self.slots: list[FakeSlot] = []
        self.backend = FakeBackend()
        self.witness = Witness()
        admission = StationAdmission(
            QueueKind.STEPS, ("dagster",), signer, self.witness, self.backend.whole(), "w@h"
        )
        self.broker = FakeBroker(admission=admission)
        leases = LeaseKeeper(
            self.backend.whole(),
            FakeGuard(),
            OrderReader(signer, "worker-id", "w@h"),
            self.witness,
        )
        tools = Tools(
            self.backend.whole(),
            leases,
            RunWatch(FakeSlot(0)),
            PLACE,
            1.0,
            TimeLimits(),
            signer,
            self.witness,
        )
        self.station = Station(QueueKind.STEPS, self.broker, self._make_slot, 2, tools)
        self.drain = asyncio.Event()

    def _make_slot(self, number: int) -> FakeSlot:
        self.slots.append(FakeSlot(number))
        return self.slots[-1]

    async def settled(self, *expected: str) -> None:
        """Wait until messages are settled so, whatever their order."""
        await until(lambda: sorted(self.broker.happened) == sorted(expected))


def play(
    scenario: Callable[[Scene], Coroutine[Any, Any, None]], signer: Signer = UNSIGNED
) -> Scene:
    """Run a scenario beside the station's work, and drain it."""

    async def run() -> Scene:
        scene = Scene(signer)
        working = asyncio.create_task(scene.station.work(scene.drain))
        await asyncio.wait_for(scenario(scene), SECONDS)
        scene.drain.set()
        await asyncio.wait_for(working, SECONDS)
        await scene.station.stop()
        return scene

    return asyncio.run(run())


def message(envelope: Envelope, signer: Signer = UNSIGNED) -> bytes:
    return envelope.to_message("q", signer).message


def test_a_message_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On its way from the broker to its slot, through Taskiq's receiver."""
    parsed: list[bytes] = []
    original = Envelope.from_bytes

    def from_bytes(data: bytes, signer: Signer) -> Envelope:
        parsed.append(data)
        return original(data, signer)

    monkeypatch.setattr(Envelope, "from_bytes", from_bytes)
    monkeypatch.setattr(Envelope, "from_header", counted(Envelope.from_header, parsed))

    async def scenario(scene: Scene) -> None:
        scene.broker.put(message(STEP_TASK))
        await scene.settled("ack")

    scene = play(scenario)
    assert len(parsed) == 2  # the message, and in it the header
    assert list(scene.backend.results) == [STEP_TASK.task_id]
    assert scene.witness.heard == ["admitted", "claimed", "began", "ended", "completed", "released"]


def counted(function: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        calls.append(arguments)
        return function(*arguments)

    return call


def test_what_is_no_task_is_refused_and_the_station_goes_on() -> None:
    """Whoever watches hears of it."""

    async def scenario(scene: Scene) -> None:
        scene.broker.put(b"no task")
        scene.broker.put(message(STEP_TASK))
        await scene.settled("ack", "ack")

    scene = play(scenario)
    assert scene.witness.heard[0] == "refused"
    assert list(scene.backend.results) == [STEP_TASK.task_id]


def test_a_signed_task_of_another_queue_is_refused() -> None:
    """Somebody may have moved it there; without a key there is nothing to rely on."""
    key = Signer(["k" * 32])
    moved = message(replace(STEP_TASK, queue="another"), key)

    async def scenario(scene: Scene) -> None:
        scene.broker.put(moved)
        await scene.settled("ack")

    scene = play(scenario, key)
    assert scene.witness.heard == ["refused"]
    assert scene.backend.claims == []


@pytest.mark.parametrize("signer", [UNSIGNED, Signer(["k" * 32])])
def test_a_task_of_another_backend_goes_back(signer: Signer) -> None:
    """Beside it the station goes on; a note tells its run which two backends there are."""
    theirs = replace(
        STEP_TASK,
        task_id="5f0e7c52-51e6-4b34-8f0b-0a63a7b8a8d1",
        run_id="theirs",
        state="another",
        backend="postgresql://other/dagster",
        sent_at=time.time(),
    )
    ours = replace(STEP_TASK, state="fake", backend="memory://fake", sent_at=time.time())

    async def scenario(scene: Scene) -> None:
        scene.broker.put(message(theirs, signer))
        scene.broker.put(message(ours, signer))
        await scene.settled("ack", "release")

    scene = play(scenario, signer)
    assert list(scene.backend.results) == [STEP_TASK.task_id]
    assert scene.witness.heard[0] == "given back"
    note = read_note(signer, "theirs", scene.broker.notes["theirs"])
    assert note is not None
    assert "memory://fake" in note
    assert "postgresql://other/dagster" in note
    assert read_note(signer, "another run", scene.broker.notes["theirs"]) == (
        None if signer.is_active else note
    )


def test_a_task_of_another_backend_ends_with_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """When no backend can know its run any more it is dropped: nobody would ever take it."""
    sent_at = time.time() - 8 * 86400
    old = replace(STEP_TASK, state="another", backend="redis://other", sent_at=sent_at)

    async def scenario(scene: Scene) -> None:
        scene.broker.put(message(old))
        await scene.settled("ack")

    assert play(scenario).witness.heard == ["refused"]


def test_a_sender_that_does_not_name_its_backend_is_believed_to_have_ours() -> None:
    """Such as one of an older version."""
    header = STEP_TASK.header()
    for key in ("state", "backend", "sent_at"):
        del header[key]
    data = f"{json.dumps(header)}\n{{}}".encode()

    async def scenario(scene: Scene) -> None:
        scene.broker.put(data)
        await scene.settled("ack")

    assert list(play(scenario).backend.results) == [STEP_TASK.task_id]


def test_a_draining_station_finishes_what_runs_and_gives_back_the_rest() -> None:
    """What was taken and not begun goes back unclaimed."""

    async def scenario(scene: Scene) -> None:
        goes_on = asyncio.Event()

        async def act(*_: object) -> Executed:
            await goes_on.wait()
            return finished()

        scene.slots[0].act = act
        scene.broker.put(message(STEP_TASK))
        await until(lambda: scene.slots[0].orders)
        scene.drain.set()
        delivery = scene.broker.deliver(b"", replace(STEP_TASK, task_id="another"))
        await scene.station._execute(delivery)
        assert not delivery.settled
        goes_on.set()

    scene = play(scenario)
    assert list(scene.backend.results) == [STEP_TASK.task_id]
    assert len(scene.backend.claims) == 1


def test_a_worker_without_processes_claims_nothing_and_has_its_slots_afterwards(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It goes on when every slot can have a process again, and says once each that it is so."""
    monkeypatch.setattr(slot_pool, "_SHORTAGE_SECONDS", 0.01)
    caplog.set_level(logging.INFO)

    async def scenario(scene: Scene) -> None:
        for slot in scene.slots:
            slot.failure = NoProcessError(f"slot {slot.number}: EMFILE")
            scene.broker.put(message(STEP_TASK))
        await scene.settled("release", "release")
        assert scene.station.is_short
        scene.broker.put(message(STEP_TASK))
        scene.slots[0].failure = None
        await until(lambda: len(scene.station._slots._lacking) == 1)
        assert await scene.broker.depth("q") == 1
        scene.slots[1].failure = None
        await scene.settled("release", "release", "ack")
        assert not scene.station.is_short

    scene = play(scenario)
    assert len(scene.backend.claims) == 1
    assert len(scene.station._slots._idle) == 2
    assert caplog.text.count("takes no steps until") == 1
    assert caplog.text.count("takes steps again") == 1


def test_a_message_is_given_back_before_its_worker_recovers() -> None:
    """Another worker may have a process for it; this one takes no other in its place meanwhile."""
    happened: list[str] = []

    async def scenario() -> None:
        async def release() -> None:
            happened.append("released")

        async def recover() -> None:
            happened.append("recovered")

        receiver = SettlingReceiver(cast("Any", MagicMock()), 1, recover)
        await receiver.callback(Delivery(data=b"", ack=release, release=release))

    asyncio.run(scenario())
    assert happened == ["released", "recovered"]


def test_taskiq_itself_can_send_no_task() -> None:
    """Such a task would be neither signed nor bounded."""
    taskiq_message = cast("Any", MagicMock(task_id=STEP_TASK.task_id))
    with pytest.raises(TypeError, match=f"{STEP_TASK.task_id} cannot be sent"):
        DeliveryFormatter().dumps(taskiq_message)


# --- a whole worker ---


def test_a_worker_of_stand_ins_works_and_is_watched() -> None:
    """Everything of it but processes and servers is real; its listing counts as observers do."""

    async def scenario() -> None:
        backend, witness = FakeBackend(), Witness()
        brokers: dict[QueueKind, FakeBroker] = {}
        slots: list[FakeSlot] = []

        def open_broker(kind: QueueKind, _queues: object, admission: Admission) -> FakeBroker:
            return brokers.setdefault(kind, FakeBroker(admission=admission))

        def make_slot(options: Any, _observer: object) -> FakeSlot:
            slots.append(FakeSlot(options.child.slot))
            return slots[-1]

        ready, goes_on = asyncio.Event(), asyncio.Event()

        async def act(*_: object) -> Executed:
            await goes_on.wait()
            return finished()

        options = ServerOptions("redis://nobody", key_prefix="p")
        worker = Worker(
            Servers(options, options, UNSIGNED),
            WorkerOptions("w", ("dagster",), slots=1),
            on_ready=ready.set,
            observer=witness,
            parts=WorkerParts(backend.whole(), FakeGuard(), open_broker, make_slot),
        )
        for slot in slots:
            slot.act = act
        running = asyncio.create_task(worker.run())
        await asyncio.wait_for(ready.wait(), SECONDS)
        broker = brokers[QueueKind.STEPS]
        broker.put(b"no task")
        broker.put(message(STEP_TASK))
        await until(lambda: "began" in witness.heard)
        await backend.orders.put(b"no order")
        await until(lambda: witness.details.get("refused") == "an order")
        worker.drain()
        await until(lambda: backend.records[-1].state == "draining")
        goes_on.set()
        assert await asyncio.wait_for(running, SECONDS)
        assert (backend.records[0].busy_slots, backend.records[0].refused) == (0, 0)
        assert (backend.records[-1].busy_slots, backend.records[-1].refused) == (1, 2)
        assert [it.task_id for it in backend.told] == [STEP_TASK.task_id]
        assert TaskResult.from_bytes(backend.results[STEP_TASK.task_id])
        assert witness.heard[-3:] == ["ended", "completed", "released"]
        assert backend.happened[-1] == "goodbye"

    asyncio.run(scenario())


def test_a_worker_says_which_of_its_tasks_has_ended_and_that_its_broker_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To its observers, beside the error with which it ends."""

    async def scenario() -> None:
        witness, ready = Witness(), asyncio.Event()
        queues = MemoryQueues()
        options = ServerOptions("redis://nobody", key_prefix="p")
        servers = Servers(options, options, UNSIGNED)
        worker = Worker(
            servers,
            WorkerOptions("w", ("dagster",), slots=1),
            on_ready=ready.set,
            observer=witness,
            parts=WorkerParts(
                FakeBackend().whole(),
                FakeGuard(),
                lambda _kind, names, admission: MemoryBroker(queues, names, admission),
                lambda *_: FakeSlot(),
            ),
        )
        assert (worker.state, worker.slots) == ("running", {QueueKind.STEPS: 1})
        running = asyncio.create_task(worker.run())
        await asyncio.wait_for(ready.wait(), SECONDS)
        queues.freeze()
        await until(lambda: witness.details.get("broker away") is QueueKind.STEPS)
        queues.thaw()
        physical = servers.physical_queue(QueueKind.STEPS, "dagster")
        await MemoryBroker(queues).kick(STEP_TASK.to_message(physical, UNSIGNED))
        await until(lambda: witness.details.get("broker back") is QueueKind.STEPS)
        monkeypatch.setattr(FakeSlot, "retire", MagicMock(side_effect=ZeroDivisionError))
        worker.reload()
        with pytest.raises(WorkerFailedError, match="'reload' ended"):
            await asyncio.wait_for(running, SECONDS)
        assert witness.details["failed"] == "reload"

    asyncio.run(scenario())
