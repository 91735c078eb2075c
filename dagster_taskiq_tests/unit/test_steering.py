"""Emptying and moving queues, and cancelling tasks, on servers in memory of both sorts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest

from dagster_taskiq.backend import Claim, ClaimAnswer, TaskState
from dagster_taskiq.connections import Servers
from dagster_taskiq.errors import DagsterTaskiqError
from dagster_taskiq.messages.envelope import Envelope, TaskName
from dagster_taskiq.messages.results import Outcome, TaskResult
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq.steering import queues
from dagster_taskiq.steering.helm import Helm
from dagster_taskiq.steering.queues import Emptied, move_tasks, purge
from dagster_taskiq.steering.tasks import CancelOutcome, cancel_task
from dagster_taskiq_tests.contract.broker_bench import eventually
from dagster_taskiq_tests.unit.overview_scene import RUN, RUNS, STEPS, Scene, step, worker

OPTIONS = ServerOptions("redis://localhost")
SIGNED = Servers(OPTIONS, OPTIONS, Signer(["k" * 32]))

Scenario = Callable[[Scene, Helm], Coroutine[Any, Any, None]]


@pytest.fixture(params=[True, False], ids=["searchable", "blind"])
def is_searchable(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def play(scenario: Scenario, *, is_searchable: bool = True) -> None:
    async def run() -> None:
        scene = Scene(SIGNED, is_searchable=is_searchable)
        await scene.open()
        await scenario(scene, Helm(SIGNED, scene.backend, scene.broker, "h", "me"))

    asyncio.run(run())


async def result_of(scene: Scene, task: Envelope) -> TaskResult:
    (data,) = (await scene.backend.read_results(task.run_id, [task.task_id])).values()
    return TaskResult.from_bytes(data, SIGNED.signer, task.task_id)


async def state_of(scene: Scene, task: Envelope) -> TaskState:
    _, reports = await scene.backend.inspect(task.run_id, [task.task_id])
    return reports[task.task_id].state


def sent(scene: Scene, key: str, **values: Any) -> Envelope:
    return step(key, epoch=scene.epoch, **values)


def test_what_waits_is_purged_and_its_runs_hear_of_it(is_searchable: bool) -> None:
    """What a worker executes is left, also where its message came back to the queue."""

    async def scenario(scene: Scene, helm: Helm) -> None:
        a, b, claimed = (sent(scene, key) for key in ("a", "b", "claimed"))
        other = sent(scene, "c", queue="other")
        gone = sent(scene, "gone", run_id="a run without a loop")
        await scene.send(a, b, claimed, other, gone)
        await scene.send(sent(scene, "forged"), signer=Signer(["x" * 32]))
        await scene.claim(claimed, worker())
        emptied = await purge(helm, "dagster", "Removed.", None)
        assert emptied == Emptied(steps=2, over=1, unreadable=1, left=1)
        for task in (a, b):
            result = await result_of(scene, task)
            assert (result.outcome, result.is_cancelled) == (Outcome.ERROR, True)
            assert result.reason == "Removed."
            assert result.place.worker == "me@h"
        assert await state_of(scene, claimed) is TaskState.CLAIMED
        assert await scene.broker.depth(SIGNED.physical_queue(STEPS, "dagster")) == 1
        assert await scene.broker.depth(SIGNED.physical_queue(STEPS, "other")) == 1
        assert set(await scene.backend.wait_for_results("run", 1)) == {a.task_id, b.task_id}

    play(scenario, is_searchable=is_searchable)


@pytest.mark.parametrize("name", [TaskName.EXECUTE_JOB, TaskName.RESUME_JOB])
def test_whole_runs_are_cancelled_in_dagster_or_stay(name: TaskName) -> None:
    """First in Dagster: whatever happens then, no worker starts the run, and it waits for none."""

    async def scenario(scene: Scene, helm: Helm) -> None:
        run = replace(RUN, name=name, epoch=scene.epoch)
        await scene.send(run)
        assert await purge(helm, "dagster", "Removed.", None) == Emptied(left=1)
        cancelled: list[tuple[str, str]] = []

        async def cancel(run_id: str, reason: str) -> bool:
            assert await state_of(scene, run) is TaskState.CLAIMED  # no worker can start it
            cancelled.append((run_id, reason))
            return True

        assert await purge(helm, "dagster", "Removed.", cancel) == Emptied(runs=1)
        assert cancelled == [("run", "Removed.")]
        assert await state_of(scene, run) is TaskState.DONE
        assert await scene.broker.depth(SIGNED.physical_queue(RUNS, "dagster")) == 0

    play(scenario)


@pytest.mark.parametrize("name", [TaskName.EXECUTE_JOB, TaskName.RESUME_JOB])
def test_a_run_that_dagster_does_not_cancel_is_for_a_worker_as_before(name: TaskName) -> None:
    """It is of another instance, or Dagster's database is away."""

    async def scenario(scene: Scene, helm: Helm) -> None:
        run = replace(RUN, name=name, epoch=scene.epoch)
        await scene.send(run)

        async def unknown(_run_id: str, _reason: str) -> bool:
            return False

        async def away(_run_id: str, _reason: str) -> bool:
            raise DagsterTaskiqError("Dagster's database is away.")

        assert await purge(helm, "dagster", "Removed.", unknown) == Emptied(left=1)
        with pytest.raises(DagsterTaskiqError, match="is away"):
            await purge(helm, "dagster", "Removed.", away)
        assert await scene.broker.depth(SIGNED.physical_queue(RUNS, "dagster")) == 1
        claim = Claim(run.run_id, run.task_id, "t", 600, scene.epoch, helm.place)
        launched = name is TaskName.EXECUTE_JOB
        answer = await scene.backend.claim(claim, needs_live_run=False, until_begun=launched)
        assert answer is ClaimAnswer.GRANTED

    play(scenario)


def test_a_step_that_is_moved_is_for_its_run_to_send_again(is_searchable: bool) -> None:
    async def scenario(scene: Scene, helm: Helm) -> None:
        a = sent(scene, "a")
        await scene.send(a)
        assert await move_tasks(helm, "dagster", "far", "Why.") == Emptied(steps=1)
        result = await result_of(scene, a)
        assert (result.outcome, result.queue, result.reason) == (Outcome.REFUSED, "far", "Why.")
        assert await state_of(scene, a) is TaskState.REFUSED
        assert await scene.backend.reopen(a.run_id, a.task_id)

    play(scenario, is_searchable=is_searchable)


def test_a_run_that_is_moved_is_sent_by_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which then looks for it in the other queue."""

    async def scenario(scene: Scene, helm: Helm) -> None:
        run = replace(RUN, epoch=scene.epoch)
        await scene.send(run)
        moving = asyncio.create_task(move_tasks(helm, "dagster", "far", "Why."))
        await eventually(lambda: _is_refused(scene, run))
        result = await result_of(scene, run)
        assert (result.queue, result.reason) == ("far", "Why.")
        assert await scene.backend.reopen(run.run_id, run.task_id)
        assert await moving == Emptied(runs=1)
        assert await scene.broker.depth(SIGNED.physical_queue(RUNS, "far")) == 0

    monkeypatch.setattr(queues, "LAUNCHER_SECONDS", 600.0)
    play(scenario)


async def _is_refused(scene: Scene, run: Envelope) -> bool:
    return await state_of(scene, run) is TaskState.REFUSED


@pytest.mark.parametrize("name", [TaskName.EXECUTE_JOB, TaskName.RESUME_JOB])
def test_a_run_is_moved_whose_launcher_lives_no_more(
    name: TaskName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after ``dagster job launch``: the command sends it itself."""

    async def scenario(scene: Scene, helm: Helm) -> None:
        run = replace(RUN, name=name, epoch=scene.epoch)
        await scene.send(run)
        assert await move_tasks(helm, "dagster", "far", "Why.") == Emptied(runs=1)
        assert await state_of(scene, run) is TaskState.UNKNOWN
        physical = SIGNED.physical_queue(RUNS, "far")
        (message,) = await scene.broker.peek(physical, 5) or ()
        moved = Envelope.from_bytes(message.data, SIGNED.signer)
        assert (moved.task_id, moved.queue, moved.payload) == (run.task_id, "far", run.payload)

    monkeypatch.setattr(queues, "LAUNCHER_SECONDS", 0.05)
    play(scenario)


def test_a_queue_that_is_filled_meanwhile_does_not_hold_us() -> None:
    """Its runs send again what is moved within a queue, and others send more."""

    async def scenario(scene: Scene, helm: Helm) -> None:
        await scene.send(sent(scene, "a"))
        claim = scene.backend.claim

        async def refilled(*arguments: Any, **more: Any) -> Any:
            await scene.send(sent(scene, "more"))
            return await claim(*arguments, **more)

        scene.backend.claim = refilled  # type: ignore[method-assign]
        assert (await purge(helm, "dagster", "", None)).steps == 1

    play(scenario)


# --- one task ---


async def cancel(scene: Scene, helm: Helm, task: Envelope) -> CancelOutcome:
    tasks = {it.task_id: it for it in (await scene.read()).tasks()}
    return await cancel_task(helm, tasks[task.task_id], "Why.")


def test_a_task_that_waits_is_ended_and_taken_out_of_its_queue() -> None:
    async def scenario(scene: Scene, helm: Helm) -> None:
        a, b = sent(scene, "a"), sent(scene, "b")
        await scene.send(a, b)
        assert await cancel(scene, helm, b) is CancelOutcome.ENDED
        result = await result_of(scene, b)
        assert (result.is_cancelled, result.reason) == (True, "Why.")
        assert await state_of(scene, a) is TaskState.UNKNOWN
        assert await scene.broker.depth(SIGNED.physical_queue(STEPS, "dagster")) == 1

    play(scenario)


def test_the_worker_of_a_task_that_is_executed_is_told() -> None:
    async def scenario(scene: Scene, helm: Helm) -> None:
        a = sent(scene, "a")
        await scene.claim(a, worker())
        await scene.beat(worker(), a)
        assert await cancel(scene, helm, a) is CancelOutcome.TOLD
        (order,) = await scene.backend.wait_for_control("w@h", 1)
        assert a.task_id in order.decode()
        assert "Why." in order.decode()

    play(scenario)
