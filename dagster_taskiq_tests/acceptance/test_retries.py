"""Retries go by Dagster's rules: who may retry, how often, and after how long."""

from __future__ import annotations

from itertools import pairwise

import pytest
from dagster import DagsterEventType, DagsterRunStatus

from dagster_taskiq_tests.acceptance.harness import Run, Stack, story_in_process

UP_FOR_RETRY = DagsterEventType.STEP_UP_FOR_RETRY


def failing(step: str, failures: int, **more: float) -> dict[str, object]:
    """Config of an op that fails so often."""
    return {step: {"config": {"failures": failures, **more}}}


def attempts(run: Run, step: str) -> list[int]:
    """The attempts that the op itself has counted."""
    return [note.attempt for note in run.notes("attempt") if note.step == step]


def check_waits(run: Run, step: str) -> list[float]:
    """Each attempt came when its retry had been due; returns the waits that were asked for."""
    asked = [e.step_retry_data.seconds_to_wait or 0.0 for e in run.events(UP_FOR_RETRY, step)]
    times = [note.time for note in run.notes("attempt") if note.step == step]
    waited = [later - earlier for earlier, later in pairwise(times)]
    assert all(real >= due for real, due in zip(waited, asked, strict=True))
    return asked


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_retry_policy(shared: Stack, failures: int) -> None:
    """A step runs again until it succeeds; it sees its own count, and its downstream waits."""
    ops = failing("fails_at_first", failures)
    run = shared.run("retried", ops=ops)
    assert run.is_success
    assert attempts(run, "fails_at_first") == list(range(1, failures + 2))
    assert run.output("fails_at_first") == failures + 1
    assert run.output("add_one") == failures + 2
    assert run.story() == story_in_process("retried", run_config={"ops": ops})


def test_retries_are_used_up(shared: Stack) -> None:
    """After the last allowed retry the step has failed, and its downstream does not run."""
    ops = failing("fails_at_first", 9)
    run = shared.run("retried", ops=ops)
    assert run.status is DagsterRunStatus.FAILURE
    assert attempts(run, "fails_at_first") == [1, 2, 3]
    assert "attempt 3" in run.failure("fails_at_first")
    assert run.kinds("add_one") == []
    assert run.story() == story_in_process("retried", run_config={"ops": ops})


def test_delay_backoff_and_jitter(shared: Stack) -> None:
    """A retry waits as long as its policy says."""
    ops = {name: {"config": {"failures": 2}} for name in ("constant", "backoff", "jitter")}
    run = shared.run("retried_with_delays", ops=ops)
    assert run.is_success
    assert check_waits(run, "constant") == pytest.approx([0.4, 0.4])
    assert check_waits(run, "backoff") == pytest.approx([0.4, 1.2])
    assert all(0.0 <= wait <= 0.8 for wait in check_waits(run, "jitter"))


@pytest.mark.parametrize("seconds", [0.0, 0.6])
def test_retry_requested(shared: Stack, seconds: float) -> None:
    """An op can ask for its retry itself, and for a pause before it."""
    ops = failing("asks_for_retry", 2, seconds_to_wait=seconds)
    run = shared.run("requested", ops=ops)
    assert run.is_success
    assert attempts(run, "asks_for_retry") == [1, 2, 3]
    assert check_waits(run, "asks_for_retry") == pytest.approx([seconds, seconds])


def test_retry_requested_too_often(shared: Stack) -> None:
    """``max_retries`` of the request holds."""
    run = shared.run("requested", ops=failing("asks_for_retry", 9, seconds_to_wait=0.0))
    assert run.status is DagsterRunStatus.FAILURE
    assert attempts(run, "asks_for_retry") == [1, 2, 3]


def test_failure_that_allows_no_retry(shared: Stack) -> None:
    """``Failure(allow_retries=False)`` overrides the policy."""
    run = shared.run("not_retried")
    assert run.status is DagsterRunStatus.FAILURE
    assert attempts(run, "never_again") == [1]
    assert run.events(UP_FOR_RETRY) == []


def test_retries_disabled(shared: Stack) -> None:
    """``retries: disabled`` makes the first failure the last."""
    ops = failing("fails_at_first", 1)
    run = shared.run("retried", ops=ops, retries={"disabled": {}})
    assert run.status is DagsterRunStatus.FAILURE
    assert attempts(run, "fails_at_first") == [1]
    assert run.events(UP_FOR_RETRY) == []


def test_retries_deferred(shared: Stack) -> None:
    """``retries: deferred`` leaves the retry to whoever started the run: it is asked for, once."""
    run = shared.run("retried", ops=failing("fails_at_first", 1), retries={"deferred": {}})
    assert attempts(run, "fails_at_first") == [1]
    assert len(run.events(UP_FOR_RETRY)) == 1
    assert run.kinds("add_one") == []


def test_retry_after_the_death_of_the_process(shared: Stack) -> None:
    """A step whose process died goes through its retry policy like one that raised."""
    run = shared.run("dies_once")
    assert run.is_success
    assert attempts(run, "exits_at_first") == [1, 2]
    (retry,) = run.events(UP_FOR_RETRY)
    assert retry.step_retry_data.error is not None
    assert "exit code 4" in retry.step_retry_data.error.message
    assert run.output("add_one") == 2


def test_retry_of_a_re_execution(shared: Stack) -> None:
    """A run that executes another one's failed step again counts its attempts as Dagster does."""
    failed = shared.run("retried", ops=failing("fails_at_first", 9))
    again = shared.run("retried", ops=failing("fails_at_first", 1), retry_of=failed)
    assert again.is_success
    assert attempts(again, "fails_at_first") == [1, 2]
