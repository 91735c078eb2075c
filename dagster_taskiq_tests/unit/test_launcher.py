"""What the launcher does beside its callers."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
from dagster import DagsterInstance, DagsterRunStatus

from dagster_taskiq import TaskiqRunLauncher
from dagster_taskiq import launcher as launcher_module
from dagster_taskiq._dagster.names import WorkerStatus
from dagster_taskiq.backend import TaskReport, TaskState
from dagster_taskiq.config.settings import Settings
from dagster_taskiq.messages.attempt_ends import AttemptEnd, EndOutcome
from dagster_taskiq.messages.results import NOWHERE, Outcome, TaskResult
from dagster_taskiq_tests.acceptance import jobs

#: For what must happen, on a loaded machine.
PATIENCE_SECONDS = 30.0


class FakeClient:
    """Knows of a run whose process goes on, whatever it is told."""

    def __init__(self) -> None:
        self.is_asked = threading.Event()
        self.answers = threading.Event()
        self.state = TaskState.CLAIMED
        self.ended: list[AttemptEnd] = []

    def note_end(self, end: AttemptEnd) -> None:
        self.ended.append(end)

    def physical_queue(self, queue: str) -> str:
        return f"physical {queue}"

    def cancel(self, *_: str) -> TaskState:
        return TaskState.CLAIMED

    def look(self, *_: str) -> tuple[TaskReport, None]:
        self.is_asked.set()
        assert self.answers.wait(PATIENCE_SECONDS)
        return TaskReport(self.state), None


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[DagsterInstance]:
    with DagsterInstance.local_temp(str(tmp_path)) as instance:
        yield instance


def test_who_sees_to_the_end_of_a_cancelled_run_ends_with_the_launcher(
    instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with a traceback, though its process would live for long; and nothing of it is left."""
    client = FakeClient()
    monkeypatch.setattr(TaskiqRunLauncher, "_client", client)
    launcher = TaskiqRunLauncher(Settings.from_config({}))
    launcher.register_instance(instance)
    run = instance.create_run_for_job(jobs.simple, status=DagsterRunStatus.STARTED)
    others = set(threading.enumerate())  # perhaps of a launcher that was just left
    assert launcher.terminate(run.run_id) is True
    new = set(threading.enumerate()) - others
    (thread,) = (it for it in new if it.name == f"end of run {run.run_id}")
    assert client.is_asked.wait(PATIENCE_SECONDS)
    launcher.dispose()
    client.answers.set()
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()
    left = weakref.ref(launcher)
    del launcher
    gc.collect()
    assert left() is None


def test_a_lost_run_is_told_to_the_history_once(
    instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often Dagster asks after it; one that lives is no end."""
    client = FakeClient()
    client.answers.set()
    monkeypatch.setattr(TaskiqRunLauncher, "_client", client)
    launcher = TaskiqRunLauncher(Settings.from_config({}))
    launcher.register_instance(instance)
    run = instance.create_run_for_job(jobs.simple, status=DagsterRunStatus.STARTED)
    launcher.check_run_worker_health(run)
    assert client.ended == []
    client.state = TaskState.EXPIRED
    for _ in range(2):
        health = launcher.check_run_worker_health(run)
        assert health.status is WorkerStatus.NOT_FOUND
    (end,) = client.ended
    assert (end.run_id, end.kind, end.job) == (run.run_id, "runs", run.job_name)
    assert (end.outcome, end.attempt, end.queue) == (EndOutcome.LOST, 0, "dagster")
    assert end.reason == health.msg


@pytest.mark.parametrize(
    ("state", "why"),
    [
        (TaskState.REFUSED, "A worker gave the run back. It has another instance."),
        (TaskState.EXPIRED, "its lease ended without a result"),
        (TaskState.CANCELLED, "cancelled before a worker had started it"),
    ],
)
def test_monitoring_is_told_why_no_process_has_the_run(state: TaskState, why: str) -> None:
    """In each case Dagster resumes the run, or gives it up, with that reason."""
    refusal = TaskResult(Outcome.REFUSED, NOWHERE, reason="It has another instance.")
    is_refused = state is TaskState.REFUSED
    status, reason = launcher_module._health(TaskReport(state), refusal if is_refused else None)
    assert status is WorkerStatus.NOT_FOUND
    assert why in str(reason)
