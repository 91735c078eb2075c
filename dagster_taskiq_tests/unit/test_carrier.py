"""The order in which a carrier asks broker and backend, and what it makes of their answers."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import replace

import pytest

from dagster_taskiq.backend import Claim, TaskState
from dagster_taskiq.backend.memory import MemoryBackend, MemoryServer
from dagster_taskiq.brokers.memory import MemoryBroker, MemoryQueues
from dagster_taskiq.carrier import Carrier
from dagster_taskiq.connections import Servers
from dagster_taskiq.errors import UnreachableServerError
from dagster_taskiq.messages.envelope import QueueKind
from dagster_taskiq.messages.queue_waits import WaitKind
from dagster_taskiq.messages.results import NOWHERE, Outcome, Place, TaskResult
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq_tests.messages import STEP_TASK

PLACE = Place("w@h", "w", "h", 1, 1)

TASK = replace(STEP_TASK, task_id="", queue="q", epoch="")


class NotingBroker(MemoryBroker):
    """Notes what is withdrawn, and which of the tasks were cancelled before."""

    def __init__(self, backend: MemoryBackend) -> None:
        super().__init__(MemoryQueues())
        self.backend = backend
        self.withdrawn: list[tuple[str, list[str]]] = []
        self.states: list[TaskState] = []

    async def withdraw(self, queue: str, task_ids: Collection[str]) -> set[str]:
        self.withdrawn.append((queue, list(task_ids)))
        _, reports = await self.backend.inspect("run", list(task_ids))
        self.states += [report.state for report in reports.values()]
        return await super().withdraw(queue, task_ids)


class Scene:
    """An open run on servers in memory."""

    def __init__(self) -> None:
        self.server = MemoryServer()
        self.backend = MemoryBackend(self.server)
        self.broker = NotingBroker(self.backend)
        options = ServerOptions("redis://fake", key_prefix="p:")
        servers = Servers(options, options, Signer())
        self.physical = servers.physical_queue(QueueKind.STEPS, "q")
        self.other_physical = servers.physical_queue(QueueKind.STEPS, "other")
        self.carrier = Carrier(servers, QueueKind.STEPS, self.broker, self.backend)

    async def send(self, tasks: Mapping[str, str]) -> None:
        """Send tasks, each to its queue."""
        envelopes = [replace(TASK, task_id=key, queue=queue) for key, queue in tasks.items()]
        await self.carrier.send([self.carrier.message_of(it) for it in envelopes])

    async def claim(self, task_id: str) -> Claim:
        """Have a worker hold a task."""
        epoch = await self.backend.epoch()
        claim = Claim("run", task_id, f"token-{task_id}", 30.0, epoch, PLACE)
        await self.backend.claim(claim, needs_live_run=False)
        return claim


@pytest.fixture
def scene() -> Scene:
    scene = Scene()
    asyncio.run(
        scene.backend.open_run(
            "run", generation=0, token="t", is_resumable=False, lease_seconds=30.0
        )
    )
    return scene


def test_tombstones_come_before_the_withdrawal(scene: Scene) -> None:
    """What a worker has claimed is told to stop, and is in no queue any more."""

    async def test() -> None:
        tasks = {"a": "q", "b": "q", "c": "other", "held": "q"}
        await scene.send(tasks)
        await scene.claim("held")
        _, states = await scene.carrier.cancel("run", tasks, "enough")
        assert states == dict.fromkeys("abc", TaskState.CANCELLED) | {"held": TaskState.CLAIMED}
        assert scene.broker.withdrawn == [
            (scene.physical, ["a", "b"]),
            (scene.other_physical, ["c"]),
        ]
        assert scene.broker.states == [TaskState.CANCELLED] * 3
        assert await scene.carrier.absent(tasks) == {"a", "b", "c"}

    asyncio.run(test())


def test_nothing_is_withdrawn_before_the_backend_has_answered(scene: Scene) -> None:
    """A task that was only taken out of its queue might have been in a worker's hands."""

    async def test() -> None:
        await scene.send({"a": "q"})
        scene.server.freeze()
        with pytest.raises(UnreachableServerError):
            await scene.carrier.cancel("run", {"a": "q"}, "enough")
        assert scene.broker.withdrawn == []

    asyncio.run(test())


def test_what_is_absent_is_asked_queue_by_queue(scene: Scene) -> None:
    async def test() -> None:
        await scene.send({"a": "q", "b": "other"})
        assert await scene.carrier.absent({"a": "q", "b": "q", "c": "other"}) == {"b", "c"}
        assert await scene.carrier.absent({}) == set()
        assert await scene.carrier.depth("q") == 1

    asyncio.run(test())


def test_a_result_that_cannot_be_read_is_a_death_nowhere(scene: Scene) -> None:
    """It is for Dagster's log to judge."""
    good = TaskResult(Outcome.FINISHED, PLACE)
    assert scene.carrier.read("task", good.to_bytes()) == good
    bad = scene.carrier.read("task", b"no result")
    assert (bad.outcome, bad.place) == (Outcome.DIED, NOWHERE)


def test_why_a_queue_waits_is_said_of_the_present_workers(scene: Scene) -> None:
    wait = asyncio.run(scene.carrier.queue_waits()).of("q")
    assert wait is not None
    assert wait.kind is WaitKind.UNSERVED
