"""Deaths of a worker, its children, its guard and its fork server; children that are replaced."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from dagster import DagsterEventType, DagsterRunStatus

from dagster_taskiq_tests.acceptance.harness import (
    BrokerKind,
    Run,
    Stack,
    WorkerProcess,
    is_running,
    open_stack,
    until,
)

FAILURE = DagsterEventType.STEP_FAILURE
SUCCESS = DagsterEventType.STEP_SUCCESS
UP_FOR_RETRY = DagsterEventType.STEP_UP_FOR_RETRY

LEASE_SECONDS = 3.0

#: How long a loaded machine may take, beside what a promise allows, to write and read a log.
_SLACK_SECONDS = 3.0


# --- death of the worker ------------------------------------------------------------------------


def kill_during_a_step(worker: WorkerProcess, run: Run) -> float:
    """Kill the worker once the run's step has begun; the time of that."""
    (note,) = run.await_notes("started")
    below = worker.descendants()
    assert note.pid in {process.pid for process in below}
    assert note.more["child"] in {process.pid for process in below}
    worker.kill()
    killed_at = time.time()
    _, alive = psutil.wait_procs(below, timeout=5)
    assert alive == []
    return killed_at


def time_of(run: Run, kind: DagsterEventType, step: str) -> float:
    """When an event was logged."""
    (entry,) = (
        entry
        for entry in run.logs()
        if entry.dagster_event and entry.dagster_event.event_type is kind and entry.step_key == step
    )
    return entry.timestamp


@pytest.mark.parametrize("kind", ["redis", "rabbitmq"])
def test_a_killed_worker_s_step_is_retried(kind: BrokerKind, tmp_path: Path) -> None:
    """No process of a killed worker lives on, and its step goes to another within lease + 5 s."""
    with open_stack(kind, tmp_path) as stack:
        first = stack.worker(slots=1).await_ready()
        run = stack.start("hangs_once", lease_seconds=LEASE_SECONDS)
        run.await_notes("started")
        stack.worker(slots=1).await_ready()
        killed_at = kill_during_a_step(first, run)
        assert run.wait().is_success
        waited = time_of(run, UP_FOR_RETRY, "with_grandchild") - killed_at
        assert waited <= LEASE_SECONDS + 5 + _SLACK_SECONDS
        assert run.notes("again")[0].attempt == 2
        assert run.output("add_one") == 2


def test_a_killed_worker_s_step_fails(stack: Stack) -> None:
    """Without a retry policy the run fails within lease + 5 s, with the reason in the log."""
    worker = stack.worker(slots=1).await_ready()
    run = stack.start("hangs", lease_seconds=LEASE_SECONDS)
    killed_at = kill_during_a_step(worker, run)
    assert run.wait().status is DagsterRunStatus.FAILURE
    waited = time_of(run, FAILURE, "with_grandchild") - killed_at
    assert waited <= LEASE_SECONDS + 5 + _SLACK_SECONDS
    reason = run.failure("with_grandchild")
    assert worker.full_name in reason
    assert "its lease on this attempt ended" in reason


# --- death of a child ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack with a worker of one slot, which is of use only while the slot comes back."""
    with open_stack("redis", tmp_path_factory.mktemp("stack")) as stack:
        stack.worker(slots=1).await_ready()
        yield stack


def test_deaths_of_children(single: Stack) -> None:
    """A step's process that dies fails the step at once, by its exit code or signal's name."""
    run = single.run("deaths")
    assert run.status is DagsterRunStatus.FAILURE
    assert "exit code 3" in run.failure("exits")
    assert "SIGSEGV" in run.failure("segfaults")
    assert "SIGKILL" in run.failure("kills_itself")
    # the one slot came back each time
    assert "add_one" in run.steps(SUCCESS)


def test_a_child_killed_from_outside(single: Stack) -> None:
    """A step that is killed from outside is failed at once, not when its lease of 30 s ends."""
    run = single.start("hangs")
    (note,) = run.await_notes("started")
    os.kill(note.pid, signal.SIGKILL)
    assert run.wait(15).status is DagsterRunStatus.FAILURE
    assert "SIGKILL" in run.failure("with_grandchild")
    until(lambda: not is_running(note.more["child"]), "what the step had started is dead")


def test_an_idle_child_is_killed(single: Stack) -> None:
    """Nothing comes of it: the slot gets another child before the next step."""
    (pid,) = {note.pid for note in single.run("serial").notes("ran")}
    os.kill(pid, signal.SIGKILL)
    run = single.run("serial")
    assert run.is_success
    assert run.events(UP_FOR_RETRY) == []
    assert pid not in {note.pid for note in run.notes("ran")}


def test_the_guard_is_killed(stack: Stack) -> None:
    """The worker replaces its guard, and the new one does what the first would have done."""
    worker = stack.worker(slots=1).await_ready()
    (guard,) = (p for p in worker.descendants() if "guard.py" in " ".join(p.cmdline()))
    guard.kill()
    worker.await_log("The guard process ended")
    run = stack.start("hangs", lease_seconds=LEASE_SECONDS)
    kill_during_a_step(worker, run)
    assert run.wait().status is DagsterRunStatus.FAILURE


def test_what_children_are_forked_from_is_killed(stack: Stack) -> None:
    """A step that runs goes on, and its end is seen; the next child comes from elsewhere."""
    worker = stack.worker(slots=1).await_ready()
    run = stack.start("one_gated")
    (note,) = run.await_notes("started")
    for process in psutil.Process(note.pid).parents():
        if process.pid == worker.process.pid:
            break
        process.kill()
    run.open_gate()
    assert run.wait().is_success
    os.kill(note.pid, signal.SIGKILL)
    after = stack.run("serial")
    assert after.is_success
    assert note.pid not in {it.pid for it in after.notes("ran")}
    worker.terminate()
    assert worker.wait() == 0


# --- recycling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--"]], ids=["ours", "celery"])
def test_max_tasks_per_child(stack: Stack, arguments: list[str]) -> None:
    """A child is replaced after so many tasks."""
    stack.worker(*arguments, "--max-tasks-per-child", "2", slots=1).await_ready()
    run = stack.run("serial")
    assert run.is_success
    # the first child had "one" before
    first, second, third, fourth = (note.pid for note in run.notes("ran"))
    assert first != second
    assert second == third
    assert third != fourth


def test_max_memory_per_child(stack: Stack) -> None:
    """A child above the limit is replaced, after the step that took it there has ended."""
    stack.worker("--max-memory-per-child", str(130 << 10), slots=1).await_ready()
    run = stack.run("growing")
    assert run.is_success
    assert len({note.pid for note in run.notes("ran")}) == 3
    below = stack.run("serial")
    assert len({note.pid for note in below.notes("ran")}) == 1
