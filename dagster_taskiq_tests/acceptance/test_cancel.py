"""Cancel means stopped: queued steps never run, running ones clean up, or are killed."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

import pytest
from dagster import DagsterEventType, DagsterRunStatus

from dagster_taskiq_tests.acceptance.harness import (
    BrokerKind,
    Run,
    Stack,
    is_running,
    open_stack,
    until,
)


def ask_to_cancel(run: Run) -> None:
    """What Dagster does when a user terminates a run: first the status, then the signal."""
    instance = run.stack.instance
    instance.report_run_canceling(instance.get_run_by_id(run.run_id))
    run.signal()


def check_worker_is_free(stack: Stack) -> None:
    """A worker that has cancelled steps takes others."""
    assert stack.run("diamond").is_success


@pytest.mark.parametrize("kind", ["redis", "rabbitmq"])
def test_queued_steps_never_run(kind: BrokerKind, tmp_path: Path) -> None:
    """A terminated run is CANCELED; of six steps the two that ran clean up, and no other starts."""
    with open_stack(kind, tmp_path) as stack:
        stack.worker(slots=2).await_ready()
        run = stack.start("many_to_cancel")
        run.await_notes("started", 2)
        ask_to_cancel(run)
        assert run.wait().status is DagsterRunStatus.CANCELED
        # Dagster can only interrupt the main thread of a process
        assert [note.more["main"] for note in run.notes("cleaned")] == [True, True]
        assert {note.step for note in run.notes("cleaned")} == set(
            run.steps(DagsterEventType.STEP_FAILURE)
        )
        check_worker_is_free(stack)
        assert len(run.notes("started")) == 2
        assert len(run.steps(DagsterEventType.STEP_START)) == 2
        withdrawn = [text for text in run.messages() if text.startswith("Withdrew step")]
        assert len(withdrawn) == 4
        assert asyncio.run(stack.depth("dagster")) == 0


def test_a_signal_without_a_request(shared: Stack) -> None:
    """A run whose process is told to end, though nobody terminated the run, fails as in Dagster."""
    run = shared.start("one_to_cancel")
    run.await_notes("started")
    run.signal()
    assert run.wait().status is DagsterRunStatus.FAILURE
    assert run.await_notes("cleaned")[0].more["main"]
    check_worker_is_free(shared)


def test_ctrl_c(shared: Stack) -> None:
    """Ctrl-C on a run's process is a termination as well."""
    run = shared.start("one_to_cancel")
    run.await_notes("started")
    run.signal(signal.SIGINT)
    assert run.wait().status is DagsterRunStatus.FAILURE
    assert len(run.notes("cleaned")) == 1


def test_a_stubborn_step_is_killed(shared: Stack) -> None:
    """A step that ignores SIGTERM is killed after the grace period, with what it has started."""
    run = shared.start("stubborn_job", cancel_grace_seconds=1.0)
    (note,) = run.await_notes("started")
    asked_at = time.monotonic()
    ask_to_cancel(run)
    assert run.wait().status is DagsterRunStatus.CANCELED
    assert time.monotonic() - asked_at >= 1.0
    assert not is_running(note.pid)
    until(lambda: not is_running(note.more["child"]), "the grandchild is dead")
    reason = run.failure("stubborn")
    assert "SIGKILL" in reason
    assert "cancelled" in reason
    check_worker_is_free(shared)


def test_a_run_that_waits_for_a_retry(shared: Stack) -> None:
    """A step that waits for its retry is not tried again once the run is cancelled."""
    ops = {"asks_for_retry": {"config": {"failures": 2, "seconds_to_wait": 60.0}}}
    run = shared.start("requested", ops=ops)
    until(lambda: run.events(DagsterEventType.STEP_UP_FOR_RETRY), "the step waits for its retry")
    ask_to_cancel(run)
    assert run.wait(20).status is DagsterRunStatus.CANCELED
    assert len(run.notes("attempt")) == 1


def test_steps_do_not_outlive_a_killed_run(shared: Stack) -> None:
    """When the process of a run is killed, its steps are stopped within lease + 5 s."""
    run = shared.start("one_to_cancel", lease_seconds=3.0)
    (note,) = run.await_notes("started")
    run.signal(signal.SIGKILL)
    run.await_notes("cleaned", timeout=8.0)
    until(lambda: not is_running(note.pid), "its process is replaced")
    check_worker_is_free(shared)


def test_a_stubborn_step_does_not_outlive_a_killed_run(shared: Stack) -> None:
    """Nobody waits for its clean-up: it is killed soon, whatever the run's grace period."""
    run = shared.start("stubborn_job", lease_seconds=3.0, cancel_grace_seconds=120.0)
    (note,) = run.await_notes("started")
    run.signal(signal.SIGKILL)
    pids = [note.pid, note.more["child"]]
    until(lambda: not any(map(is_running, pids)), "it is killed with what it has started")
    check_worker_is_free(shared)


def test_queued_steps_of_a_killed_run_never_start(stack: Stack) -> None:
    """What a killed run has left in a queue is dropped by the worker that finds it."""
    run = stack.start("routed", lease_seconds=1.0)
    until(lambda: asyncio.run(stack.depth("dagster", "ours", "theirs")) == 4, "the steps wait")
    run.signal(signal.SIGKILL)
    run.wait()
    loop = f"*{run.run_id}:loop"
    with stack.redis() as redis:
        until(lambda: not list(redis.scan_iter(loop, count=1000)), "the run's lease is over")
    worker = stack.worker(queues=["dagster", "ours", "theirs"]).await_ready()
    until(lambda: worker.log.count("it is run-gone") == 4, "the worker drops them")
    check_worker_is_free(stack)
    assert run.notes("ran") == []
