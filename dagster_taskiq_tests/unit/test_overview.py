"""The read model: what waits, what is executed, by whom, as servers and workers say it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from dagster_taskiq.backend import Claim, ClaimAnswer, TaskState
from dagster_taskiq.backend.memory import MemoryBackend, MemoryServer
from dagster_taskiq.brokers.memory import MemoryBroker, MemoryQueues
from dagster_taskiq.connections import Servers
from dagster_taskiq.messages.envelope import PROTOCOL, Envelope, QueueKind, TaskName
from dagster_taskiq.messages.queue_waits import WaitKind
from dagster_taskiq.messages.results import Place
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.messages.worker_records import RunningTask, WorkerRecord
from dagster_taskiq.overview import MOST_WAITING, Overview, TaskView, read_overview
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq_tests.messages import STEP_TASK

OPTIONS = ServerOptions("redis://localhost")
SERVERS = Servers(OPTIONS, OPTIONS, Signer())
STEPS, RUNS = QueueKind.STEPS, QueueKind.RUNS


class Scene:
    """Servers in memory, with what senders and workers have left there."""

    def __init__(self, servers: Servers = SERVERS, *, is_searchable: bool = True) -> None:
        self.servers = servers
        self.state = MemoryServer()
        self.queues = MemoryQueues(is_searchable=is_searchable)
        self.backend = MemoryBackend(self.state, servers.signer)
        self.broker = MemoryBroker(self.queues)
        self.epoch = ""

    async def open(self, run_id: str = "run") -> None:
        """A loop begins the run."""
        self.epoch = await self.backend.open_run(
            run_id, generation=0, token="t", is_resumable=False, lease_seconds=600
        )

    async def send(self, *tasks: Envelope, signer: Signer | None = None) -> None:
        for task in tasks:
            physical = self.servers.physical_queue(task.kind, task.queue)
            await self.broker.kick(task.to_message(physical, signer or self.servers.signer))

    async def claim(self, task: Envelope, worker: WorkerRecord) -> Place:
        """A worker takes a task; its next heartbeat tells it."""
        place = Place(worker.name, worker.worker_id, worker.host, worker.pid, 1)
        claim = Claim(task.run_id, task.task_id, "token", 600, self.epoch, place)
        needs_loop = task.kind is STEPS
        answer = await self.backend.claim(claim, needs_live_run=needs_loop)
        assert answer is ClaimAnswer.GRANTED
        return place

    async def beat(self, worker: WorkerRecord, *running: Envelope) -> None:
        """A worker says that it lives, and what it executes."""
        tasks = [
            RunningTask(it.task_id, it.run_id, it.step_key or "", it.attempt, it.queue, 17.0)
            for it in running
        ]
        await self.backend.heartbeat(worker, expires_seconds=600, running=tasks)

    async def read(self, *queues: str) -> Overview:
        return await read_overview(self.servers, self.backend, self.broker, queues)


def worker(name: str = "w@h", **values: Any) -> WorkerRecord:
    values = {"slots": 2, "run_slots": 1, "protocol": PROTOCOL, **values}
    return WorkerRecord(name, name, "h", 7, ("dagster",), **values)


def step(key: str, **values: Any) -> Envelope:
    return replace(STEP_TASK, task_id=str(uuid.uuid4()), step_key=key, **values)


RUN = replace(
    STEP_TASK, task_id=str(uuid.uuid4()), name=TaskName.EXECUTE_JOB, step_key=None, attempt=0
)


def depths(overview: Overview) -> Mapping[tuple[str, QueueKind], int]:
    return {(it.name, it.kind): it.depth for it in overview.queues}


def test_what_is_executed_is_known_with_its_worker() -> None:
    """Who executes it is the backend's word; what it is and since when the worker's own."""

    async def test() -> None:
        scene, task = Scene(), step("one")
        await scene.open()
        await scene.beat(worker(), task)
        place = await scene.claim(task, worker())
        unnamed = step("two")
        await scene.claim(unnamed, worker("new@h"))
        (run,) = (await scene.read()).runs
        assert (run.run_id, run.has_loop, run.is_resumable) == ("run", True, False)
        by_id = {it.task_id: it for it in run.tasks}
        assert by_id[task.task_id] == TaskView(
            task.task_id, "run", TaskState.CLAIMED, "one", 1, "dagster", place=place, claimed_at=17
        )
        assert by_id[unnamed.task_id].step_key is None
        assert by_id[unnamed.task_id].place is not None
        assert by_id[unnamed.task_id].place.worker == "new@h"

    asyncio.run(test())


def test_a_worker_that_died_leaves_its_task_to_be_judged() -> None:
    """Its own word does not count: it is as old as its last heartbeat."""

    async def test() -> None:
        scene, task, ended = Scene(), step("one"), step("ended")
        await scene.open()
        await scene.beat(worker(), task, ended)
        await scene.claim(task, worker())
        scene.state.expire_claim("run", task.task_id)
        (run,) = (await scene.read()).runs
        (view,) = run.tasks
        assert (view.state, view.step_key, view.place) == (TaskState.EXPIRED, "one", None)

    asyncio.run(test())


def test_a_task_is_named_by_a_worker_of_its_run_only() -> None:
    async def test() -> None:
        scene, task = Scene(), step("one")
        await scene.open()
        await scene.beat(worker(), replace(task, run_id="another"))
        await scene.claim(task, worker())
        (run,) = (await scene.read()).runs
        assert [it.step_key for it in run.tasks] == [None]

    asyncio.run(test())


def test_what_waits_is_known_with_its_place() -> None:
    """In each part of a queue, also where no worker listens; the sender's settings add names."""

    async def test() -> None:
        scene = Scene()
        await scene.beat(worker(run_slots=0))
        low, high = step("low", priority=1), step("high", priority=9)
        await scene.send(low, high, RUN, step("far", queue="far"))
        overview = await scene.read("empty")
        assert depths(overview) == {
            ("dagster", STEPS): 2,
            ("dagster", RUNS): 1,
            ("empty", STEPS): 0,
            ("far", STEPS): 1,
        }
        steps, runs, empty, far = overview.queues
        assert steps.waiting is not None
        assert runs.waiting is not None
        found = [(it.step_key, it.priority, it.position) for it in steps.waiting]
        assert found == [("high", 9, 1), ("low", 1, 2)]
        assert (runs.waiting[0].run_id, runs.waiting[0].step_key) == ("run", "")
        assert (steps.workers, steps.wait) == (["w@h"], None)
        for queue in (runs, empty, far):
            assert not queue.workers
            assert queue.wait is not None
            assert queue.wait.kind is WaitKind.UNSERVED

    asyncio.run(test())


def test_a_long_queue_is_shown_in_part() -> None:
    async def test() -> None:
        scene = Scene()
        await scene.send(*(step(f"s{number}") for number in range(MOST_WAITING + 1)))
        (queue,) = (await scene.read()).queues
        assert queue.depth == MOST_WAITING + 1
        assert queue.waiting is not None
        assert len(queue.waiting) == MOST_WAITING

    asyncio.run(test())


def test_a_server_that_cannot_look_into_its_queues_says_how_long_they_are() -> None:
    """RabbitMQ: of queues that are known by a worker or by the settings."""

    async def test() -> None:
        scene = Scene(is_searchable=False)
        await scene.beat(worker())
        await scene.send(step("one"), step("far", queue="far"))
        overview = await scene.read("far")
        assert depths(overview) == {
            ("dagster", STEPS): 1,
            ("dagster", RUNS): 0,
            ("far", STEPS): 1,
        }
        assert [it.waiting for it in overview.queues] == [None, None, None]

    asyncio.run(test())


@pytest.mark.parametrize("is_signed", [True, False])
def test_what_is_not_signed_as_it_must_be_is_counted_and_not_shown(is_signed: bool) -> None:
    """Its texts are anybody's."""

    async def test() -> None:
        key = Signer(["k" * 32])
        scene = Scene(Servers(OPTIONS, OPTIONS, key))
        await scene.send(step("one"), signer=key if is_signed else Signer(["o" * 32]))
        (queue,) = (await scene.read()).queues
        assert queue.depth == 1
        assert queue.waiting is not None
        assert [it.step_key for it in queue.waiting] == (["one"] if is_signed else [])

    asyncio.run(test())


def test_queues_of_another_deployment_are_not_ours() -> None:
    async def test() -> None:
        scene = Scene()
        elsewhere = replace(OPTIONS, key_prefix="other")
        other = Servers(elsewhere, elsewhere, Signer())
        physical = other.physical_queue(STEPS, "dagster")
        await scene.broker.kick(step("one").to_message(physical, Signer()))
        assert (await scene.read()).queues == []

    asyncio.run(test())
