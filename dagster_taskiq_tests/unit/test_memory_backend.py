"""What only the backend in memory has: a clock that is given, threads, accidents at once."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from dagster_taskiq.aio.loop_thread import LoopThread
from dagster_taskiq.backend import Claim, ClaimAnswer, TaskState
from dagster_taskiq.backend.base import CONTROL_EXPIRES_SECONDS
from dagster_taskiq.backend.memory import MemoryBackend, MemoryServer
from dagster_taskiq.defaults import (
    CLOSED_RECORD_EXPIRES_SECONDS,
    LOST_WORKER_SECONDS,
    RUN_RECORD_EXPIRES_SECONDS,
)
from dagster_taskiq.errors import UnreachableServerError
from dagster_taskiq.messages.results import Place
from dagster_taskiq.messages.worker_records import LOST, WorkerRecord

T = TypeVar("T")

PATIENCE_SECONDS = 20.0
LEASE_SECONDS = 30.0


class Scene:
    """A server whose clock stands still, with an open run."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.server = MemoryServer(lambda: self.now)
        self.backend = MemoryBackend(self.server)
        self.epoch = ""

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run(asyncio.wait_for(coroutine, PATIENCE_SECONDS))

    def open_run(self, run_id: str = "run", lease_seconds: float = LEASE_SECONDS) -> None:
        self.epoch = self.call(
            self.backend.open_run(
                run_id, generation=0, token="t", is_resumable=False, lease_seconds=lease_seconds
            )
        )

    def new_claim(self, task_id: str = "task", run_id: str = "run") -> Claim:
        place = Place("w@h", "w", "h", 1, 1)
        return Claim(run_id, task_id, f"token-{task_id}", LEASE_SECONDS, self.epoch, place)

    def claim(self, claim: Claim) -> ClaimAnswer:
        return self.call(self.backend.claim(claim, needs_live_run=False))

    def state(self, task_id: str = "task") -> TaskState:
        return self.call(self.backend.inspect("run", [task_id]))[1][task_id].state


@pytest.fixture
def scene() -> Scene:
    scene = Scene()
    scene.open_run()
    return scene


def test_a_lease_ends_at_its_time(scene: Scene) -> None:
    """By the given clock, and exactly."""
    assert scene.claim(scene.new_claim()) is ClaimAnswer.GRANTED
    scene.now += LEASE_SECONDS - 1
    (report,) = scene.call(scene.backend.inspect("run", ["task"]))[1].values()
    assert (report.state, report.lease_left_seconds) == (TaskState.CLAIMED, 1)
    scene.now += 1
    assert scene.state() is TaskState.EXPIRED
    assert scene.call(scene.backend.claim(scene.new_claim("x"), needs_live_run=True)) is (
        ClaimAnswer.RUN_GONE
    )


@pytest.mark.parametrize("is_closed", [False, True])
def test_the_record_of_a_run_ends_at_its_time(scene: Scene, is_closed: bool) -> None:
    """With the tombstones in it; a result that is left still says that its task is done."""
    done, forgotten = scene.new_claim("done"), scene.new_claim("forgotten")
    for claim in (done, forgotten):
        assert scene.claim(claim) is ClaimAnswer.GRANTED
        assert scene.call(scene.backend.complete(claim, b"x", expires_seconds=1e9))
    scene.call(scene.backend.forget_results("run", ["forgotten"]))
    if is_closed:
        scene.call(scene.backend.close_run("run", token="t"))
    scene.now += CLOSED_RECORD_EXPIRES_SECONDS if is_closed else RUN_RECORD_EXPIRES_SECONDS
    scene.now -= 1
    assert scene.state("forgotten") is TaskState.DONE
    scene.now += 1
    assert scene.state("forgotten") is TaskState.UNKNOWN
    assert scene.state("done") is TaskState.DONE
    assert scene.claim(done) is ClaimAnswer.DONE
    _, states = scene.call(scene.backend.cancel("run", {"done": "x"}))
    assert states == {"done": TaskState.DONE}


def test_orders_workers_and_results_expire(scene: Scene) -> None:
    record = WorkerRecord("w", "w@h", "h", 1, ("q",))
    claim = scene.new_claim()
    scene.claim(claim)
    scene.call(scene.backend.complete(claim, b"x", expires_seconds=CONTROL_EXPIRES_SECONDS))
    scene.call(scene.backend.heartbeat(record, expires_seconds=CONTROL_EXPIRES_SECONDS))
    scene.call(scene.backend.send_control("w", "order"))
    scene.now += CONTROL_EXPIRES_SECONDS - 1
    assert scene.call(scene.backend.workers()) == [record]
    assert scene.call(scene.backend.read_results("run", ["task"])) == {"task": b"x"}
    scene.now += 1
    assert scene.call(scene.backend.workers()) == []
    assert scene.call(scene.backend.lost_workers()) == [replace(record, state=LOST)]
    scene.now += LOST_WORKER_SECONDS - 1
    scene.call(scene.backend.tidy())
    assert scene.call(scene.backend.lost_workers())
    scene.now += 1
    assert scene.call(scene.backend.lost_workers()) == []
    assert scene.call(scene.backend.read_results("run", ["task"])) == {}
    assert scene.call(scene.backend.wait_for_control("w", 0)) == []


def test_nothing_is_kept_for_ever(scene: Scene) -> None:
    """A server that lives long forgets the runs that are over."""
    for number in range(3):
        run_id = f"run-{number}"
        scene.open_run(run_id)
        claim = scene.new_claim("task", run_id)
        scene.claim(claim)
        scene.call(scene.backend.complete(claim, b"x", expires_seconds=60))
        scene.call(scene.backend.close_run(run_id, token="t"))
    scene.call(scene.backend.inspect("never opened", ["task"]))
    scene.now += RUN_RECORD_EXPIRES_SECONDS
    scene.open_run("last")
    tables = scene.server.snapshot().tables
    assert list(tables.runs) == ["last"]
    assert not tables.tasks
    assert not tables.mailboxes


def test_a_snapshot_is_not_changed_by_what_follows(scene: Scene) -> None:
    """Nor by what follows after it was restored."""
    snapshot = scene.server.snapshot()
    for _ in range(2):
        assert scene.claim(scene.new_claim()) is ClaimAnswer.GRANTED
        scene.server.restore(snapshot)
        assert scene.state() is TaskState.UNKNOWN


@pytest.fixture
def thread() -> Iterator[LoopThread]:
    thread = LoopThread("test-memory")
    yield thread
    thread.stop()


def test_who_waits_in_another_thread_is_woken(scene: Scene, thread: LoopThread) -> None:
    """As loop and workers of one process do."""

    async def answer_each(count: int) -> None:
        for number in range(count):
            assert await scene.backend.wait_for_control("one", PATIENCE_SECONDS) == [b"ping"]
            await scene.backend.send_control("other", f"pong {number}")

    thread.spawn(answer_each(50), "answer")
    for number in range(50):
        scene.call(scene.backend.send_control("one", "ping"))
        waiting = scene.backend.wait_for_control("other", PATIENCE_SECONDS)
        assert scene.call(waiting) == [f"pong {number}".encode()]


def test_who_waits_when_the_server_freezes_is_told(scene: Scene) -> None:
    """It would wait for what cannot come."""

    async def wait() -> None:
        waiting = asyncio.ensure_future(scene.backend.wait_for_results("run", PATIENCE_SECONDS))
        await asyncio.sleep(0)
        scene.server.freeze()
        with pytest.raises(UnreachableServerError, match="memory://test"):
            await waiting
        scene.server.thaw()
        assert await scene.backend.wait_for_results("run", 0) == {}

    scene.call(wait())
