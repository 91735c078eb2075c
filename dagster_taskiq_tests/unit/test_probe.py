"""The doctor's probe: it says whether a worker answers, and leaves nothing to be executed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from dagster_taskiq.backend import Claim, ClaimAnswer
from dagster_taskiq.brokers.memory import MemoryBroker
from dagster_taskiq.doctor.probe import Answer, Probe, probe_queues
from dagster_taskiq.messages.envelope import Envelope, QueueKind
from dagster_taskiq_tests.unit.overview_scene import RUNS, STEPS, Scene
from dagster_taskiq_tests.unit.worker_stand_ins import PLACE

#: Long enough for an answer on a loaded machine; and for what is meant to get none.
PATIENCE_SECONDS, SHORT_SECONDS = 20.0, 0.2

Probing = Callable[[], Awaitable[list[Probe]]]


class Worker:
    """Takes tasks of a queue as a worker does, and keeps what it was told at the claims."""

    def __init__(self, scene: Scene, kind: QueueKind) -> None:
        physical = scene.servers.physical_queue(kind, "dagster")
        self._scene, self._kind = scene, kind
        self._broker = MemoryBroker(scene.queues, [physical])
        self.answers: list[ClaimAnswer] = []

    async def work(self) -> None:
        async for delivery in self._broker.deliveries():
            task = Envelope.from_bytes(delivery.data, self._scene.servers.signer)
            claim = Claim(task.run_id, task.task_id, "t", task.lease_seconds, task.epoch, PLACE)
            is_step = self._kind is STEPS
            answer = await self._scene.backend.claim(
                claim, needs_live_run=is_step, until_begun=not is_step
            )
            self.answers.append(answer)
            await delivery.ack()


async def probed(
    scene: Scene, *kinds: QueueKind, workers: list[Worker], seconds: float = PATIENCE_SECONDS
) -> list[Probe]:
    tasks = [asyncio.create_task(worker.work()) for worker in workers]
    parts = [(kind, "dagster") for kind in kinds]
    try:
        return await probe_queues(scene.servers, scene.backend, scene.broker, parts, seconds)
    finally:
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


def test_a_worker_answers_a_probe_without_getting_it() -> None:
    """Of steps and of runs; nothing is left that is shown, or that could be claimed."""

    async def test() -> None:
        scene = Scene()
        workers = [Worker(scene, STEPS), Worker(scene, RUNS)]
        found = await probed(scene, STEPS, RUNS, workers=workers)
        assert [(it.kind, it.answer) for it in found] == [
            (STEPS, Answer.ANSWERED),
            (RUNS, Answer.TAKEN),
        ]
        assert all(0 < it.seconds < PATIENCE_SECONDS for it in found)
        assert [it.answers for it in workers] == [[ClaimAnswer.RUN_GONE], [ClaimAnswer.CANCELLED]]
        overview = await scene.read("dagster")
        assert list(overview.tasks()) == []
        assert list(overview.runs) == []

    asyncio.run(test())


def test_a_probe_that_nobody_takes_is_withdrawn() -> None:
    async def test() -> None:
        scene = Scene()
        found = await probed(scene, STEPS, RUNS, workers=[], seconds=SHORT_SECONDS)
        assert [it.answer for it in found] == [Answer.SILENT] * 2
        assert all(it.depth == 0 for it in (await scene.read("dagster")).queues)

    asyncio.run(test())


def test_what_cannot_be_withdrawn_is_dropped_by_who_finds_it() -> None:
    """On RabbitMQ; the run that it is of is over."""

    async def test() -> None:
        scene = Scene(is_searchable=False)
        (found,) = await probed(scene, STEPS, workers=[], seconds=SHORT_SECONDS)
        assert found.answer is Answer.SILENT
        late = Worker(scene, STEPS)
        (second,) = await probed(scene, STEPS, workers=[late])
        assert second.answer is Answer.ANSWERED
        assert late.answers == [ClaimAnswer.CANCELLED, ClaimAnswer.RUN_GONE]

    asyncio.run(test())


def test_a_server_that_goes_away_is_a_finding() -> None:
    async def test() -> None:
        scene = Scene()
        scene.state.freeze()
        (found,) = await probed(scene, STEPS, workers=[])
        assert found.answer is Answer.FAILED
        assert found.problem

    asyncio.run(test())
