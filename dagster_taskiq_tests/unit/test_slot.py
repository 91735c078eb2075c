"""A slot always has a child for the next task, whatever became of the last one.

With real children, without a broker. An included module replaces what a child does with a task, so
that it can die in every way.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest
from dagster._core.code_pointer import CodePointer
from dagster._core.definitions.reconstruct import ReconstructableJob, ReconstructableRepository

from dagster_taskiq.errors import NoProcessError, SlotError
from dagster_taskiq.messages.results import Outcome, TaskResult
from dagster_taskiq.worker import forked_process
from dagster_taskiq.worker.child import ChildOptions
from dagster_taskiq.worker.child_messages import Executed
from dagster_taskiq.worker.fork_server import fork_server
from dagster_taskiq.worker.forked_process import Forking
from dagster_taskiq.worker.guard import clock
from dagster_taskiq.worker.guard_client import GuardClient
from dagster_taskiq.worker.log_tails import LogTails
from dagster_taskiq.worker.slot import ChildSlot
from dagster_taskiq.worker.slot_base import ChildDied, Slot
from dagster_taskiq_tests.unit.slot_scenarios import PLACE, SECONDS, order, play, result_of, until

#: What a child does instead of executing a step.
ACTOR = """
import ctypes, multiprocessing, os, signal, subprocess, threading, time
from dagster_taskiq.worker import channel, child_messages
from dagster_taskiq.messages.results import Outcome, TaskResult
from dagster_taskiq.execution.tasks import TaskRunner

def act(runner, payload, place, queue, on_loaded):
    on_loaded()
    kind = payload["do"]
    reason = ""
    if kind == "exit":
        os._exit(payload["code"])
    elif kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "spawn":
        reason = str(subprocess.Popen(["sleep", "1000"]).pid)
    elif kind == "spawn and exit":
        open(payload["file"], "w").write(str(subprocess.Popen(["sleep", "1000"]).pid))
        os._exit(3)
    elif kind == "eat":
        global eaten
        eaten = b"x" * payload["bytes"]
    elif kind == "sleep":
        signal.signal(signal.SIGTERM, interrupt)
        try:
            open(payload["file"], "w").close()  # once it is there the signal may come
            time.sleep(1000)
        except InterruptedError:
            reason = "cleaned up"
    elif kind == "fork":  # by Python, or by C, so that Python does not know of it
        pid = os.fork() if payload["by"] == "python" else ctypes.PyDLL(None).fork()
        reason = f"{os.waitpid(pid, 0)[0] == pid}" if pid else "said by the copy"
    elif kind == "close":
        os.closerange(3, 256)
        files = [open(os.devnull, "w") for _ in range(payload["opens"])]
    elif kind == "scribble":
        for number in range(3, 256):
            try:
                os.write(number, payload["text"].encode())
            except OSError:
                pass
    elif kind == "speak as another":
        for it in channel._channels:
            vars(it).update({payload["attribute"]: 1})
            it.say(child_messages.Executed("", "", 0))
    elif kind == "load":
        from dagster._core.definitions.reconstruct import ReconstructableJob
        job = ReconstructableJob.from_dict(payload["executable_dict"]).get_definition()
        reason = f"{os.getpid()} {job.tags['team']}"
    elif kind == "alarm":
        signal.signal(signal.SIGALRM, interrupt)
        signal.alarm(1)
        os.environ["SLOT_LEFT"] = "x"
    elif kind == "thread":
        threading.Thread(target=time.sleep, args=(1000,), name="lingering").start()
    elif kind == "environment":
        timer = signal.getitimer(signal.ITIMER_REAL)[0]
        reason = f"{os.getpid()} {os.environ.get('SLOT_LEFT')} {timer}"
    elif kind == "start method":
        reason = f"{multiprocessing.get_start_method(allow_none=True)}"
    elif kind == "hang":
        open(payload["file"], "w").close()
        while True:
            time.sleep(1000)
    else:
        reason = f"{os.getpid()} {os.getpgid(0)} {kind}"
    return TaskResult(Outcome.FINISHED, place, reason=reason)

def interrupt(number, frame):
    raise InterruptedError

TaskRunner.execute_plan = act
"""

#: Sends its own child the soft limit's signal as soon as its worker's clock runs.
HASTY_LIMIT = """
import os, signal, time
from dagster._utils.interrupts import raise_interrupts_as
from dagster_taskiq import SoftTimeLimitError
from dagster_taskiq.execution.tasks import TaskRunner
from dagster_taskiq.messages.results import Outcome, TaskResult
from dagster_taskiq.worker import channel, child_messages

say = channel.Channel.say

def say_and_send(self, word):
    say(self, word)
    if isinstance(word, child_messages.OrderTaken):
        os.kill(os.getpid(), signal.SIGUSR1)

def act(runner, payload, place, queue, on_loaded):
    reason = "no limit"
    try:
        with raise_interrupts_as(KeyboardInterrupt):
            time.sleep(5)
    except SoftTimeLimitError as error:
        reason = str(error)
    return TaskResult(Outcome.FINISHED, place, reason=reason)

channel.Channel.say = say_and_send
TaskRunner.execute_plan = act
"""

#: Definitions that need a module of their own directory.
LOCATION = """
from dagster import job
from slot_helpers import TEAM

@job(tags={"team": TEAM})
def one(): ...

@job(tags={"team": TEAM})
def two(): ...
"""


@pytest.fixture(autouse=True)
def _modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules that children can include."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "slot_actor.py").write_text(ACTOR)


@asynccontextmanager
async def a_slot(
    *include: str, guard: GuardClient | None = None, **options: Any
) -> AsyncIterator[Slot]:
    """A slot with a guard; both are gone afterwards, with all that the children have started."""
    own_guard = guard or GuardClient()
    own_guard.start()
    slot = ChildSlot(
        Forking(fork_server(), own_guard),
        LogTails(),
        ChildOptions(include, "WARNING", 1),
        **options,
    )
    try:
        yield slot
    finally:
        await asyncio.wait_for(slot.stop(), SECONDS)
        own_guard.close()


async def run(slot: Slot, do: str = "echo", **payload: Any) -> TaskResult | ChildDied:
    return await result_of(slot, {"do": do, **payload})


async def pid_of(slot: Slot) -> int:
    """Of the child that executes a task now."""
    result = await run(slot)
    assert isinstance(result, TaskResult)
    return int(result.reason.split()[0])


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_prepared_child_executes_tasks_one_after_the_other() -> None:
    """It is the same warm child, the leader of its process group, and ``prepare`` keeps it."""

    async def scenario() -> None:
        async with a_slot("slot_actor") as slot:
            assert slot.pid == 0
            await slot.prepare()
            pid = slot.pid
            for number in range(3):
                await slot.prepare()
                result = await run(slot, f"task {number}")
                assert isinstance(result, TaskResult)
                assert result.reason == f"{pid} {pid} task {number}"
            assert slot.pid == pid
        assert not is_running(pid)

    play(scenario())


def test_a_broken_payload_is_an_error_and_the_child_lives_on() -> None:
    """With the real task code: whatever stands in the payload, the child answers."""

    async def scenario() -> None:
        async with a_slot(max_memory_kib=1_000_000) as slot:
            await slot.prepare()
            pid = slot.pid
            packed = {"__class__": "NoSuchClass"}
            for payload in ({}, {"execute_step_args_packed": packed, "executable_dict": {}}):
                answer = await slot.run(order(payload), lambda _: None)
                assert isinstance(answer, Executed)
                result = TaskResult.from_bytes(answer.result.encode())
                assert result.outcome is Outcome.ERROR
                assert result.error
                assert result.place == replace(PLACE, pid=pid)
                assert answer.own_kib > 1000
            assert slot.pid == pid

    play(scenario())


@pytest.mark.parametrize(
    ("do", "text", "code"),
    [
        ({"do": "exit", "code": 0}, "exit code 0", 0),
        ({"do": "exit", "code": 7}, "exit code 7", 7),
        ({"do": "kill"}, "killed by SIGKILL", -9),
    ],
)
def test_a_child_that_dies_says_how_and_is_replaced(
    do: dict[str, Any], text: str, code: int
) -> None:
    """At once, with the exit code or the signal's name; the next task has a new child."""

    async def scenario() -> None:
        async with a_slot("slot_actor") as slot:
            await slot.prepare()
            pid = slot.pid
            began = time.monotonic()
            died = await run(slot, **do)
            assert isinstance(died, ChildDied)
            assert died == ChildDied(code, pid)
            assert text in str(died)
            assert time.monotonic() - began < 5
            assert await pid_of(slot) != pid

    play(scenario())


def test_an_idle_child_that_is_killed_is_replaced() -> None:
    """Before it is noticed, and after."""

    async def scenario() -> None:
        async with a_slot("slot_actor") as slot:
            await slot.prepare()
            for notice in (False, True):
                pid = slot.pid
                os.kill(pid, signal.SIGKILL)
                if notice:
                    await until(lambda pid=pid: not is_running(pid))  # type: ignore[misc]
                    await asyncio.sleep(0)
                groups: list[int] = []
                answer = await slot.run(order({"do": "echo"}), groups.append)
                assert isinstance(answer, Executed)
                assert slot.pid != pid
                # whoever guards the task has heard of the child that really executes it
                assert groups[-1] == slot.pid

    play(scenario())


def test_a_module_that_cannot_be_included_is_the_reason(tmp_path: Path) -> None:
    """Missing, raising, or ending the process; the slot can be used when it is mended."""
    (tmp_path / "slot_raises.py").write_text("raise ValueError('not today')")
    (tmp_path / "slot_exits.py").write_text("import sys; sys.exit(4)")
    (tmp_path / "slot_dies.py").write_text("import os; os._exit(5)")

    async def scenario() -> None:
        for module, reason in {
            "slot_missing": "No module named 'slot_missing'",
            "slot_raises": "ValueError: not today",
            "slot_exits": "slot_exits.*SystemExit: 4",
            "slot_dies": "exit code 5",
        }.items():
            async with a_slot(module) as slot:
                for _ in range(2):
                    with pytest.raises(SlotError, match=f"slot 1: .*{reason}"):
                        await slot.prepare()
                    assert slot.pid == 0
                (tmp_path / f"{module}.py").write_text("")
                await slot.prepare()
                assert slot.pid

    play(scenario())


def test_a_fresh_child_runs_what_stands_on_disk_now(tmp_path: Path) -> None:
    """User code is not preloaded: a new child has the new module."""
    module = tmp_path / "slot_versioned.py"

    def version(number: int) -> None:
        module.write_text(
            ACTOR
            + f"\nTaskRunner.execute_plan = lambda runner, payload, place, queue, on_loaded: ("
            f"TaskResult(Outcome.FINISHED, place, reason='version {number}'))"
        )

    async def scenario() -> None:
        async with a_slot("slot_versioned", max_tasks=1) as slot:
            for number in (1, 20):
                version(number)
                result = await run(slot)
                assert isinstance(result, TaskResult)
                assert result.reason == f"version {number}"

    play(scenario())


def test_code_that_changes_with_each_import_is_executed(tmp_path: Path) -> None:
    """By a child that was started for the task: the next one would find the same."""
    restless = "import os, time; os.utime(__file__, ns=(time.time_ns(),) * 2)"
    (tmp_path / "slot_restless.py").write_text(restless)

    async def scenario() -> None:
        async with a_slot("slot_actor", "slot_restless") as slot:
            pids = []
            for run_id in ("a", "a", "b"):
                answer = await slot.run(order({"do": "echo"}, run_id), lambda _: None)
                assert isinstance(answer, Executed)
                pids.append(slot.pid)
            assert pids[0] == pids[1]
            assert pids[1] != pids[2]

    play(scenario())


def test_a_child_is_replaced_after_so_many_tasks() -> None:
    """Between tasks only."""

    async def scenario() -> None:
        async with a_slot("slot_actor", max_tasks=2) as slot:
            pids = [await pid_of(slot) for _ in range(6)]
            assert pids[0] == pids[1]
            assert pids[2] == pids[3]
            assert pids[4] == pids[5]
            assert len(set(pids)) == 3

    play(scenario())


def test_a_child_is_replaced_above_so_much_memory() -> None:
    """After the task in which it has grown."""

    async def scenario() -> None:
        async with a_slot("slot_actor", max_memory_kib=600_000) as slot:
            first = await pid_of(slot)
            assert await pid_of(slot) == first
            await run(slot, "eat", bytes=700_000_000)
            assert await pid_of(slot) != first

    play(scenario())


def test_what_a_dead_child_has_started_is_killed(tmp_path: Path) -> None:
    """A grandchild does not outlive the child, with or without a word from it."""
    note = tmp_path / "pid"

    async def scenario() -> None:
        async with a_slot("slot_actor") as slot:
            died = await run(slot, "spawn and exit", file=str(note))
            assert isinstance(died, ChildDied)
            assert died.exit_code == 3
            await until(lambda: not is_running(int(note.read_text())))
            spawned = await run(slot, "spawn")
            assert isinstance(spawned, TaskResult)
            assert is_running(int(spawned.reason))
        await until(lambda: not is_running(int(spawned.reason)))

    play(scenario())


def test_an_interrupted_task_can_clean_up(tmp_path: Path) -> None:
    """SIGTERM reaches the task; its child is replaced, since it may have left something behind."""
    started = tmp_path / "started"

    async def scenario() -> None:
        async with a_slot("slot_actor") as slot:
            await slot.prepare()
            pid = slot.pid
            running = asyncio.create_task(run(slot, "sleep", file=str(started)))
            await until(started.exists)
            slot.interrupt()
            result = await running
            assert isinstance(result, TaskResult)
            assert result.reason == "cleaned up"
            assert await pid_of(slot) != pid

    play(scenario())


def test_a_task_that_ignores_the_interrupt_is_killed(tmp_path: Path) -> None:
    """``kill`` ends it and everything it has started."""
    started = tmp_path / "started"

    async def scenario() -> None:
        async with a_slot("slot_actor") as slot:
            running = asyncio.create_task(run(slot, "hang", file=str(started)))
            await until(started.exists)
            slot.interrupt()
            await asyncio.sleep(0.05)
            assert not running.done()
            slot.kill()
            died = await running
            assert isinstance(died, ChildDied)
            assert died.exit_code == -signal.SIGKILL
            await pid_of(slot)

    play(scenario())


def test_signals_between_tasks_mean_nothing() -> None:
    """A cancel that comes too late does not break the next task."""

    async def scenario() -> None:
        async with a_slot("slot_actor") as slot:
            pid = await pid_of(slot)
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGINT)
            assert await pid_of(slot) == pid

    play(scenario())


def test_a_soft_limit_that_is_over_at_once_is_not_lost(tmp_path: Path) -> None:
    """Its signal waits for the step's own code."""
    (tmp_path / "hasty_limit.py").write_text(HASTY_LIMIT)

    async def scenario() -> None:
        async with a_slot("hasty_limit") as slot:
            limited = replace(order({}), soft_timeout_seconds=0.25)
            answer = await slot.run(limited, lambda _: None)
            assert isinstance(answer, Executed)
            assert "limit of 0.25 s" in TaskResult.from_bytes(answer.result.encode()).reason

    play(scenario())


def test_the_guards_deadline_ends_a_task(tmp_path: Path) -> None:
    """The slot sees it as a death by SIGKILL."""
    started = tmp_path / "started"

    async def scenario() -> None:
        guard = GuardClient()
        async with a_slot("slot_actor", guard=guard) as slot:
            running = asyncio.create_task(run(slot, "hang", file=str(started)))
            await until(started.exists)
            guard.set_deadline(slot.pid, clock())
            died = await running
            assert isinstance(died, ChildDied)
            assert str(died) == "its process was killed by SIGKILL"

    play(scenario())


def test_stopping_does_not_wait_for_a_child_that_has_just_begun(tmp_path: Path) -> None:
    """Whenever it comes: also before the child leads its own process group."""
    (tmp_path / "slot_slow.py").write_text("import time; time.sleep(1000)")

    async def scenario() -> None:
        for _ in range(5):
            async with a_slot("slot_slow") as slot:
                preparing = asyncio.create_task(slot.prepare())
                for _ in iter(lambda slot=slot: slot.pid, 0):  # type: ignore[misc]
                    await asyncio.sleep(0)  # the very first moment is wanted
                pid = slot.pid
                preparing.cancel()
                await asyncio.gather(preparing, return_exceptions=True)
                began = time.monotonic()
                await asyncio.wait_for(slot.stop(), 10)
                assert time.monotonic() - began < 5
            assert not is_running(pid)

    play(scenario())


def test_signals_to_a_child_that_nobody_knows_to_be_dead() -> None:
    """The guard may have killed it a moment ago: that is no error of the worker's."""

    async def scenario() -> None:
        async with a_slot("slot_actor") as slot:
            await slot.prepare()
            child = psutil.Process(slot.pid)
            child.kill()
            deadline = time.monotonic() + SECONDS
            while child.is_running():  # without a turn of the event loop, which would note the end
                assert time.monotonic() < deadline
            slot.interrupt()
            slot.warn()
            slot.kill()
            assert await pid_of(slot) != child.pid

    play(scenario())


def test_who_is_cancelled_while_a_child_ends_spoils_nothing() -> None:
    """The child's end is still noted, and who stops the slot after that gets through."""

    async def scenario() -> None:
        async with a_slot("slot_actor") as slot:
            for _ in range(5):
                await slot.prepare()
                pid = slot.pid
                stopping = asyncio.create_task(slot.stop())
                await asyncio.sleep(0)  # it waits for the child's end now
                stopping.cancel()
                await asyncio.gather(stopping, return_exceptions=True)
                await slot.stop()
                await until(lambda pid=pid: not is_running(pid))
            assert await pid_of(slot)

    play(scenario())


def test_stopping_twice_and_before_the_start_does_nothing() -> None:
    """A worker that fails early stops in the same order as any other."""

    async def scenario() -> None:
        async with a_slot("slot_actor") as slot:
            await slot.stop()
            await slot.prepare()
            await slot.stop()
            await slot.stop()
            slot.interrupt()
            slot.kill()
            await pid_of(slot)

    play(scenario())


def test_large_tasks_and_results_fit() -> None:
    """Messages of many megabytes, both ways."""
    text = "x" * 3_000_000

    async def scenario() -> None:
        async with a_slot("slot_actor") as slot:
            result = await run(slot, text)
            assert isinstance(result, TaskResult)
            assert result.reason.endswith(text)

    play(scenario())


@pytest.mark.parametrize("by", ["python", "c"])
def test_a_forked_copy_of_a_child_ends_where_it_returns(by: str) -> None:
    """It says nothing and takes no task; the child goes on and answers for itself."""

    async def scenario() -> None:
        async with a_slot("slot_actor") as slot:
            pid = await pid_of(slot)
            for _ in range(3):
                result = await run(slot, "fork", by=by)
                assert isinstance(result, TaskResult)
                assert result.reason == "True"
                assert await pid_of(slot) == pid

    play(scenario())


@pytest.mark.parametrize(
    ("do", "payload", "text"),
    [
        ("close", {"opens": 0}, "exit code 1"),
        ("close", {"opens": 64}, "exit code 1"),
        ("scribble", {"text": "x"}, "no message"),
        ("scribble", {"text": "some words of more than a few bytes"}, "no message"),
        ("speak as another", {"attribute": "_task"}, "not about its task"),
    ],
)
def test_what_is_no_answer_is_a_dead_child(do: str, payload: dict[str, Any], text: str) -> None:
    """Whatever a step does to its descriptors costs it its child, and the other slots nothing."""

    async def scenario() -> None:
        async with a_slot("slot_actor") as slot, a_slot("slot_actor") as other:
            pids = [await pid_of(slot), await pid_of(slot), await pid_of(other)]
            died = await run(slot, do, **payload)
            assert isinstance(died, ChildDied)
            assert text in str(died)
            assert await pid_of(slot) not in pids
            assert await pid_of(other) == pids[-1]

    play(scenario())


def test_multiprocessing_in_a_child_is_as_in_a_fresh_python() -> None:
    """Its default is Python's own, and the worker's fork server is out of reach."""

    async def scenario() -> None:
        async with a_slot("slot_actor") as slot:
            result = await run(slot, "start method")
            assert isinstance(result, TaskResult)
            assert result.reason == "None"

    play(scenario())


def test_a_child_executes_the_code_of_one_location(tmp_path: Path) -> None:
    """Two locations have a module of the same name: each task finds its own.

    Jobs of the same location share the child, and tasks that name no code go to any.
    """
    for team in ("a", "b"):
        (tmp_path / team).mkdir()
        (tmp_path / team / "slot_helpers.py").write_text(f"TEAM = {team!r}")
        (tmp_path / team / "slot_definitions.py").write_text(LOCATION)

    async def load(slot: Slot, team: str, job: str = "one") -> list[str]:
        file = str(tmp_path / team / "slot_definitions.py")
        pointer = CodePointer.from_python_file(file, job, str(tmp_path / team))
        executable = ReconstructableJob(ReconstructableRepository(pointer), job).to_dict()
        result = await run(slot, "load", executable_dict=executable)
        assert isinstance(result, TaskResult)
        return result.reason.split()

    async def scenario() -> None:
        async with a_slot("slot_actor") as slot:
            pid = str(await pid_of(slot))
            assert await load(slot, "a") == [pid, "a"]
            assert await load(slot, "a", job="two") == [pid, "a"]
            assert str(await pid_of(slot)) == pid
            other_pid, team = await load(slot, "b")
            assert team == "b"
            assert other_pid != pid

    play(scenario())


def test_what_a_step_leaves_behind_does_not_meet_the_next_one() -> None:
    """What can be put back is; a child with a thread or process that goes on is replaced."""

    async def scenario() -> None:
        async with a_slot("slot_actor") as slot:
            pid = await pid_of(slot)
            await run(slot, "alarm")
            result = await run(slot, "environment")
            assert isinstance(result, TaskResult)
            assert result.reason == f"{pid} None 0.0"
            for what in ("thread", "spawn"):
                pid = await pid_of(slot)
                left = await run(slot, what)
                assert isinstance(left, TaskResult)
                assert await pid_of(slot) != pid

    play(scenario())


@pytest.mark.parametrize(
    ("module", "name", "error"),
    [
        (socket, "socketpair", OSError(errno.EMFILE, "Too many open files")),
        (forked_process, "start_deaf", OSError(errno.EAGAIN, "Resource temporarily unavailable")),
        (forked_process, "start_deaf", EOFError("the fork server is gone")),
        (forked_process, "start_deaf", RuntimeError("can't start new thread")),
    ],
)
def test_a_slot_without_a_process_has_one_when_there_can_be_one(
    module: Any, name: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That there can be none is no failure of the task; nothing is left open meanwhile."""

    async def scenario() -> None:
        async with a_slot("slot_actor") as slot:
            with monkeypatch.context() as shortage:
                shortage.setattr(module, name, _raise(error))
                before = psutil.Process().num_fds()
                for _ in range(3):
                    with pytest.raises(NoProcessError, match="slot-1: cannot start a process"):
                        await slot.prepare()
                assert psutil.Process().num_fds() == before
            assert isinstance(await run(slot), TaskResult)

    play(scenario())


def _raise(error: Exception) -> Callable[..., NoReturn]:
    def function(*_: object, **__: object) -> NoReturn:
        raise error.with_traceback(None)

    return function
