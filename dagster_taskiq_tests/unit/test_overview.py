"""The read model: what waits, what is executed, by whom, as servers and workers say it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

import pytest

from dagster_taskiq.backend import TaskState
from dagster_taskiq.connections import Servers
from dagster_taskiq.messages.envelope import QueueKind
from dagster_taskiq.messages.queue_waits import WaitKind
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.overview import (
    MOST_WAITING,
    Overview,
    TaskStatus,
    TaskView,
    reach_servers,
)
from dagster_taskiq_tests.unit.overview_scene import (
    OPTIONS,
    RUN,
    RUNS,
    SERVERS,
    STEPS,
    Scene,
    step,
    worker,
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
        assert view.reason.endswith("for a lease: its run judges it.")
        await scene.backend.close_run("run", token="t")
        ((view,),) = (run.tasks for run in (await scene.read()).runs)
        assert "for a lease. The process of its run is gone" in view.reason

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


def test_a_queue_is_known_by_priorities_and_its_oldest_task() -> None:
    """Of the whole queue, also where none of its tasks is shown."""

    async def test() -> None:
        scene = Scene()
        tasks = [(9, 30.0), (9, 40.0), (5, 20.0), (5, 50.0), (1, 0.0)]
        await scene.send(
            *(step(f"s{n}", priority=it, sent_at=at, state="") for n, (it, at) in enumerate(tasks))
        )
        (queue,) = (await scene.read(most_waiting=0)).queues
        assert queue.priorities == {9: 2, 5: 2, 1: 1}
        assert queue.oldest_sent_at == 20
        assert (queue.waiting, queue.depth, queue.unseen) == ([], 5, 5)

    asyncio.run(test())


def test_what_runs_is_counted_by_queue_and_known_by_worker() -> None:
    """A step that its worker has not told of yet is its worker's, and of no queue."""

    async def test() -> None:
        scene, told, untold = Scene(), step("told"), step("untold")
        await scene.open()
        await scene.beat(worker(), told)
        for task in (told, untold):
            await scene.claim(task, worker())
        await scene.claim(step("elsewhere"), worker("v@h"))
        overview = await scene.read()
        steps = overview.queues[0]
        assert (steps.kind, steps.running) == (STEPS, 1)
        mine = overview.tasks_of_worker(worker())
        assert [(it.step_key, it.status) for it in mine] == [
            ("told", TaskStatus.RUNNING),
            (None, TaskStatus.RUNNING),
        ]

    asyncio.run(test())


def test_why_a_task_waits() -> None:
    """No worker, all of them busy, a run whose claims are elsewhere or whose process is gone."""

    async def test() -> None:
        scene = Scene()
        await scene.open()
        scene.state.identity = "here"
        await scene.beat(worker())
        here = step("here", state="here", backend="redis://here")
        other = step("other", state="there", backend="redis://there")
        orphan = step("orphan", run_id="gone")
        await scene.send(here, other, orphan, RUN, step("far", queue="far"))

        async def reasons() -> dict[str | None, str]:
            return {it.step_key: it.reason for it in (await scene.read()).tasks()}

        found = await reasons()
        assert found["here"] == found[""] == ""
        assert found["orphan"].startswith("The process of its run is gone")
        assert "another backend, redis://there," in found["other"]
        assert found["far"].startswith('No worker listens on queue "far".')
        await scene.beat(worker(busy_slots=2))
        assert (await reasons())["here"] == 'All 2 step slots of queue "dagster" are busy.'

    asyncio.run(test())


def test_only_a_queue_whose_tasks_nobody_will_take_is_stuck() -> None:
    """Not an empty one, nor one whose workers are busy."""

    async def test() -> None:
        scene = Scene()
        await scene.beat(worker(busy_slots=2, run_slots=0))
        await scene.send(step("one"), step("far", queue="far"))

        async def stuck() -> dict[str, bool]:
            return {it.name: it.is_stuck for it in (await scene.read("empty")).queues}

        assert await stuck() == {"dagster": False, "empty": False, "far": True}
        await scene.beat(worker(state="draining", run_slots=0))
        assert await stuck() == {"dagster": True, "empty": False, "far": True}
        assert [it.workers for it in (await scene.read()).queues] == [[], []]

    asyncio.run(test())


@pytest.mark.parametrize("is_one_server", [True, False])
def test_servers_say_what_they_are_or_why_they_do_not(is_one_server: bool) -> None:
    async def test() -> None:
        scene = Scene()
        servers = SERVERS
        if not is_one_server:
            servers = replace(SERVERS, broker=replace(OPTIONS, url="amqp://localhost"))
            scene.queues.freeze()
        views = await reach_servers(servers, scene.backend, scene.broker)
        roles = [it.roles for it in views]
        assert roles == ([("broker", "backend")] if is_one_server else [("broker",), ("backend",)])
        assert (views[-1].product, views[-1].problem) == ("memory", "")
        assert views[-1].seconds is not None
        if not is_one_server:
            assert (views[0].product, views[0].seconds) == (None, None)
            assert "it is frozen" in views[0].problem

    asyncio.run(test())
