"""Time limits of steps, and limits of children under load."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from dagster import DagsterEventType, DagsterRunStatus

from dagster_taskiq_tests.acceptance.harness import Run, Stack, is_running, open_stack, until

JOBS = "dagster_taskiq_tests.acceptance.limit_jobs"

#: Steps of the job that loads the workers.
LOAD = 30


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack with one worker of two slots and no limits of its own."""
    with open_stack("redis", tmp_path_factory.mktemp("stack")) as stack:
        stack.worker().await_ready()
        yield stack


def failure_of(run: Run, step: str) -> str:
    """What the step's failure says, with its causes."""
    (event,) = run.events(DagsterEventType.STEP_FAILURE, step)
    return str(event.step_failure_data.error)


def test_the_soft_limit_raises_in_the_step(limited: Stack) -> None:
    """Its clean-up code runs, and the failure says which limit it was."""
    run = limited.run(f"{JOBS}:soft")
    assert run.status is DagsterRunStatus.FAILURE
    assert len(run.notes("cleaned")) == 1
    assert "soft time limit of 5 s is over" in failure_of(run, "sleeps")


def test_a_step_past_its_soft_limit_is_retried(limited: Stack) -> None:
    """The retry policy decides, and the second attempt has its own time."""
    run = limited.run(f"{JOBS}:soft_retried")
    assert run.is_success
    assert [note.attempt for note in run.notes("started")] == [1, 2]
    (retry,) = run.events(DagsterEventType.STEP_UP_FOR_RETRY)
    assert "soft time limit of 5 s" in str(retry.step_retry_data.error)


def test_a_step_may_catch_its_soft_limit(limited: Stack) -> None:
    """It is an exception like another, which knows the limit."""
    run = limited.run(f"{JOBS}:soft_caught")
    assert run.is_success
    assert run.output("catches") == 5.0


def test_the_hard_limit_kills(limited: Stack) -> None:
    """A step that goes on after the soft limit is killed with what it has started."""
    run = limited.run(f"{JOBS}:hard")
    assert run.status is DagsterRunStatus.FAILURE
    (ignored,) = run.notes("ignored")
    assert "soft time limit" in ignored.more["error"]
    assert "its time limit of 10 s was over" in failure_of(run, "ignores")
    (started,) = (note for note in run.notes("started") if note.step == "ignores")
    until(lambda: not is_running(started.more["child"]), "the step's own process is gone")
    assert len(run.events(DagsterEventType.STEP_SUCCESS, "quick")) == 1


def test_a_step_past_its_hard_limit_is_retried(limited: Stack) -> None:
    """As after any death of its process, the retry policy decides."""
    run = limited.run(f"{JOBS}:hard_retried")
    assert run.is_success
    assert [note.attempt for note in run.notes("started")] == [1, 2]


def test_a_limit_that_is_no_number(limited: Stack) -> None:
    """The run fails with the tag and its value."""
    run = limited.run(f"{JOBS}:bad_limit")
    assert run.status is DagsterRunStatus.FAILURE
    (event,) = run.events(DagsterEventType.RUN_FAILURE)
    assert "'dagster-taskiq/timeout_seconds' has the value 'soon'" in str(event.event_specific_data)


@pytest.mark.parametrize(
    ("arguments", "source"),
    [
        (["--soft-time-limit", "0.5"], {}),
        (["--", "--soft-time-limit=0.5"], {}),
        ([], {"task_soft_time_limit": 0.5}),
    ],
    ids=["option", "celery", "settings"],
)
def test_limits_of_the_worker(stack: Stack, arguments: list[str], source: dict[str, float]) -> None:
    """They hold for steps whose tags say nothing; 0 in a tag frees a step of them."""
    settings = stack.settings_file(
        config_source={"key_prefix": stack.prefix, **source},
    )
    stack.worker(*arguments, settings=settings).await_ready()
    run = stack.run(f"{JOBS}:by_default")
    assert "soft time limit of 0.5 s" in failure_of(run, "sleeps")
    assert len(run.notes("longer")) == 1


# --- under load ---------------------------------------------------------------------------------


def check_each_once(run: Run) -> None:
    """Every step of the load has run to its end, once."""
    assert run.is_success
    once = dict.fromkeys(range(LOAD), 1)
    assert Counter(note.more["number"] for note in run.notes("started")) == once
    assert Counter(note.more["number"] for note in run.notes("ended")) == once


def start_load(stack: Stack) -> Run:
    return stack.start(f"{JOBS}:load", ops={"spread": {"config": {"count": LOAD}}})


def test_recycling_under_load(stack: Stack) -> None:
    """Children that are replaced after a few steps lose none and repeat none."""
    stack.worker("--max-tasks-per-child", "3").await_ready()
    run = start_load(stack).wait()
    check_each_once(run)
    per_child = Counter(note.pid for note in run.notes("started"))
    assert max(per_child.values()) <= 3


def test_a_memory_limit_under_load(stack: Stack) -> None:
    """The same above so much memory: every child is, after its first step."""
    stack.worker("--max-memory-per-child", "1024").await_ready()
    run = start_load(stack).wait()
    check_each_once(run)
    assert len({note.pid for note in run.notes("started")}) == LOAD


def test_a_rolling_deploy(stack: Stack) -> None:
    """Workers are replaced one by one under load: no step is lost, repeated or cut short.

    The new ones are still starting while the old ones drain.
    """
    old = [stack.worker(name=f"old-{number}").await_ready() for number in range(2)]
    run = start_load(stack)
    for worker in old:
        done = len(run.notes("ended"))
        until(lambda done=done: len(run.notes("ended")) > done + 3, "some steps have ended")
        stack.worker()
        worker.terminate()
    check_each_once(run.wait())
    assert [worker.wait() for worker in old] == [0, 0]
