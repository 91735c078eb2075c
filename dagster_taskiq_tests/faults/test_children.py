"""A child dies: one step fails, by the reason, and nobody else notices.

Between a worker and its children there is no broker, so one is enough here.
"""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from dagster_taskiq_tests.acceptance.harness import Run, Stack, is_running, open_stack, until
from dagster_taskiq_tests.faults.checks import (
    FAILURE,
    SLACK_SECONDS,
    STEP_FAILURE,
    TEST_SECONDS,
    UP_FOR_RETRY,
    check_each_once,
    executions,
    start,
    wall_time_of,
)

pytestmark = pytest.mark.timeout(TEST_SECONDS)

#: How soon a child's death is known; the lease, of 30 s here, has no part in it.
_DEATH_SECONDS = 2.0
_LEASE_SECONDS = 30.0

#: What the control group of the test may have: the worker, its fork server and one child.
_MEMORY_BYTES = 700 << 20


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack with a worker of two slots, both of which are needed."""
    with open_stack("redis", tmp_path_factory.mktemp("stack")) as stack:
        stack.worker(slots=2).await_ready()
        yield stack


def seconds_to_news_of(run: Run, step: str) -> float:
    """From a step's last word to the event that says what came of it."""
    begun_at = next(note for note in run.notes("ran") if note.step == step).more["wall"]
    return wall_time_of(run, (STEP_FAILURE, UP_FOR_RETRY), step) - begun_at


def test_deaths_beside_others(double: Stack) -> None:
    """A segfault, an exit and a SIGKILL are known within 2 s, by name; the other slot works on.

    One slot is held all the time, so the steps that die have only the other one, which comes back
    after each of them.
    """
    run = start(double, "deaths_beside_others", lease_seconds=_LEASE_SECONDS)
    until(lambda: len(run.notes("ran")) == 6, "all attempts have begun", 100)
    (holder,) = (note for note in run.notes("ran") if note.step == "held")
    assert is_running(holder.pid)
    run.open_gate()
    assert run.wait().status is FAILURE
    reasons = {"exits": "exit code 3", "segfaults": "SIGSEGV", "kills_itself": "SIGKILL"}
    assert {step for step in reasons if reasons[step] in run.failure(step)} == set(reasons)
    assert set(run.steps(STEP_FAILURE)) == set(reasons)
    assert run.steps(UP_FOR_RETRY) == ["exits_at_first"]
    for step in (*reasons, "exits_at_first"):
        assert seconds_to_news_of(run, step) <= _DEATH_SECONDS + SLACK_SECONDS
    attempts = [(step, 1) for step in ("held", *reasons, "exits_at_first")]
    assert executions(run) == dict.fromkeys([*attempts, ("exits_at_first", 2)], 1)
    assert len(run.notes("ended")) == 1
    assert "out of memory" not in run.failure("kills_itself")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_idle_child_gets_a_signal(double: Stack, number: signal.Signals) -> None:
    """Nothing comes of it, however many there are: the next steps find both slots."""
    run = start(double, "varied")
    run.open_gate()
    check_each_once(run.wait(), {note.step for note in run.notes("ran")})
    for pid in {note.pid for note in run.notes("ran")}:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    second = start(double, "varied")
    second.await_notes("ran", 3)  # both slots are held at once
    second.open_gate()
    check_each_once(second.wait(), {note.step for note in second.notes("ran")})


def test_a_child_dies_right_after_its_step(double: Stack) -> None:
    """Killed between the success in the log and the word to the worker, the step has succeeded."""
    run = start(double, "dies_at_its_end", lease_seconds=_LEASE_SECONDS).wait()
    check_each_once(run, ["quick", "quick_after"])


def test_steps_fork(double: Stack) -> None:
    """A copy ends, without a word in the log, where it would go on as the step's process."""
    run = start(double, "forks", lease_seconds=_LEASE_SECONDS).wait()
    steps = ("copy_returns", "copy_raises", "copy_yields", "forks_a_pool")
    check_each_once(run, steps)
    codes = {note.step: note.more["code"] for note in run.notes("copy")}
    assert codes == {"copy_returns": 0, "copy_raises": 1, "copy_yields": 0}
    assert [note.more["seen"] for note in run.notes("pool")] == [[7]]
    check_each_once(start(double, "single").wait(), ["quick"])


# --- memory -------------------------------------------------------------------------------------


@contextmanager
def limited_memory(limit_bytes: int) -> Iterator[Path]:
    """A control group with so much memory; skips where the host does not let us make one."""
    found = _memory_groups()
    if found is None:
        pytest.skip("This host has no control groups with a memory limit that we may make.")
    parent, limit = found
    group = parent / f"dagster-taskiq-test-{uuid.uuid4().hex}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"No control group can be made here: {error}.")
    try:
        (group / limit).write_text(str(limit_bytes))
        yield group
    finally:
        until(lambda: not (group / "cgroup.procs").read_text(), "the control group is empty")
        group.rmdir()


def _memory_groups() -> tuple[Path, str] | None:
    """Where to make one, and the name of its limit."""
    root = Path("/sys/fs/cgroup")
    if (root / "memory" / "memory.limit_in_bytes").exists():
        return root / "memory", "memory.limit_in_bytes"
    control = root / "cgroup.subtree_control"
    if control.exists() and "memory" in control.read_text().split():
        return root, "memory.max"
    return None


def test_out_of_memory(tmp_path: Path) -> None:
    """A step that the kernel kills for its memory fails with these words; the slot is back."""
    with limited_memory(_MEMORY_BYTES) as group, open_stack("redis", tmp_path) as stack:
        enter = f'echo $$ > {group}/cgroup.procs && exec "$@"'
        stack.worker(slots=1, shell=enter).await_ready()
        run = start(stack, "out_of_memory", lease_seconds=_LEASE_SECONDS).wait()
        assert run.status is FAILURE
        reason = run.failure("takes_memory")
        assert "SIGKILL" in reason
        assert "out of memory" in reason
        assert seconds_to_news_of(run, "takes_memory") <= _DEATH_SECONDS + SLACK_SECONDS + 5
        check_each_once(start(stack, "single").wait(), ["quick"])
