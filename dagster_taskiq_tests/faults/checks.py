"""What the tests of faults count and expect."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable

import redis
from dagster import DagsterEventType, DagsterRunStatus

from dagster_taskiq_tests.acceptance.harness import Run, Stack, WorkerProcess, is_running, until
from dagster_taskiq_tests.faults.fatal_worker import FAULT_VARIABLE
from dagster_taskiq_tests.faults.jobs import CROWD_QUEUED, CROWD_RUNNING

JOBS = "dagster_taskiq_tests.faults.jobs"

SUCCESS = DagsterRunStatus.SUCCESS
FAILURE = DagsterRunStatus.FAILURE

STEP_FAILURE = DagsterEventType.STEP_FAILURE
UP_FOR_RETRY = DagsterEventType.STEP_UP_FOR_RETRY

LEASE_SECONDS = 3.0

#: How long a loaded machine may take, beside what a promise allows.
SLACK_SECONDS = 10.0

#: How long a run may take that has to wait for one or two leases and for lost messages.
LONG_SECONDS = 120.0

#: How long a test may take on a loaded machine that takes half a minute on an idle one.
TEST_SECONDS = 400.0


def start(stack: Stack, job: str, *, lease_seconds: float = LEASE_SECONDS, **more: object) -> Run:
    """Start a run of one of the jobs of these tests."""
    arguments = {"lease_seconds": lease_seconds, **more}
    return stack.start(f"{JOBS}:{job}", **arguments)  # type: ignore[arg-type]


def fatal_worker(stack: Stack, fault: str, *arguments: str, **options: object) -> WorkerProcess:
    """A worker with a fault built in; see ``fatal_worker``."""
    return stack.worker(
        *arguments,
        **options,  # type: ignore[arg-type]
        environment={FAULT_VARIABLE: fault},
        module="dagster_taskiq_tests.faults.fatal_worker",
    )


def embedded_client(stack: Stack) -> redis.Redis:
    """A connection to the stack's embedded server; the caller closes it."""
    return redis.Redis(unix_socket_path=str(stack.home / "dagster_taskiq" / "server.sock"))


def executions(run: Run) -> Counter[tuple[str, int]]:
    """How often each attempt of each step has begun."""
    return Counter((note.step, note.attempt) for note in run.notes("ran"))


def check_each_once(run: Run, steps: Iterable[str]) -> None:
    """The run has succeeded, with one attempt of each step, begun once."""
    counts = executions(run)
    assert run.is_success
    assert counts == dict.fromkeys(((step, 1) for step in steps), 1)
    assert run.steps(UP_FOR_RETRY) == []


def await_crowd(run: Run) -> list[int]:
    """Wait until the steps of ``crowd`` run that will; their processes and what these started."""
    notes = run.await_notes("ran", len(CROWD_RUNNING), LONG_SECONDS)
    assert {note.step for note in notes} == set(CROWD_RUNNING)
    return [pid for note in notes for pid in (note.pid, note.more["child"])]


def await_ends(pids: Iterable[int], timeout_seconds: float) -> None:
    """Wait until none of the processes runs."""
    left = list(pids)
    until(lambda: not any(map(is_running, left)), "the processes are dead", timeout_seconds)


def check_crowd(run: Run) -> None:
    """A ``crowd`` whose first attempts were lost: what may be retried was, nothing ran twice."""
    assert run.status is FAILURE
    assert executions(run) == {
        ("sleeps", 1): 1,
        ("sleeps", 2): 1,
        ("holds_the_gil", 1): 1,
        ("holds_the_gil", 2): 1,
        ("unlucky", 1): 1,
        **dict.fromkeys(((step, 1) for step in CROWD_QUEUED), 1),
    }
    assert set(run.steps(UP_FOR_RETRY)) == {"sleeps", "holds_the_gil"}
    assert run.steps(STEP_FAILURE) == ["unlucky"]


def wall_time_of(run: Run, kinds: Iterable[DagsterEventType], step: str) -> float:
    """When the first event of these kinds of a step was logged."""
    wanted = set(kinds)
    return min(
        entry.timestamp
        for entry in run.logs()
        if entry.dagster_event
        and entry.dagster_event.event_type in wanted
        and entry.step_key == step
    )


def seconds_since(moment: float) -> float:
    """On the wall's clock, which the event log has."""
    return time.time() - moment
