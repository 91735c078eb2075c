"""How a worker stops: drain, signals, and what becomes of the steps that it runs."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from dagster import DagsterEventType, DagsterRunStatus

from dagster_taskiq_tests.acceptance.harness import (
    BrokerKind,
    Stack,
    is_running,
    open_stack,
)

# --- stopping -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["redis", "rabbitmq"])
def test_drain(kind: BrokerKind, tmp_path: Path) -> None:
    """SIGTERM lets the running step finish and leaves the next one to another worker."""
    with open_stack(kind, tmp_path) as stack:
        first = stack.worker(slots=1, name="first").await_ready()
        busy = stack.start("blocker")
        busy.await_notes("started")
        first.terminate()
        first.await_log("1 running may finish")
        waiting = stack.start("simple")
        stack.worker(slots=1, name="second").await_ready()
        assert waiting.wait().is_success
        assert first.process.poll() is None
        busy.open_gate()
        assert busy.wait().is_success
        assert first.wait() == 0


def test_an_idle_worker_stops_at_once(stack: Stack) -> None:
    """A worker without steps has nothing to wait for."""
    worker = stack.worker().await_ready()
    worker.terminate()
    assert worker.wait(15) == 0


def test_second_signal_cancels(stack: Stack) -> None:
    """The second SIGTERM interrupts the step, whose clean-up runs; the exit code says so."""
    worker = stack.worker(slots=1).await_ready()
    run = stack.start("one_to_cancel")
    run.await_notes("started")
    worker.terminate()
    worker.await_log("Stopping")
    worker.terminate()
    assert worker.wait(20) == 3
    assert run.wait().status is DagsterRunStatus.FAILURE
    assert len(run.notes("cleaned")) == 1


def test_sigterm_to_every_process(stack: Stack) -> None:
    """A supervisor that signals the whole group takes nothing from a worker that drains.

    But for the step's own process: to Dagster a SIGTERM there means that the step is to end.
    """
    worker = stack.worker(slots=2).await_ready()
    run = stack.start("blocker")
    (started,) = run.await_notes("started")
    for process in worker.descendants():
        if process.pid != started.pid:
            process.terminate()
    worker.terminate()
    worker.await_log("1 running may finish")
    run.open_gate()
    assert run.wait().is_success
    assert worker.wait() == 0


def test_drain_timeout(stack: Stack) -> None:
    """After ``--drain-timeout`` the running step is cancelled; failure and exit code say so."""
    worker = stack.worker("--drain-timeout", "1", slots=1).await_ready()
    run = stack.start("one_to_cancel")
    run.await_notes("started")
    worker.terminate()
    assert worker.wait(20) == 3
    assert run.wait().status is DagsterRunStatus.FAILURE
    assert len(run.notes("cleaned")) == 1
    (failed,) = run.steps(DagsterEventType.STEP_FAILURE)
    assert "It was stopped after --drain-timeout of 1 s on worker " in run.failure(failed)


def test_a_step_cut_short_is_retried_elsewhere(stack: Stack) -> None:
    """A step that its worker's end has cancelled goes through its retry policy, at once."""
    first = stack.worker("--drain-timeout", "0.5", slots=1).await_ready()
    run = stack.start("hangs_once")
    (note,) = run.await_notes("started")
    first.terminate()
    assert first.wait(30) == 3
    assert not is_running(note.more["child"])
    stack.worker(slots=1).await_ready()
    assert run.wait().is_success
    assert [again.attempt for again in run.notes("again")] == [2]


def test_ctrl_c(stack: Stack) -> None:
    """Ctrl-C, which the terminal sends to the whole group, drains like SIGTERM."""
    worker = stack.worker(slots=1).await_ready()
    run = stack.start("blocker")
    run.await_notes("started")
    worker.process.send_signal(signal.SIGINT)
    worker.await_log("1 running may finish")
    run.open_gate()
    assert run.wait().is_success
    assert worker.wait() == 0
