"""A worker's entry in the list of workers, and the orders that reach it there."""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import dagster
import pytest

from dagster_taskiq._dagster.fingerprint import storage_fingerprint
from dagster_taskiq.backend.memory import MemoryBackend, MemoryServer
from dagster_taskiq.connections import Servers
from dagster_taskiq.messages.control import OrderKind, OrderReader, cancel_order, worker_order
from dagster_taskiq.messages.envelope import QueueKind
from dagster_taskiq.messages.results import Outcome, Place
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.messages.worker_records import WorkerRecord
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq.worker import listing
from dagster_taskiq.worker.control_mailbox import ControlMailbox, told
from dagster_taskiq.worker.listing import Listing
from dagster_taskiq.worker.observer import CountingObserver, Ending
from dagster_taskiq.worker.options import WorkerOptions
from dagster_taskiq.worker.steering import Steering
from dagster_taskiq.worker.templates import CodeState
from dagster_taskiq_tests.messages import STEP_TASK
from dagster_taskiq_tests.unit.worker_stand_ins import Witness

PLACE = Place("w@h", "worker-id", "h", 0, 0)

ME = WorkerRecord("worker-id", "w@h", "h", 1, ("q",))

PATIENCE_SECONDS = 20.0


class Scene:
    """A worker's listing on a server in memory."""

    def __init__(self) -> None:
        self.server = MemoryServer()
        self.backend = MemoryBackend(self.server)
        self.counts = CountingObserver()
        self.state = "running"
        self.outages = 0
        options = ServerOptions("redis://fake")
        servers = Servers(options, options, Signer())
        self.listing = Listing(
            self.backend,
            servers,
            Steering(servers, self.backend, WorkerOptions("w", ("q",), 3)),
            PLACE,
            self.counts,
            lambda: self.state,
            lambda: [CodeState("a", is_warm=True), CodeState("b", is_warm=False, reason="c")],
            self._note_outage,
        )

    async def _note_outage(self) -> None:
        self.outages += 1

    async def workers(self) -> list[WorkerRecord]:
        return await self.backend.workers()

    async def until(self, is_so: Callable[[WorkerRecord], bool]) -> None:
        """Wait for a record of which something is so."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not any(map(is_so, await self.workers())):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)


def test_a_worker_is_listed_as_it_is_now() -> None:
    """From when it enters until it leaves; each heartbeat has its present state."""

    async def test() -> None:
        scene = Scene()
        await scene.listing.enter()
        (first,) = await scene.workers()
        assert (first.worker_id, first.name, first.slots) == ("worker-id", "w@h", 3)
        assert (first.state, first.busy_slots) == ("running", 0)
        scene.state, scene.counts.busy[QueueKind.STEPS] = "draining", 2
        await scene.listing.update()
        (second,) = await scene.workers()
        assert (second.state, second.busy_slots) == ("draining", 2)
        assert second.started_at == first.started_at
        await scene.listing.leave()
        assert await scene.workers() == []

    asyncio.run(test())


def test_a_worker_says_what_it_has_done_and_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many tasks it has ended, its memory, its versions, and the instance's storage."""
    (tmp_path / "dagster.yaml").touch()
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.setattr(listing, "HEARTBEAT_SECONDS", 0.01)

    async def test() -> None:
        scene = Scene()
        for outcome, has_failed in [
            (Outcome.FINISHED, False),
            (Outcome.FINISHED, False),
            (Outcome.FINISHED, True),
            (Outcome.REFUSED, False),
        ]:
            scene.counts.ended(STEP_TASK, Ending(outcome, 0, 1, has_failed=has_failed))
        await scene.listing.enter()
        running = asyncio.create_task(scene.listing.run())
        try:
            await scene.until(lambda it: it.memory_bytes > 0)
        finally:
            running.cancel()
        (record,) = await scene.workers()
        assert (record.done, record.failed) == (2, 1)
        assert 10 * 2**20 < record.memory_bytes < 2**40
        assert (record.dagster, record.python) == (dagster.__version__, platform.python_version())
        assert record.storage == storage_fingerprint(tmp_path)

    asyncio.run(test())


def test_a_worker_without_an_instance_does_not_name_its_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor one whose dagster.yaml Dagster cannot use; it is listed all the same."""
    (tmp_path / "dagster.yaml").write_text("storage: {nonsense: 1}")
    monkeypatch.setattr(listing, "HEARTBEAT_SECONDS", 0.01)

    async def test() -> None:
        scene = Scene()
        running = asyncio.create_task(scene.listing.run())
        try:
            await scene.until(lambda _: True)
        finally:
            running.cancel()
        (record,) = await scene.workers()
        assert record.storage == ""

    for home in ("", str(tmp_path)):
        monkeypatch.setenv("DAGSTER_HOME", home)
        asyncio.run(test())


def test_a_ping_is_answered_by_a_heartbeat_that_names_it() -> None:
    """The last ones, as several commands may wait for an answer."""

    async def test() -> None:
        scene = Scene()
        await scene.listing.enter()
        for number in range(20):
            await scene.listing.answer_ping(f"ping {number}")
        (record,) = await scene.workers()
        assert record.pings == tuple(f"ping {number}" for number in range(12, 20))

    asyncio.run(test())


def test_an_outage_ends_no_worker() -> None:
    """A heartbeat that is lost is tried again; a worker that cannot sign off ends all the same."""

    async def test() -> None:
        scene = Scene()
        await scene.listing.enter()
        scene.server.freeze()
        await scene.listing.update()
        await scene.listing.leave()
        assert scene.outages == 1
        scene.server.thaw()
        assert len(await scene.workers()) == 1

    asyncio.run(test())


def test_who_never_entered_does_not_leave() -> None:
    """It asks no server, which may be what it has waited for in vain."""

    async def test() -> None:
        scene = Scene()
        scene.server.freeze()
        await scene.listing.leave()

    asyncio.run(test())


class FakeLeases:
    """Holds one task."""

    def __init__(self) -> None:
        self.stopped: list[tuple[str, str]] = []

    def find(self, task_id: str) -> str | None:
        return task_id if task_id == "held" else None

    def cancel(self, lease: str, why: str) -> None:
        self.stopped.append((lease, why))


def obey(orders: Sequence[str], leases: Any, observer: Witness) -> list[str]:
    """Have a worker find these orders in its mailbox; which calls it got."""

    async def test() -> list[str]:
        calls: list[str] = []
        is_read = asyncio.Event()

        def drain() -> None:
            calls.append("drain")
            is_read.set()

        async def note_ping(ping_id: str) -> None:
            calls.append(ping_id)

        backend = MemoryBackend(MemoryServer())
        for order in [*orders, worker_order(Signer(), ME, "terminate")]:
            await backend.send_control("worker-id", order)
        reader = OrderReader(Signer(), "worker-id", "w@h")
        mailbox = ControlMailbox(
            backend,
            "worker-id",
            reader,
            leases,
            observer,
            {
                OrderKind.TERMINATE: told(drain),
                OrderKind.RELOAD: told(lambda: calls.append("reload")),
            },
            note_ping,
        )
        task = asyncio.create_task(mailbox.run())
        await asyncio.wait_for(is_read.wait(), PATIENCE_SECONDS)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        return calls

    return asyncio.run(test())


def test_each_order_is_obeyed() -> None:
    """In their order; a cancel of a task that is not held is nothing to this worker."""
    leases = FakeLeases()
    orders = [
        worker_order(Signer(), ME, "reload"),
        cancel_order(Signer(), "held", "enough"),
        cancel_order(Signer(), "elsewhere", "enough"),
        worker_order(Signer(), ME, OrderKind.PING, "a ping"),
        worker_order(Signer(), ME, "dance"),
    ]
    assert obey(orders, leases, Witness()) == ["reload", "a ping", "drain"]
    assert leases.stopped == [("held", "enough")]


def test_an_order_that_is_refused_is_heard_of() -> None:
    """And those that follow it are obeyed."""
    observer = Witness()
    other = WorkerRecord("other-id", "other@h", "h", 1, ("q",))
    assert obey([worker_order(Signer(), other, "reload")], FakeLeases(), observer) == ["drain"]
    assert observer.details["refused"] == "an order"
