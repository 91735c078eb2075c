"""Servers in memory with what senders and workers have left there, for tests of what is seen."""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Any

from dagster_taskiq.backend import Claim, ClaimAnswer
from dagster_taskiq.backend.memory import MemoryBackend, MemoryServer
from dagster_taskiq.brokers.memory import MemoryBroker, MemoryQueues
from dagster_taskiq.connections import Servers
from dagster_taskiq.messages.envelope import PROTOCOL, Envelope, QueueKind, TaskName
from dagster_taskiq.messages.results import Place
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.messages.worker_records import RunningTask, WorkerRecord
from dagster_taskiq.overview import MOST_WAITING, Overview, read_overview
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
            RunningTask(
                it.task_id, it.run_id, it.step_key or "", it.attempt, it.queue, 17.0, it.job
            )
            for it in running
        ]
        await self.backend.heartbeat(worker, expires_seconds=600, running=tasks)

    async def read(self, *queues: str, most_waiting: int = MOST_WAITING) -> Overview:
        return await read_overview(self.servers, self.backend, self.broker, queues, most_waiting)


def worker(name: str = "w@h", **values: Any) -> WorkerRecord:
    values = {"slots": 2, "run_slots": 1, "protocol": PROTOCOL, **values}
    return WorkerRecord(name, name, "h", 7, ("dagster",), **values)


def step(key: str, **values: Any) -> Envelope:
    return replace(STEP_TASK, task_id=str(uuid.uuid4()), step_key=key, **values)


RUN = replace(
    STEP_TASK, task_id=str(uuid.uuid4()), name=TaskName.EXECUTE_JOB, step_key=None, attempt=0
)
