"""Children are forked from a process that has loaded their code, where that is safe and right.

With real processes, without a broker: what a worker includes replaces what a child does with a
step, so that it tells how it found itself.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from multiprocessing import reduction, util
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
from dagster import DagsterInstance, DagsterRun
from dagster._core.code_pointer import CodePointer
from dagster._core.definitions.metadata.metadata_value import (
    CodeLocationReconstructionMetadataValue,
)
from dagster._core.definitions.reconstruct import ReconstructableJob, ReconstructableRepository
from dagster._core.definitions.repository_definition import RepositoryLoadData
from dagster._core.execution.retries import RetryMode
from dagster._grpc.types import ExecuteStepArgs
from dagster._serdes import pack_value

from dagster_taskiq.execution.code_locations import ARGS_KEY, EXECUTABLE_KEY, code_location
from dagster_taskiq.messages.results import TaskResult
from dagster_taskiq.worker import forked_process
from dagster_taskiq.worker import template as template_module
from dagster_taskiq.worker import templates as templates_module
from dagster_taskiq.worker.child import ChildOptions
from dagster_taskiq.worker.fork_server import fork_server
from dagster_taskiq.worker.forked_process import Forking
from dagster_taskiq.worker.guard_client import GuardClient
from dagster_taskiq.worker.log_tails import LogTails
from dagster_taskiq.worker.slot import ChildSlot
from dagster_taskiq.worker.slot_base import ChildDied
from dagster_taskiq.worker.templates import CodeState, Templates
from dagster_taskiq_tests.unit.slot_scenarios import SECONDS, play, result_of, until

#: What a worker includes: it names the instance, and has a child tell what it finds.
ACTOR = """
import gc, json, os, random, sys, time
from pathlib import Path
from types import SimpleNamespace

os.environ["DAGSTER_HOME"] = {home!r}
sys.path.insert(0, {directory!r})

from dagster._core.definitions.reconstruct import ReconstructableJob
from dagster_taskiq_tests import quick_storage
from dagster_taskiq.execution import loaded_code, step_plans
from dagster_taskiq.execution.loaded_code import LOADED
from dagster_taskiq.execution.tasks import TaskRunner
from dagster_taskiq.messages.results import Outcome, TaskResult

quick_storage.make_quick()
loaded_code._OTHER_JOBS_SHARE = 1e6  # on however busy a machine

def seconds_passed():
    clock = Path({home!r}, "clock")
    return clock.stat().st_size if clock.exists() else 0

passed_before = seconds_passed()
loaded_code.time = SimpleNamespace(
    monotonic=lambda: time.monotonic() + seconds_passed() - passed_before
)
with open({home!r} + "/included", "a") as included:
    included.write("x")

def act(runner, payload, place, *_):
    job = ReconstructableJob.from_dict(payload["executable_dict"])
    found = job.repository.pointer.module in sys.modules
    with LOADED.loading():
        version = job.get_definition().tags["version"]
    facts = dict(
        pid=os.getpid(),
        parent=os.getppid(),
        found=found,
        version=version,
        random=random.random(),
        has_instance=runner._instance(None) is not None,
        plans=list(step_plans.PLANS._plans),
        thresholds=gc.get_threshold(),
    )
    if wait := payload.get("wait"):
        Path(wait + ".begun").touch()
        while not os.path.exists(wait):
            time.sleep(0.01)
    return TaskResult(Outcome.FINISHED, place, reason=json.dumps(facts))

TaskRunner.execute_plan = act
"""

#: A code location; it counts how often it is loaded.
LOCATION = """
import gc, os
from dagster import job, repository
with open({counter!r}, "a") as counter:
    counter.write("x")
{more}

@job(tags={{"version": {version!r}}})
def it(): ...
{last}
"""

#: Makes a repository of the location's job and two others, of which one cannot be made.
OTHERS = """
alone = it

@job
def other(): ...

def make_other():
    with open(__file__ + ".others", "a") as others:
        others.write(f"{os.getpid()} ")
    return other

def fail():
    raise LookupError("no such table")

@repository
def it():
    return {"jobs": {"it": alone, "broken": fail, "other": make_other}}
"""


@dataclass(frozen=True)
class Found:
    """What a child has told."""

    pid: int
    parent: int
    found: bool
    version: str
    random: float
    has_instance: bool
    plans: list[str]
    thresholds: list[int]


class Location:
    """A code location on disk."""

    def __init__(self, directory: Path, name: str) -> None:
        self.name = name
        self._file = directory / f"{name}.py"
        self._counter = directory / f"{name}.loads"
        self._directory = directory
        self.write("1")

    def write(self, version: str, more: str = "", last: str = "") -> None:
        text = LOCATION.format(counter=str(self._counter), version=version, more=more, last=last)
        # another length, since a cached file is known by its time in whole seconds and its length
        self._file.write_text(f"{text}# {version * len(version)}\n")

    @property
    def others(self) -> list[int]:
        """The processes that have made another job than its first."""
        return [int(it) for it in Path(f"{self._file}.others").read_text().split()]

    @property
    def loads(self) -> int:
        return len(self._counter.read_text()) if self._counter.exists() else 0

    def payload(self, run_id: str, state: str = "", **more: Any) -> dict[str, Any]:
        pointer = CodePointer.from_module(self.name, "it", str(self._directory))
        value = CodeLocationReconstructionMetadataValue(state)
        data = RepositoryLoadData(reconstruction_metadata={"it": value}) if state else None
        repository = ReconstructableRepository(pointer, repository_load_data=data)
        job = ReconstructableJob(repository, "it")
        args = ExecuteStepArgs(
            job_origin=job.get_python_origin(),
            run_id=run_id,
            step_keys_to_execute=["it"],
            instance_ref=None,
            retry_mode=RetryMode.DISABLED,
            known_state=None,
            should_verify_step=False,
        )
        return {ARGS_KEY: pack_value(args), EXECUTABLE_KEY: job.to_dict(), **more}


class Part:
    """The part of a worker that has templates and slots."""

    def __init__(self, templates: Templates, slots: list[ChildSlot]) -> None:
        self.templates = templates
        self.slots = slots

    async def run(
        self, location: Location, slot: int = 0, run_id: str = "r", **more: Any
    ) -> TaskResult | ChildDied:
        return await result_of(self.slots[slot], location.payload(run_id, **more), run_id)

    async def found(self, location: Location, slot: int = 0, **more: Any) -> Found:
        result = await self.run(location, slot, **more)
        assert isinstance(result, TaskResult), result
        assert result.reason, result
        return Found(**json.loads(result.reason))

    async def load_ahead(self, location: Location) -> None:
        payload = location.payload("earlier")
        await self.templates.load_ahead(code_location(payload), json.dumps(payload))

    def reason(self, location: Location) -> str:
        """Why a location's children load it themselves."""
        (state,) = [it for it in self.templates.states if location.name in it.title]
        assert state.is_warm == (not state.reason)
        return state.reason


class Bench:
    """Where a test's code lies."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.home = directory / "home"
        self.home.mkdir()
        actor = ACTOR.format(home=str(self.home), directory=str(directory))
        (directory / "template_actor.py").write_text(actor)

    def location(self, name: str) -> Location:
        return Location(self.directory, name)

    @property
    def clock(self) -> Path:
        """Of templates and children: as many seconds pass for the code that they have loaded."""
        return self.home / "clock"

    @property
    def includes(self) -> int:
        return len((self.home / "included").read_text())

    @asynccontextmanager
    async def part(self, slots: int = 1, most: int = 8, **options: Any) -> AsyncIterator[Part]:
        """Ready slots; nothing of them is left."""
        forking = Forking(fork_server(), GuardClient())
        forking.guard.start()
        include = ("template_actor",)
        templates = Templates(forking, include, "INFO", most)
        tails = LogTails()
        many = [
            ChildSlot(forking, tails, ChildOptions(include, "INFO", it, **options), templates)
            for it in range(1, slots + 1)
        ]
        async with AsyncExitStack() as stack:
            stack.callback(forking.guard.close)
            stack.push_async_callback(templates.stop)
            for slot in many:
                stack.push_async_callback(slot.stop)
            await asyncio.gather(*(it.prepare() for it in many))
            yield Part(templates, many)
        assert not forking.guard.groups


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.syspath_prepend(tmp_path)
    return Bench(tmp_path)


def test_code_is_loaded_once_for_all_slots(bench: Bench) -> None:
    """What is included and what tasks name; each child is a process of its own."""

    async def scenario() -> None:
        heavy = bench.location("heavy_a")
        async with bench.part(slots=3) as part:
            found = [await part.found(heavy, slot) for slot in range(3)]
            assert bench.includes == 1
            assert heavy.loads == 1
            assert len({it.pid for it in found}) == 3
            (parent,) = {it.parent for it in found}
            assert parent in part.templates.pids
            assert all(it.found for it in found)
            assert all(it.has_instance for it in found)
            assert len({it.random for it in found}) == 3
            assert part.reason(heavy) == ""

    play(scenario())


def test_a_template_makes_other_jobs_too(bench: Bench) -> None:
    """One that cannot be made is the affair of its own runs."""

    async def scenario() -> None:
        code = bench.location("of_many_jobs")
        code.write("1", last=OTHERS)
        async with bench.part() as part:
            found = await part.found(code)
            assert part.reason(code) == ""
            assert code.others == [found.parent]

    play(scenario())


@pytest.mark.parametrize("own", [(), (5, 6, 7)])
def test_garbage_is_collected_as_without_a_template(bench: Bench, own: tuple[int, ...]) -> None:
    """While a template loads its code it is looked for less often, which ends with that."""

    async def scenario() -> None:
        code = bench.location("littering")
        setting = f"gc.set_threshold{own}" if own else "kept = gc.get_threshold()"
        code.write("1", f"{setting}\nassert gc.get_threshold() != {gc.get_threshold()}")
        async with bench.part() as part:
            found = await part.found(code)
            assert found.found
            assert tuple(found.thresholds) == (own or gc.get_threshold())

    play(scenario())


def test_the_plan_of_the_run_that_it_is_loaded_for_is_made_once(bench: Bench) -> None:
    """In the template, for all slots: their children are forked with the run's first steps."""

    async def scenario() -> None:
        with DagsterInstance.from_config(str(bench.home)) as instance:
            run = instance.add_run(DagsterRun("it"))
        code = bench.location("planned")
        async with bench.part(slots=2) as part:
            for slot in range(2):
                assert (await part.found(code, slot, run_id=run.run_id)).plans == [run.run_id]
            assert (await part.found(code, run_id="another")).plans == [run.run_id]

    play(scenario())


def test_a_plan_that_cannot_be_made_is_no_reason_to_have_no_template(bench: Bench) -> None:
    """The run's own steps tell what is wrong with it."""

    async def scenario() -> None:
        with DagsterInstance.from_config(str(bench.home)) as instance:
            run = instance.add_run(DagsterRun("it", run_config={"ops": {"no_such_op": {}}}))
        code = bench.location("unplanned")
        async with bench.part() as part:
            found = await part.found(code, run_id=run.run_id)
            assert (found.found, found.plans) == (True, [])

    play(scenario())


def test_code_that_is_loaded_ahead_waits_for_its_tasks(bench: Bench) -> None:
    """One that comes while it is loaded waits for that, and for no second load."""

    async def scenario() -> None:
        one, other = bench.location("ahead_a"), bench.location("ahead_b")
        async with bench.part(slots=2) as part:
            await part.load_ahead(one)
            assert (one.loads, part.reason(one)) == (1, "")
            loading = asyncio.create_task(part.load_ahead(other))
            found = await asyncio.gather(part.found(one), part.found(other, slot=1))
            await loading
            assert all(it.found for it in found)
            assert (one.loads, other.loads) == (1, 1)
            await part.load_ahead(one)
            assert one.loads == 1

    play(scenario())


def test_code_that_cannot_be_loaded_ahead_is_left_to_its_first_task(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be there no more since the last deployment: nobody is warned, and nothing listed."""
    caplog.set_level("INFO")

    async def scenario() -> None:
        code = bench.location("ahead_of_time")
        code.write("1", "raise LookupError('no such table')")
        async with bench.part() as part:
            before = list(part.templates.states)
            await part.load_ahead(code)
            assert part.templates.states == before
            assert "no such table" in caplog.text
            assert not [it for it in caplog.records if it.levelname == "WARNING"]
            code.write("22")
            assert (await part.found(code)).version == "22"
            assert part.reason(code) == ""

    play(scenario())


def test_that_code_cannot_be_forked_is_known_ahead(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said as loudly as when a task waits for it, since nobody will try it again."""

    async def scenario() -> None:
        code = bench.location("ahead_with_a_thread")
        code.write("1", HAZARDS["thread"])
        async with bench.part() as part:
            await part.load_ahead(code)
            assert "thread" in part.reason(code)
            assert "Each child loads" in caplog.text
            assert (await part.found(code)).version == "1"
            assert code.loads == 2

    play(scenario())


def test_code_that_is_loaded_ahead_makes_room_first(bench: Bench) -> None:
    """Also while it is still being loaded, and it takes the place of nothing."""

    async def scenario() -> None:
        one, other, third = (bench.location(f"ahead_{it}") for it in "cde")
        async with bench.part(most=1) as part:
            loading = asyncio.create_task(part.load_ahead(one))
            await until(lambda: part.templates._locations)
            assert (await part.found(other)).found
            await loading
            await part.load_ahead(third)
            assert third.loads == 0
            assert len(part.templates.states) == 2
            assert (await part.found(other)).found
            assert other.loads == 1

    play(scenario())


def test_a_load_that_is_given_up_while_its_process_is_forked_harms_no_other(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it is forked from has been called, and waits for what it is to fork."""
    has_called, may_tell = threading.Event(), threading.Event()
    tell = reduction.sendfds

    def tell_late(*what: Any) -> None:
        has_called.set()
        assert may_tell.wait(SECONDS)
        tell(*what)

    async def scenario() -> None:
        one, other = (bench.location(f"given_up_{it}") for it in "ab")
        async with bench.part(most=1) as part:
            (base,) = part.templates.pids
            monkeypatch.setattr(reduction, "sendfds", tell_late)
            loading = asyncio.create_task(part.load_ahead(one))
            await until(has_called.is_set)
            finding = asyncio.create_task(part.found(other))
            await until(lambda: [*part.templates._locations] == [code_location(other.payload(""))])
            may_tell.set()
            found = await finding
            assert found.found
            await loading
            assert part.templates.pids == {base, found.parent}

    play(scenario())


def test_each_state_that_definitions_are_made_of_has_a_template(bench: Bench) -> None:
    """For people it is one code location."""

    async def scenario() -> None:
        code = bench.location("stateful")
        async with bench.part() as part:
            found = [await part.found(code, state=state) for state in ("1", "2", "1", "")]
            assert all(it.found for it in found)
            assert len({it.parent for it in found}) == 3
            assert code.loads == 3
            assert part.reason(code) == ""

    play(scenario())


def test_a_fresh_child_finds_the_code_of_the_last_one(bench: Bench) -> None:
    """It waits for its task with the code that its slot has executed last."""

    async def scenario() -> None:
        one, other = bench.location("heavy_b"), bench.location("heavy_c")
        async with bench.part() as part:
            first = await part.found(one)
            part.slots[0].retire()
            await part.slots[0].prepare()
            pid = part.slots[0].pid
            assert (await part.found(one)).pid == pid != first.pid
            assert (await part.found(other)).found
            assert (await part.found(one)).found
            assert (one.loads, other.loads) == (1, 1)

    play(scenario())


def test_a_run_that_begins_after_a_change_executes_what_is_on_disk(bench: Bench) -> None:
    """Those that have begun go on in their child as they have begun, also in turn."""

    async def scenario() -> None:
        code = bench.location("changing_a")
        async with bench.part(slots=2) as part:
            old = await part.found(code, run_id="before")
            await part.found(code, run_id="between")
            await part.found(code, slot=1, run_id="before")
            code.write("22")
            for run_id in ("before", "between", "before"):
                assert (await part.found(code, run_id=run_id)).pid == old.pid
            new = await part.found(code, run_id="after")
            assert new.version == "22"
            assert new.pid != old.pid
            # a slot whose child has not seen the change itself, too
            assert (await part.found(code, slot=1, run_id="before")).version == "22"
            assert code.loads == 2

    play(scenario())


def test_code_that_is_too_old_is_loaded_anew(bench: Bench) -> None:
    """For a run that begins, not for one that has begun."""

    async def scenario() -> None:
        code = bench.location("aging")
        async with bench.part(code_max_age_seconds=1000.0) as part:
            first = await part.found(code, run_id="a")
            bench.clock.write_text("x" * 2000)
            assert (await part.found(code, run_id="a")).pid == first.pid
            assert (await part.found(code, run_id="b")).pid != first.pid
            assert code.loads == 2
            # its age is no reason to have no template for a while
            assert [it.short_lives for it in part.templates._locations.values()] == [0]

    play(scenario())


def test_code_that_is_too_old_once_it_is_loaded_is_executed(bench: Bench) -> None:
    """By a child that has loaded it for its task, after some templates that served nobody."""

    async def scenario() -> None:
        slow = bench.location("slowly_aging")
        slow.write("1", f"with open({str(bench.clock)!r}, 'a') as clock: clock.write('x' * 2000)")
        async with bench.part(code_max_age_seconds=1000.0) as part:
            assert not (await part.found(slow)).found
            assert "seconds ago, 3 times in turn" in part.reason(slow)

    play(scenario())


HAZARDS = {
    "database": "import sqlite3; db = sqlite3.connect(__file__ + '.db'); db.execute('SELECT 1')",
    "thread": "import threading, time; "
    "threading.Thread(target=time.sleep, args=(900,), daemon=True).start()",
    "connection": "import socket; server = socket.create_server(('127.0.0.1', 0)); "
    "client = socket.create_connection(server.getsockname())",
}


@pytest.mark.parametrize("more", HAZARDS.values(), ids=HAZARDS)
def test_code_that_may_not_be_forked_is_loaded_by_each_child(bench: Bench, more: str) -> None:
    """And leaves the others as they are; it is not tried again until a reload."""

    async def scenario() -> None:
        safe, hazardous = bench.location("safe"), bench.location("hazardous")
        hazardous.write("1", more)
        async with bench.part(slots=2) as part:
            assert (await part.found(safe)).found
            first = await part.found(hazardous, slot=1)
            assert not first.found
            assert part.reason(hazardous)
            part.slots[1].retire()
            assert not (await part.found(hazardous, slot=1)).found
            assert hazardous.loads == 3
            assert (await part.found(safe)).found
            assert safe.loads == 1
            hazardous.write("22")
            await part.templates.reload()
            assert part.reason(hazardous) == ""

    play(scenario())


def test_code_that_cannot_be_loaded_fails_its_own_tasks(bench: Bench) -> None:
    """With the reason that a child gives; others go on, and mended code runs at once."""

    async def scenario() -> None:
        good, bad = bench.location("good"), bench.location("bad")
        bad.write("1", "raise LookupError('no such manifest')")
        async with bench.part() as part:
            result = await part.run(bad)
            assert isinstance(result, ChildDied)
            assert "no such manifest" in part.reason(bad)
            assert (await part.found(good)).found
            bad.write("22")
            assert (await part.found(bad)).version == "22"

    play(scenario())


def test_code_that_changes_while_it_is_loaded_is_loaded_by_each_child(bench: Bench) -> None:
    async def scenario() -> None:
        restless = bench.location("restless")
        restless.write("1", "import os; os.utime(__file__, (1, 1))")
        async with bench.part() as part:
            assert not (await part.found(restless)).found
            assert "while it was loaded" in part.reason(restless)

    play(scenario())


def test_code_that_changes_all_the_time_is_left_to_its_children(bench: Bench) -> None:
    """After some templates that were worth nothing, for a while."""

    async def scenario() -> None:
        restless = bench.location("restless_b")
        async with bench.part() as part:
            for version in range(1, 6):
                restless.write("1" * version)
                found = await part.found(restless, run_id=str(version))
                assert found.version == "1" * version
            assert "times in turn" in part.reason(restless)

    play(scenario())


def test_code_that_is_old_in_each_child_is_left_to_its_children(bench: Bench) -> None:
    """A child takes for new what it has loaded for its task, never what its template has."""

    async def scenario() -> None:
        changing = bench.location("changed_by_forks")
        changing.write(
            "1",
            "import os, time\nforks = []\n"
            "def change():\n"
            "    if len(forks) > 1:  # the first is on trial\n"
            "        os.utime(__file__, ns=(time.time_ns(),) * 2)\n"
            "os.register_at_fork(before=lambda: forks.append(1), after_in_child=change)",
        )
        async with bench.part() as part:
            assert not (await part.found(changing)).found
            assert "has changed, 3 times in turn" in part.reason(changing)

    play(scenario())


def test_a_broken_reload_never_runs_the_old_code(bench: Bench) -> None:
    async def scenario() -> None:
        code = bench.location("breaking")
        async with bench.part() as part:
            assert (await part.found(code)).version == "1"
            code.write("22", "raise LookupError('broken')")
            await part.templates.reload()
            part.slots[0].retire()
            result = await part.run(code)
            assert isinstance(result, ChildDied)
            code.write("333")
            await part.templates.reload()
            assert (await part.found(code)).version == "333"

    play(scenario())


def test_a_template_that_is_killed_takes_no_child_with_it(bench: Bench) -> None:
    """What its children execute goes on; later tasks have another one."""

    async def scenario() -> None:
        code = bench.location("murdered")
        gate = bench.directory / "gate"
        async with bench.part(slots=2) as part:
            victim = (await part.found(code)).parent
            running = asyncio.create_task(part.found(code, wait=str(gate)))
            await until((bench.directory / "gate.begun").exists)
            os.kill(victim, signal.SIGKILL)
            await until(lambda: victim not in part.templates.pids)
            after = await part.found(code, slot=1)
            assert after.found
            assert after.parent != victim
            gate.touch()
            assert (await running).version == "1"
            assert code.loads == 2

    play(scenario())


def test_a_child_whose_template_was_killed_is_seen_to_end(bench: Bench) -> None:
    async def scenario() -> None:
        code = bench.location("orphaned")
        gate = bench.directory / "gate"
        async with bench.part() as part:
            victim = (await part.found(code)).parent
            running = asyncio.create_task(part.run(code, wait=str(gate)))
            await until((bench.directory / "gate.begun").exists)
            os.kill(victim, signal.SIGKILL)
            await until(lambda: victim not in part.templates.pids)
            os.kill(part.slots[0].pid, signal.SIGKILL)
            died = await running
            assert isinstance(died, ChildDied)
            assert "how is not known" in str(died)
            assert (await part.found(code)).found

    play(scenario())


#: What the code does when it is loaded for the first time, and what is said of that.
FAILED_LOADS = {
    "import time; time.sleep(900)": "it was not loaded within 1 seconds",
    # as where there is no memory left for it
    "os.kill(os.getpid(), 9)": "while it was loaded its process was killed by SIGKILL",
    "os._exit(0)": "while it was loaded its process ended with exit code 0",
    "raise LookupError('not yet')": "it cannot be loaded (LookupError: not yet)",
}


@pytest.mark.parametrize(("failure", "reason"), FAILED_LOADS.items())
def test_a_template_that_does_not_come_up_is_no_end_of_the_task(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, failure: str, reason: str
) -> None:
    """A child loads the code itself."""

    async def scenario() -> None:
        code = bench.location("failing")
        marker = bench.directory / "failing.once"
        code.write(
            "1",
            f"import os\nif not os.path.exists({str(marker)!r}):\n"
            f"    open({str(marker)!r}, 'w').close(); {failure}",
        )
        async with bench.part() as part:
            if "sleep" in failure:
                monkeypatch.setattr(template_module, "LOAD_TIMEOUT_SECONDS", 1.0)
            assert not (await part.found(code)).found
            assert part.reason(code) == reason

    play(scenario())


def no_space(monkeypatch: pytest.MonkeyPatch) -> None:
    def listen(_listener: socket.socket) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(socket.socket, "listen", listen)


def no_short_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_module, "new_address", lambda _: "/tmp/" + 200 * "x")


def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    start = forked_process.start_deaf

    def start_slots(process: ForkServerProcess, address: str) -> None:
        if process.name == "template":
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        start(process, address)

    monkeypatch.setattr(forked_process, "start_deaf", start_slots)


SHORTAGES = {
    no_space: "cannot listen: OSError(28, 'No space left on device')",
    no_short_path: "cannot listen: OSError('AF_UNIX path too long')",
    no_process: "cannot start a process: BlockingIOError(11, 'Resource temporarily unavailable')",
}


@pytest.mark.parametrize(("shortage", "reason"), SHORTAGES.items())
def test_a_template_that_cannot_be_started_leaves_nothing(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    shortage: Callable[[pytest.MonkeyPatch], None],
    reason: str,
) -> None:
    """Children load the code, until there can be one again."""

    async def scenario() -> None:
        code = bench.location("short_of_all")
        async with bench.part() as part:
            before = (sockets_of_templates(), psutil.Process().num_fds())
            with monkeypatch.context() as now:
                shortage(now)
                now.setattr(templates_module, "_RETRY_SECONDS", 0.0)
                assert not (await part.found(code)).found
                # its name is only known to a process that has loaded it
                state = CodeState("a code location", is_warm=False, reason=f"template: {reason}")
                assert state in part.templates.states
                part.slots[0].retire()
                await part.slots[0].prepare()
                assert (sockets_of_templates(), psutil.Process().num_fds()) == before
            assert (await part.found(code)).found

    play(scenario())


def sockets_of_templates() -> set[Path]:
    return set(Path(util.get_temp_dir()).glob("template-*"))


def test_a_task_that_is_stopped_while_its_code_is_loaded_never_begins(bench: Bench) -> None:
    async def scenario() -> None:
        slow = bench.location("slow_b")
        gate = bench.directory / "load"
        slow.write(
            "1",
            f"import os, time\nopen({str(gate)!r} + '.begun', 'w').close()\n"
            f"while not os.path.exists({str(gate)!r}): time.sleep(0.01)",
        )
        async with bench.part() as part:
            running = asyncio.create_task(part.run(slow))
            await until((bench.directory / "load.begun").exists)
            part.slots[0].interrupt()
            died = await running
            assert isinstance(died, ChildDied)
            assert "before it began" in str(died)
            gate.touch()
            assert (await part.found(slow)).found
            assert slow.loads == 1

    play(scenario())


def test_so_many_code_locations_have_a_template_at_once(bench: Bench) -> None:
    """The one whose last task is longest ago gives way, and its children live on."""

    async def scenario() -> None:
        first, *others = [bench.location(f"many_{it}") for it in range(3)]
        async with bench.part(slots=3, most=2) as part:
            child = await part.found(first)
            for slot, location in enumerate(others, 1):
                await part.found(location, slot)
            assert len([it for it in part.templates.states if it.is_warm]) == 3  # with the base
            # it still knows how its children end
            assert child.parent in part.templates.pids
            assert (await part.found(first, run_id="r")).pid == child.pid

    play(scenario())


def test_a_template_gives_way_when_its_last_child_has_ended(bench: Bench) -> None:
    async def scenario() -> None:
        code = bench.location("left")
        async with bench.part() as part:
            old = (await part.found(code)).parent
            code.write("22")
            assert (await part.found(code, run_id="new")).version == "22"
            await until(lambda: not psutil.pid_exists(old))

    play(scenario())


def test_memory_that_is_shared_does_not_count(bench: Bench) -> None:
    """A child of heavy code is not replaced for it."""

    async def scenario() -> None:
        heavy = bench.location("ballast")
        heavy.write("1", "ballast = [bytes(1000) for _ in range(300_000)]")
        async with bench.part(measures_memory=True) as part:
            slot = part.slots[0]
            slot._max_memory_kib = 200_000
            slot._options = ChildOptions(("template_actor",), "INFO", 1, measures_memory=True)
            first = await part.found(heavy)
            assert (await part.found(heavy)).pid == first.pid

    play(scenario())


def test_without_the_fork_servers_parts_each_child_loads_its_code(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(templates_module, "has_templates", lambda: False)
        code = bench.location("unknown_python")
        async with bench.part() as part:
            assert not (await part.found(code)).found
            assert not part.templates.pids

    play(scenario())
