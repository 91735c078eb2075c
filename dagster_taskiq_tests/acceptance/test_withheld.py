"""Steps that a run holds back, as ``run show`` lists them while real runs go on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from dagster_taskiq_tests.acceptance.harness import Run, Stack, open_stack, until
from dagster_taskiq_tests.acceptance.jobs import POOL


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A worker that has a slot for each step, so that nothing waits in a queue."""
    with open_stack("redis", tmp_path_factory.mktemp("stack")) as stack:
        stack.worker("--run-slots", "0", slots=4).await_ready()
        yield stack


def shown(stack: Stack, run: Run) -> Any:
    done = stack.try_cli("run", "show", run.run_id, "--json", "-y", str(stack.settings_file()))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)["run"]


def held_back(stack: Stack, run: Run) -> dict[str, Any]:
    """By step, where it is as the command shows it."""
    return {it["step_key"]: it for it in shown(stack, run)["held_back"]}


def test_what_max_concurrent_holds_back(stack: Stack) -> None:
    """The steps that are ready, until the one that runs has ended."""
    began_at = time.time()
    run = stack.start("two_kinds", max_concurrent=1)
    (started,) = run.await_notes("started")
    found = until(lambda: held_back(stack, run), "the run tells what it holds back")
    assert started.step not in found
    assert len(found) == shown(stack, run)["held_back_more"] + 2
    for step in found.values():
        assert step["pool"] is None
        assert step["reason"] == "max_concurrent is 1, and 1 step is queued or running."
        assert began_at - 1 < step["since"] <= time.time() + 1
    said = stack.cli("run", "show", run.run_id, "-y", str(stack.settings_file()))
    assert "held back: ready, but not sent" in said
    assert max(len(line) for line in said.partition("held back")[2].splitlines()) <= 80
    run.open_gate()
    assert run.wait().is_success
    assert shown(stack, run)["held_back"] == []


def test_a_full_pool_names_who_has_its_slots(stack: Stack) -> None:
    """Which is a step of another run; it goes when the slot is free."""
    stack.instance.event_log_storage.set_concurrency_slots(POOL, 1)
    holder = stack.start("pool_gated")
    holder.await_notes("started")
    run = stack.start("pool_gated")
    run.await_message("blocked by limit")  # the backend knows it by then
    found = until(lambda: held_back(stack, run), "the run tells what it holds back")
    step = found["pooled_gated"]
    assert step["pool"] == POOL
    holds = f"1 of 1 are taken, by pooled_gated of run {holder.run_id}."
    assert step["reason"] == f'Slots of pool "{POOL}": {holds}'
    assert held_back(stack, holder) == {}
    holder.open_gate()
    run.await_notes("started")
    until(lambda: not held_back(stack, run), "the run tells that it holds nothing back")
    run.open_gate()
    for it in (holder, run):
        assert it.wait().is_success
