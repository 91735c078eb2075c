"""Runs that are launched or resumed while a server is away: back to Dagster's queue, or later."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from dagster import DagsterEvent, DagsterInstance, DagsterRun, DagsterRunStatus, reconstructable
from dagster._core.launcher import LaunchRunContext, ResumeRunContext
from dagster._core.run_coordinator.queued_run_coordinator import RunQueueConfig
from dagster._core.storage.dagster_run import DagsterRunStatus as Status
from dagster._daemon.run_coordinator.queued_run_coordinator_daemon import (
    QueuedRunCoordinatorDaemon,
)

from dagster_taskiq import TaskiqRunLauncher
from dagster_taskiq.backend import TaskState
from dagster_taskiq.config.settings import Settings
from dagster_taskiq.errors import (
    LauncherClosedError,
    RefusedByServerError,
    ServerError,
    UnreachableServerError,
)
from dagster_taskiq.launch import late_launches
from dagster_taskiq.launch.background import Background
from dagster_taskiq.launch.launch_watch import LaunchWatch
from dagster_taskiq.messages.envelope import Envelope
from dagster_taskiq_tests.acceptance import jobs

try:
    from dagster._core.remote_origin import (
        RegisteredCodeLocationOrigin,
        RemoteJobOrigin,
        RemoteRepositoryOrigin,
    )
except ImportError:  # where Dagster 1.11 has them
    from dagster._core.remote_representation.origin import (
        RegisteredCodeLocationOrigin,
        RemoteJobOrigin,
        RemoteRepositoryOrigin,
    )

#: For what must happen, on a loaded machine.
PATIENCE_SECONDS = 30.0

AWAY = UnreachableServerError("redis://fake", "Cannot reach redis://fake.")
REFUSED = RefusedByServerError("redis://fake", "redis://fake refuses the credentials.")


class FakeClient:
    """Servers that answer with an error as long as a test says so."""

    def __init__(self) -> None:
        self.error: ServerError | None = AWAY
        self.submit_error: ServerError | None = None
        self.has_worked = False
        self.tries = 0
        self.sent: list[Envelope] = []
        self.error_of_run: dict[str, Exception] = {}
        self.refused_runs: list[str] = []

    def reach(self, _: str) -> str:
        self.tries += 1
        if self.error:
            raise self.error
        return "epoch"

    def epoch(self) -> str:
        return self.reach("")

    def submit(self, envelope: Envelope) -> None:
        if self.submit_error:
            raise self.submit_error
        if error := self.error_of_run.get(envelope.run_id):
            self.refused_runs.append(envelope.run_id)
            raise error
        self.sent.append(envelope)

    def queue_waits(self, max_age_seconds: float = 0.0) -> FakeClient:
        return self

    def of(self, _: str) -> None:
        return None

    def physical_queue(self, _: str) -> str:
        return "queue"

    def absent(self, *_: object) -> set[str]:
        return set()

    def state_of(self, *_: str) -> tuple[str, TaskState]:
        return "epoch", TaskState.UNKNOWN


@pytest.fixture
def client() -> FakeClient:
    return FakeClient()


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[DagsterInstance]:
    with DagsterInstance.local_temp(str(tmp_path)) as instance:
        yield instance


MakeLauncher = Callable[..., TaskiqRunLauncher]


@pytest.fixture
def make_launcher(
    client: FakeClient, instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MakeLauncher]:
    monkeypatch.setattr(late_launches, "RETRY_SECONDS", 0.02)
    background = Background()
    watch = LaunchWatch(cast("Any", client), background, 30.0)
    monkeypatch.setattr(TaskiqRunLauncher, "_client", client)
    monkeypatch.setattr(TaskiqRunLauncher, "_watch", watch)
    launchers = []

    def make(patience_seconds: float = 300.0) -> TaskiqRunLauncher:
        launcher = TaskiqRunLauncher(
            Settings.from_config({"server_patience_seconds": patience_seconds})
        )
        launcher.register_instance(instance)
        monkeypatch.setattr(type(instance), "run_launcher", launcher)
        launchers.append(launcher)
        return launcher

    yield make
    background.close()
    for launcher in launchers:
        launcher.dispose()


def create(instance: DagsterInstance, status: DagsterRunStatus) -> DagsterRun:
    """A run that says where its code is, with the events that made it what it is."""
    origin = reconstructable(jobs.simple).get_python_origin()
    location = RegisteredCodeLocationOrigin("location")
    run = instance.create_run_for_job(
        jobs.simple,
        job_code_origin=origin,
        remote_job_origin=RemoteJobOrigin(RemoteRepositoryOrigin(location, "repository"), "simple"),
        status=Status.NOT_STARTED,
    )
    kinds = {Status.QUEUED: ["PIPELINE_ENQUEUED"], Status.STARTING: ["PIPELINE_STARTING"]}
    for kind in kinds.get(status, ["PIPELINE_STARTING", "PIPELINE_START"]):
        instance.report_dagster_event(DagsterEvent(kind, run.job_name), run.run_id)
    return known(instance, run)


def known(instance: DagsterInstance, run: DagsterRun) -> DagsterRun:
    found = instance.get_run_by_id(run.run_id)
    assert found
    return found


def launch(launcher: TaskiqRunLauncher, run: DagsterRun) -> None:
    launcher.launch_run(LaunchRunContext(run, workspace=None))


def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def said(instance: DagsterInstance, run: DagsterRun, text: str) -> int:
    return sum(text in str(entry.message) for entry in instance.all_logs(run.run_id))


def test_a_queued_run_goes_back_to_dagsters_queue_and_is_launched_by_the_daemon(
    make_launcher: MakeLauncher, client: FakeClient, instance: DagsterInstance
) -> None:
    """By the daemon's own code: again and again, and its log says once why it waits."""
    make_launcher()
    run = create(instance, Status.QUEUED)
    daemon = QueuedRunCoordinatorDaemon(interval_seconds=1)
    daemon._logger.setLevel(logging.CRITICAL)

    def dequeue() -> None:
        concurrency = instance.get_concurrency_config()
        assert isinstance(concurrency.run_queue_config, RunQueueConfig)
        daemon._dequeue_run(
            instance,
            cast("Any", None),
            known(instance, run),
            concurrency,
            fixed_iteration_time=None,
        )

    for _ in range(3):
        dequeue()
        assert known(instance, run).status is Status.QUEUED
    assert client.sent == []
    assert said(instance, run, "Cannot reach redis://fake. It goes back to Dagster's queue") == 1
    client.error = None
    dequeue()
    assert known(instance, run).status is Status.STARTING
    assert [it.run_id for it in client.sent] == [run.run_id]


def test_a_run_that_was_never_queued_is_sent_when_the_server_is_back(
    make_launcher: MakeLauncher, client: FakeClient, instance: DagsterInstance
) -> None:
    """By the process that launched it; its launch does not fail."""
    run = create(instance, Status.STARTING)
    launch(make_launcher(), run)
    until(lambda: client.tries > 3, "it tries again")
    assert client.sent == []
    client.error = None
    until(lambda: client.sent, "it is sent")
    assert said(instance, run, "Cannot reach redis://fake. It is sent when") == 1


def test_a_queued_run_that_may_have_been_sent_stays_out_of_dagsters_queue(
    make_launcher: MakeLauncher, client: FakeClient, instance: DagsterInstance
) -> None:
    """A worker that gets it after all refuses what Dagster calls queued."""
    run = create(instance, Status.QUEUED)
    instance.report_dagster_event(DagsterEvent("PIPELINE_STARTING", run.job_name), run.run_id)
    client.error, client.submit_error = None, AWAY
    launch(make_launcher(), known(instance, run))
    assert known(instance, run).status is Status.STARTING
    client.submit_error = None
    until(lambda: client.sent, "it is sent")


@pytest.mark.parametrize("status", [Status.QUEUED, Status.STARTING])
def test_without_patience_a_launch_fails_at_once(
    make_launcher: MakeLauncher, instance: DagsterInstance, status: DagsterRunStatus
) -> None:
    with pytest.raises(UnreachableServerError) as caught:
        launch(make_launcher(0.0), create(instance, status))
    assert caught.value is AWAY


def test_a_run_that_waits_to_be_sent_fails_when_the_patience_is_over(
    make_launcher: MakeLauncher,
    client: FakeClient,
    instance: DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the server's sentence: it is not STARTING for ever."""
    run = create(instance, Status.STARTING)
    launch(make_launcher(), run)
    until(lambda: client.tries > 3, "it tries again")
    assert not known(instance, run).is_finished
    later = SimpleNamespace(time=lambda: time.time() + 301)
    monkeypatch.setattr(late_launches, "time", later)
    until(lambda: known(instance, run).is_finished, "it fails")
    assert said(instance, run, "Cannot reach redis://fake. It stayed so for 300 s")


@pytest.mark.parametrize("has_worked", [True, False])
def test_a_refused_launch_waits_only_where_the_settings_have_worked(
    make_launcher: MakeLauncher, client: FakeClient, instance: DagsterInstance, has_worked: bool
) -> None:
    run = create(instance, Status.STARTING)
    client.error, client.has_worked = REFUSED, has_worked
    if not has_worked:
        with pytest.raises(RefusedByServerError):
            launch(make_launcher(), run)
        return
    launch(make_launcher(), run)
    client.error = None
    until(lambda: client.sent, "it is sent")


def test_a_resume_is_sent_when_the_server_is_back(
    make_launcher: MakeLauncher, client: FakeClient, instance: DagsterInstance
) -> None:
    """Without a limit: its steps may be running, and Dagster would fail the run."""
    run = create(instance, Status.STARTED)
    launcher = make_launcher(0.0)
    launcher.resume_run(ResumeRunContext(run, workspace=None, resume_attempt_number=2))
    until(lambda: client.tries > 3, "it tries again")
    assert known(instance, run).status is Status.STARTED
    client.error = None
    until(lambda: client.sent, "it is sent")
    assert [it.attempt for it in client.sent] == [2]
    assert said(instance, run, "The run cannot be resumed. Cannot reach redis://fake.") == 1


def test_a_run_that_can_never_be_sent_fails_and_holds_up_no_other(
    make_launcher: MakeLauncher, client: FakeClient, instance: DagsterInstance
) -> None:
    """As Dagster fails a run whose launch raises; the next one is sent in the same round."""
    bad, good = create(instance, Status.STARTING), create(instance, Status.STARTING)
    instance.add_run_tags(bad.run_id, {"dagster-taskiq/run_priority": "very"})
    launcher = make_launcher()
    for run in (bad, good):
        launch(launcher, known(instance, run))
    client.error = None
    until(lambda: known(instance, bad).is_finished, "the first one fails")
    until(lambda: client.sent, "the second one is sent")
    assert [it.run_id for it in client.sent] == [good.run_id]
    assert said(instance, bad, "'dagster-taskiq/run_priority' has the value 'very'")


@pytest.mark.parametrize("error", [OSError("the storage is away"), LauncherClosedError("left")])
def test_an_error_that_is_not_the_runs_fails_no_run(
    make_launcher: MakeLauncher,
    client: FakeClient,
    instance: DagsterInstance,
    error: Exception,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is tried again, unless the launcher is left; and other runs are sent meanwhile."""
    troubled, good = create(instance, Status.STARTING), create(instance, Status.STARTING)
    launcher = make_launcher()
    for run in (troubled, good):
        launch(launcher, run)
    client.error_of_run = {troubled.run_id: error}
    client.error = None
    if isinstance(error, OSError):
        until(lambda: client.sent, "the other one is sent")
        assert f"Cannot launch run {troubled.run_id}: OSError: the storage is away" in caplog.text
        client.error_of_run = {}
        until(lambda: len(client.sent) == 2, "both are sent")
    else:
        until(lambda: client.refused_runs, "it was tried")
    assert not known(instance, troubled).is_finished


def test_a_run_that_is_cancelled_meanwhile_is_not_sent(
    make_launcher: MakeLauncher, client: FakeClient, instance: DagsterInstance
) -> None:
    run = create(instance, Status.STARTING)
    launcher = make_launcher()
    launch(launcher, run)
    instance.report_run_canceled(run)
    until(lambda: not launcher._late._late, "it is forgotten, though the server is away")
    assert client.sent == []
