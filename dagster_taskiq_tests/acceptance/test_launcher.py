"""Whole runs on workers: launched, looked after, terminated, and resumed when they die."""

from __future__ import annotations

import asyncio
import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from dagster import (
    DagsterEventType,
    DagsterInstance,
    DagsterRunStatus,
)
from dagster._core.code_pointer import ModuleCodePointer
from dagster._core.definitions.reconstruct import ReconstructableJob
from dagster._core.launcher import WorkerStatus
from dagster._core.storage.runs.schema import RunsTable, RunTagsTable
from dagster._serdes import serialize_value

from dagster_taskiq import TaskiqRunLauncher
from dagster_taskiq.brokers import open_broker
from dagster_taskiq.errors import UnreachableServerError
from dagster_taskiq.execution.tasks import EXIT_SUPERSEDED
from dagster_taskiq.messages.attempt_ends import AttemptEnd, Counted, EndOutcome
from dagster_taskiq.messages.attempt_ends import Counter as EndCounter
from dagster_taskiq.messages.envelope import QueueKind, physical_queue
from dagster_taskiq.tags import QUEUE_TAG, RUN_PRIORITY_TAG, TASK_ID_TAG
from dagster_taskiq_tests.acceptance import launcher_jobs
from dagster_taskiq_tests.acceptance.harness import (
    PATIENCE_SECONDS,
    Note,
    Stack,
    WorkerProcess,
    is_running,
    open_stack,
    until,
)
from dagster_taskiq_tests.acceptance.launched import (
    LEASE_SECONDS,
    LaunchedRun,
    create,
    launch,
    metadata,
    open_launching_stack,
)
from dagster_taskiq_tests.servers import private_redis

CANCELED = DagsterRunStatus.CANCELED
FAILURE = DagsterRunStatus.FAILURE
STARTED = DagsterRunStatus.STARTED
STARTING = DagsterRunStatus.STARTING
SUCCESS = DagsterRunStatus.SUCCESS

#: How long a loaded machine may take, beside what a promise allows.
_SLACK_SECONDS = 3.0


@pytest.fixture(scope="module")
def final(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack whose runs are not resumed, with a worker of two slots and two run slots."""
    with open_launching_stack("redis", tmp_path_factory.mktemp("final")) as stack:
        stack.worker(name="main").await_ready()
        yield stack


@pytest.fixture(scope="module")
def narrow(final: Stack) -> str:
    """A queue of the same stack whose one worker executes one run at a time, and no steps."""
    final.worker("--run-slots", "1", slots=0, name="narrow", queues=["narrow"]).await_ready()
    return "narrow"


@pytest.fixture(scope="module")
def resuming(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack whose runs are resumed twice, with a worker of two slots and two run slots."""
    with open_launching_stack("redis", tmp_path_factory.mktemp("resuming"), resumes=2) as stack:
        stack.worker(name="main").await_ready()
        yield stack


def run_queue_depth(stack: Stack, queue: str) -> int:
    """How many runs wait in a queue."""
    assert stack.broker is not None
    broker = open_broker(stack.broker)
    name = physical_queue(stack.prefix, QueueKind.RUNS, queue)

    async def depth() -> int:
        await broker.startup()
        try:
            return await broker.depth(name)
        finally:
            await broker.shutdown()

    return asyncio.run(depth())


# --- launching ----------------------------------------------------------------------------------


def test_a_run_on_a_worker(final: Stack) -> None:
    """A launched run succeeds in a process of the worker, and all there is to know is to be seen.

    The log has who took it from which queue, the tag its task; its health is RUNNING and then
    SUCCESS; the debug info says where it was.
    """
    run = launch(final, "gated_then_more")
    assert run.dagster_run.tags[TASK_ID_TAG]
    pid = run.await_start()
    run.await_notes("started")
    assert run.health().status is WorkerStatus.RUNNING
    assert run.health().run_worker_id == run.dagster_run.tags[TASK_ID_TAG]
    # at the first renewal, where the claim was made before the code was loaded
    until(lambda: f"pid {pid}" in run.debug_info(), "the claim names the process")
    run.open_gate()
    assert run.wait().is_success
    assert until(lambda: run.health().status is WorkerStatus.SUCCESS, "the health is SUCCESS")
    (started,) = run.starts()
    (worker,) = {str(metadata(started)["worker"])}
    assert worker.startswith("main@")
    assert metadata(started)["queue"] == "dagster"
    assert int(metadata(started)["slot"]) in (1, 2)
    run.await_message('Sent the run to queue "dagster".')
    # a fresh process for each run, and other ones for the steps
    assert pid not in {note.pid for note in run.notes()}
    until(lambda: not is_running(pid), "the run's process ends with it")
    assert worker in run.debug_info()
    assert f"pid {pid}" in run.debug_info()
    assert "exit code 0" in run.debug_info()


@pytest.mark.parametrize("job", ["in_process", "multiprocess"])
def test_dagster_s_own_executors(final: Stack, job: str) -> None:
    """A run whose steps run in or below its own process succeeds under the launcher too."""
    # each step of the multiprocess executor is a new interpreter, which imports Dagster
    run = launch(final, job).wait(2 * PATIENCE_SECONDS)
    assert run.is_success
    assert run.output("add_one") == 2
    (started,) = run.starts()
    (note,) = run.notes("ran")
    assert (str(note.pid) == metadata(started)["pid"]) is (job == "in_process")


def test_a_run_that_fails(final: Stack) -> None:
    """A failing run is a FAILURE, and its process says so by its exit code."""
    run = launch(final, "fails").wait()
    assert run.status is FAILURE
    health = run.await_death()
    assert health.status is WorkerStatus.FAILED
    assert "exit code 1" in str(health.msg)


def test_the_history_is_told_of_runs(final: Stack) -> None:
    """By the worker, whatever executes their steps; the launcher counts what it sends."""
    won, lost = launch(final, "in_process_single"), launch(final, "fails")
    for run, outcome in ((won, EndOutcome.SUCCEEDED), (lost, EndOutcome.FAILED)):
        run_id = run.wait().run_id

        def ends(run_id: str = run_id) -> list[AttemptEnd]:
            return [end for end in final.ended(run_id) if end.kind == "runs"]

        (end,) = until(ends, "the end of the run is told")
        assert (end.outcome, end.worker.partition("@")[0]) == (outcome, "main")
        assert end.sent_at is not None
        assert end.started_at is not None
        assert end.sent_at <= end.started_at <= end.ended_at
    sent = EndCounter("dagster", "runs", Counted.SENT)
    until(lambda: final.counts().get(sent, 0) >= 2, "the launcher has told what it sent")


def test_many_runs_at_once(final: Stack) -> None:
    """Runs never take the slots of their own steps: 20 at once, on two of each, all succeed."""
    runs = [launch(final, "single") for _ in range(20)]
    for run in runs:
        assert run.wait().is_success
    assert len({metadata(run.starts()[0])["pid"] for run in runs}) == 20


def test_code_that_does_not_load(final: Stack) -> None:
    """A run whose code location is gone fails with the reason in its log, and frees its slot."""
    job = ReconstructableJob.for_module(launcher_jobs.__name__, "in_process_single")
    origin = job.get_python_origin()
    gone = ModuleCodePointer("a_module_that_is_gone", "x", working_directory=None)
    repository = origin.repository_origin._replace(code_pointer=gone)
    origin = origin._replace(repository_origin=repository)
    instance = final.instance
    run_id = instance.create_run_for_job(job.get_definition(), job_code_origin=origin).run_id
    instance.launch_run(run_id, cast("Any", None))
    run = LaunchedRun(final, run_id).wait()
    assert run.status is FAILURE
    said = " ".join(f"{e.message} {e.event_specific_data}" for e in run.events())
    assert "a_module_that_is_gone" in said


def test_code_that_kills_its_process(final: Stack) -> None:
    """The run fails at once, with the reason, not at its start timeout; it is not started again.

    Its slot goes on working.
    """
    run = launch(final, "kills_its_process").wait()
    assert run.status is FAILURE
    (failure,) = run.events(DagsterEventType.RUN_FAILURE)
    assert "The run could not start: its process was killed by SIGKILL" in str(failure.message)
    assert len(run.starts()) == 1
    assert run.health().status is WorkerStatus.FAILED
    assert launch(final, "in_process_single").wait().is_success
    assert len(run.starts()) == 1


def test_a_module_that_does_not_import(tmp_path: Path) -> None:
    """A run for which no child comes up fails at once, with the reason."""
    with open_launching_stack("redis", tmp_path) as stack:
        module = stack.directory / "fragile.py"
        module.write_text("")
        stack.worker("--run-slots", "1", "-i", "fragile").await_ready()
        assert launch(stack, "in_process_single").wait().is_success
        module.write_text("raise RuntimeError('on purpose')")
        run = launch(stack, "in_process_single").wait()
        assert run.status is FAILURE
        (failure,) = run.events(DagsterEventType.RUN_FAILURE)
        assert "The run could not start: slot 1: the module 'fragile'" in str(failure.message)
        assert run.health().status is WorkerStatus.FAILED


def test_over_rabbitmq(tmp_path: Path) -> None:
    """Over RabbitMQ a running run is terminated, a queued one too, and the next one succeeds."""
    with open_launching_stack("rabbitmq", tmp_path) as stack:
        stack.worker("--run-slots", "1").await_ready()
        running = launch(stack, "to_cancel")
        running.await_notes("started", 2)
        queued = launch(stack, "single")
        assert queued.health().status is WorkerStatus.RUNNING
        assert queued.terminate()
        assert queued.status is CANCELED
        assert running.terminate()
        assert running.wait().status is CANCELED
        assert len(running.notes("cleaned")) == 2
        # behind the one that was withdrawn
        assert launch(stack, "single").wait().is_success
        assert queued.notes() == []


# --- queues and priority ------------------------------------------------------------------------


def test_queue_and_priority(final: Stack, narrow: str) -> None:
    """A run goes to the queue of its tag, and what waits there starts in the order of its tags."""
    blocker = launch(final, "in_process_gated", tags={QUEUE_TAG: narrow})
    blocker.await_notes("started")
    priorities = {"low": {}, "high": {RUN_PRIORITY_TAG: "9"}, "middle": _celery("5")}
    runs = {
        name: launch(final, "in_process_single", tags={QUEUE_TAG: narrow, **tags})
        for name, tags in priorities.items()
    }
    blocker.open_gate()
    for run in (blocker, *runs.values()):
        assert run.wait().is_success
        assert str(metadata(run.starts()[0])["worker"]).startswith("narrow@")
    times = {name: run.notes("ran")[0].time for name, run in runs.items()}
    assert sorted(times, key=times.__getitem__) == ["high", "middle", "low"]


def _celery(priority: str) -> dict[str, str]:
    return {"dagster-celery/run_priority": priority}


def test_a_queue_that_nobody_serves(final: Stack) -> None:
    """A run in a queue without a worker says so in its log, and waits there in good health."""
    run = launch(final, "single", tags={QUEUE_TAG: "nobody-s"})
    # another test's worker may be there too
    run.await_message('on queue "nobody-s". Queues with run slots: dagster')
    assert run.health().status is WorkerStatus.RUNNING
    assert "waits in its queue" in str(run.health().msg)
    assert run_queue_depth(final, "nobody-s") == 1
    assert run.terminate() is True
    assert run.status is CANCELED
    assert run.terminate() is False
    assert run_queue_depth(final, "nobody-s") == 0
    assert run.health().status is WorkerStatus.NOT_FOUND


# --- termination --------------------------------------------------------------------------------


def test_terminating_a_queued_run(final: Stack, narrow: str) -> None:
    """A queued run is CANCELED when ``terminate`` returns, with or without its tag.

    Neither starts later, nor does one that Dagster has cancelled or failed (``start_timeout``)
    while it waited.
    """
    blocker = launch(final, "in_process_gated", tags={QUEUE_TAG: narrow})
    blocker.await_notes("started")
    instance = final.instance
    tagged, untagged, cancelled, failed = (
        launch(final, "in_process_single", tags={QUEUE_TAG: narrow}) for _ in range(4)
    )
    remove_tag(untagged)
    for run in (tagged, untagged):
        assert run.terminate() is True
        assert run.status is CANCELED
        assert run.terminate() is False
    assert run_queue_depth(final, narrow) == 2
    instance.report_run_canceled(cancelled.dagster_run)
    instance.report_run_failed(failed.dagster_run)
    blocker.open_gate()
    # it is behind them
    assert launch(final, "in_process_single", tags={QUEUE_TAG: narrow}).wait().is_success
    for run in (tagged, untagged, cancelled, failed):
        assert run.notes() == []
        assert run.starts() == []
    assert cancelled.status is CANCELED
    assert failed.status is FAILURE


def remove_tag(run: LaunchedRun) -> None:
    """As with a run whose launcher died between two writes."""
    storage: Any = run.stack.instance.run_storage
    stored = run.dagster_run
    tags = {key: value for key, value in stored.tags.items() if key != TASK_ID_TAG}
    with storage.connect() as connection:
        connection.execute(
            RunsTable.update()
            .where(RunsTable.c.run_id == run.run_id)
            .values(run_body=serialize_value(stored.with_tags(tags)))
        )
        connection.execute(
            RunTagsTable.delete().where(
                RunTagsTable.c.run_id == run.run_id, RunTagsTable.c.key == TASK_ID_TAG
            )
        )
    assert TASK_ID_TAG not in run.dagster_run.tags


def test_terminating_a_running_run(final: Stack) -> None:
    """A running run is CANCELED, its steps' clean-up code has run, and its queued steps never do.

    ``terminate`` says True while there is something to stop, and False afterwards.
    """
    run = launch(final, "to_cancel")
    run.await_notes("started", 2)
    assert run.terminate() is True
    assert run.wait().status is CANCELED
    assert len(run.notes("cleaned")) == 2
    assert run.terminate() is False
    assert launch(final, "single").wait().is_success
    assert len(run.notes("started")) == 2


def test_terminating_a_run_that_the_backend_has_forgotten(tmp_path: Path) -> None:
    """A running run is not called cancelled before its process has ended, also after a flush."""
    with open_launching_stack("redis", tmp_path) as stack:
        stack.worker().await_ready()
        run = launch(stack, "in_process_to_cancel")
        (started,) = run.await_notes("started")
        with stack.redis() as redis:
            redis.delete(*redis.scan_iter(f"*{stack.prefix}*", count=1000))
        assert run.terminate() is True
        assert run.wait().status is CANCELED
        assert len(run.notes("cleaned")) == 1
        until(lambda: not is_running(started.pid), "its process ends")


def test_terminating_steps_in_the_run_s_process(final: Stack) -> None:
    """A run with the in-process executor is CANCELED after its clean-up code; here without tag."""
    run = launch(final, "in_process_to_cancel")
    run.await_notes("started")
    remove_tag(run)
    assert run.terminate() is True
    assert run.wait().status is CANCELED
    assert len(run.notes("cleaned")) == 1


def test_terminating_a_run_that_ignores_it(tmp_path: Path) -> None:
    """A run's process that SIGTERM does not end is killed after the grace period, with its own."""
    grace_seconds = 2.0
    launcher = {"cancel_grace_seconds": grace_seconds}
    with open_launching_stack("redis", tmp_path, launcher=launcher) as stack:
        stack.worker().await_ready()
        run = launch(stack, "in_process_stubborn")
        (note,) = run.await_notes("started")
        asked_at = time.monotonic()
        assert run.terminate() is True
        until(lambda: not is_running(note.pid), "the run's process is gone")
        assert time.monotonic() >= asked_at + grace_seconds
        assert run.wait().status is CANCELED
        assert not is_running(note.more["child"])
        assert run.terminate() is False
        # its slot is free again
        assert launch(stack, "single").wait().is_success


def test_terminating_what_does_not_exist(final: Stack) -> None:
    """There is nothing to stop about a run that nobody knows."""
    assert final.instance.run_launcher.terminate(str(uuid.uuid4())) is False


# --- health -------------------------------------------------------------------------------------


def test_health_without_the_servers(tmp_path: Path) -> None:
    """While the backend is away, health checks and terminations raise, with its address.

    A run that is launched meanwhile is sent when the backend is back.
    """
    with private_redis() as server:
        home, directory = tmp_path / "launching", tmp_path / "stack"
        home.mkdir()
        directory.mkdir()
        launcher = {
            "module": "dagster_taskiq",
            "class": "TaskiqRunLauncher",
            "config": {"broker": server.url},
        }
        settings = {"telemetry": {"enabled": False}, "run_launcher": launcher}
        (home / "dagster.yaml").write_text(yaml.safe_dump(settings))
        address = server.url.removeprefix("redis://").partition("/")[0]
        with open_stack("redis", directory) as s:
            s.instance = DagsterInstance.from_config(str(home))
            s.exit_stack.callback(s.instance.dispose)
            assert isinstance(s.instance.run_launcher, TaskiqRunLauncher)
            run = launch(s, "single")
            assert run.health().status is WorkerStatus.RUNNING
            server.kill()
            with pytest.raises(UnreachableServerError, match=address):
                run.health()
            run_id = create(s, "single")
            s.instance.launch_run(run_id, cast("Any", None))
            late = LaunchedRun(s, run_id)
            late.await_message(address)
            with pytest.raises(UnreachableServerError, match=address):
                run.terminate()
            server.restart()
            until(_works(run.health), "health checks work again")
            late.await_message("Sent the run to queue")


def _works(function: Callable[..., Any], *arguments: Any) -> Callable[[], bool]:
    def works() -> bool:
        try:
            function(*arguments)
        except UnreachableServerError:
            return False
        return True

    return works


def test_health_after_a_kill(final: Stack) -> None:
    """A run whose process was killed is FAILED at once, by the signal, and Dagster ends the run.

    Its steps do not outlive it: what runs is stopped, with its clean-up code, within the lease and
    5 s, and what waits never starts.
    """
    run = launch(final, "to_cancel")
    run.await_start()
    run.await_notes("started", 2)
    run.signal_process(signal.SIGKILL)
    killed_at = time.monotonic()
    health = run.await_death()
    assert health.status is WorkerStatus.FAILED
    assert "SIGKILL" in str(health.msg)
    assert "SIGKILL" in run.debug_info()
    run.monitor()
    assert run.status is FAILURE
    cleaned = run.await_notes("cleaned", 2)
    assert max(n.time for n in cleaned) <= killed_at + LEASE_SECONDS + 5 + _SLACK_SECONDS
    assert launch(final, "single").wait().is_success
    assert len(run.notes("started")) == 2


def test_a_run_process_that_is_stopped(final: Stack) -> None:
    """A run's process that does not go on after SIGSTOP is noticed by its worker, and killed."""
    run = launch(final, "in_process_gated")
    run.await_notes("started")
    pid = run.signal_process(signal.SIGSTOP)
    health = run.await_death()
    assert health.status is WorkerStatus.FAILED
    assert "SIGSTOP" in str(health.msg)
    assert not is_running(pid)
    run.monitor()
    assert run.status is FAILURE


def test_runs_do_not_starve_their_steps(final: Stack) -> None:
    """More runs than the worker has slots of both kinds are under way, and each gets its steps.

    Were runs to take the slots of steps, none of these could go on.
    """
    runs = [launch(final, "gated_then_more") for _ in range(5)]
    runs[0].await_notes("started")
    runs[1].await_notes("started")
    for run in runs:
        run.open_gate()
    assert all(run.wait().is_success for run in runs)


# --- resume -------------------------------------------------------------------------------------


def check_each_once(run: LaunchedRun) -> None:
    """The side effect of each attempt of a ``resumable`` has happened once."""
    counts = Counter((_step_key(note), note.attempt) for note in run.notes("ran"))
    assert counts == dict.fromkeys(launcher_jobs.RESUMABLE_ATTEMPTS, 1)
    assert run.output("total") == 2 * (1 + 2 + 3 + 4)
    skipped = Counter(run.steps(DagsterEventType.STEP_SKIPPED))
    assert skipped == {"after_left": 1, "after_after_left": 1}


def _step_key(note: Note) -> str:
    key = note.more.get("key")
    return f"{note.step}[{key}]" if key else note.step


def begin_resumable(stack: Stack, *, events: int = 0, **arguments: Any) -> LaunchedRun:
    """Launch one and wait until it has something of everything: done, running, queued, delayed."""
    ops = {"first": {"config": {"events": events}}}
    run = launch(stack, "resumable", ops=ops, **arguments)
    until(lambda: len(held(run)) == 2, "two mapped steps run")
    return run


def held(run: LaunchedRun) -> list[Note]:
    """The beginnings of mapped steps."""
    return [note for note in run.notes("ran") if note.step.startswith("hold")]


@pytest.mark.parametrize("is_late", [False, True], ids=["at once", "after the lease"])
def test_resume(resuming: Stack, is_late: bool) -> None:
    """After ``kill -9`` of a run's process, at any time, each step's side effect happens once.

    There are steps that are done, running, queued, skipped and waiting for a delayed retry, mapped
    ones among them, and in one case more than 1,000 events in the log. One step ends while the run
    has no process, and where the run's lease has ended by then, what waits is not started.
    """
    run = begin_resumable(resuming, events=0 if is_late else 1100)
    run.signal_process(signal.SIGKILL)
    run.await_death()
    if is_late:
        loop = f"*{run.run_id}:loop"
        with resuming.redis() as redis:
            until(lambda: not list(redis.scan_iter(loop, count=1000)), "the loop's lease ends")
    run.open_gate(held(run)[0].more["key"])
    run.await_notes("held")
    run.monitor()
    run.await_message("Resumed the run; ")
    for number in range(4):
        run.open_gate(f"n{number}")
    assert run.wait().is_success
    assert len(run.starts()) == 2
    check_each_once(run)
    if not is_late:
        assert len(run.logs()) > 1100


def test_resume_of_a_run_with_failures(resuming: Stack) -> None:
    """What failed before the kill, and while the run had no process, fails the run, once each."""
    run = launch(resuming, "fails_twice")
    run.await_notes("started")
    until(lambda: run.steps(DagsterEventType.STEP_FAILURE), "the first step fails")
    run.signal_process(signal.SIGKILL)
    run.await_death()
    run.open_gate()
    both = ["fail_at_once", "fail_when_told"]
    until(lambda: run.steps(DagsterEventType.STEP_FAILURE) == both, "the second step fails")
    run.monitor()
    run.wait()
    assert run.status is DagsterRunStatus.FAILURE
    assert run.steps(DagsterEventType.STEP_FAILURE) == both
    messages = [entry.user_message for entry in run.logs()]
    assert [messages.count(f"the hook of {step} ran") for step in both] == [1, 1]
    assert not run.notes("ran")


def test_resume_with_a_pool(resuming: Stack) -> None:
    """A run is resumed though another one holds the pool slot that its finished step had."""
    resuming.instance.event_log_storage.set_concurrency_slots(launcher_jobs.POOL, 1)
    run = launch(resuming, "pool_twice")
    run.await_notes("started")
    other = launch(resuming, "pool_held")
    other.await_notes("pooled started")
    run.signal_process(signal.SIGKILL)
    run.monitor()
    run.await_message("Resumed the run; 1 steps")
    run.open_gate()
    run.await_message("blocked by")
    other.open_gate()
    assert run.wait().is_success
    assert other.wait().is_success
    assert len(run.notes("ran")) == len(run.notes("started")) == len(run.notes("pooled after")) == 1
    assert run.notes("pooled after")[0].time > other.notes("pooled ended")[0].time


def test_resume_of_a_step_in_a_pool(resuming: Stack) -> None:
    """A running step keeps its pool slot over a resume, and gives it back at its end."""
    resuming.instance.event_log_storage.set_concurrency_slots(launcher_jobs.POOL, 1)
    run = launch(resuming, "pool_held")
    run.await_notes("pooled started")
    run.signal_process(signal.SIGKILL)
    run.monitor()
    run.await_message("Resumed the run; 1 steps")
    info = resuming.instance.event_log_storage.get_concurrency_info(launcher_jobs.POOL)
    assert info.active_run_ids == {run.run_id}
    run.open_gate()
    assert run.wait().is_success
    assert len(run.notes("pooled started")) == 1
    info = resuming.instance.event_log_storage.get_concurrency_info(launcher_jobs.POOL)
    assert info.active_slot_count == 0


def test_resume_after_a_step_in_a_pool_has_ended(resuming: Stack) -> None:
    """A step that ends while its run has no process does not keep its pool slot.

    With a pool of one the run's next step would wait for that slot for ever.
    """
    resuming.instance.event_log_storage.set_concurrency_slots(launcher_jobs.POOL, 1)
    run = launch(resuming, "pool_in_turn")
    run.await_notes("pooled started")
    run.signal_process(signal.SIGKILL)
    run.await_death()
    run.open_gate()
    until(lambda: run.steps(DagsterEventType.STEP_SUCCESS), "the step ends without its run")
    run.monitor()
    assert run.wait().is_success
    info = resuming.instance.event_log_storage.get_concurrency_info(launcher_jobs.POOL)
    assert not info.active_run_ids


def test_a_former_process_that_still_lives(resuming: Stack) -> None:
    """Of two processes of one run the former ends, and leaves the run and its steps alone."""
    run = launch(resuming, "gated_then_more")
    run.await_notes("started")
    pid, former = run.await_start(), run.dagster_run.tags[TASK_ID_TAG]
    # as after a partition of the network that had the daemon think that it is dead
    resuming.instance.resume_run(run.run_id, cast("Any", None), attempt_number=1)
    run.await_message("Resumed the run; 1 steps")
    until(lambda: not is_running(pid), "the former process ends")
    assert run.dagster_run.tags[TASK_ID_TAG] != former
    client = cast("TaskiqRunLauncher", resuming.instance.run_launcher)._client
    result = until(lambda: client.look(run.run_id, former)[1], "its result is there")
    assert result is not None
    assert result.exit_code == EXIT_SUPERSEDED
    assert run.status is STARTED
    assert run.health().status is WorkerStatus.RUNNING
    run.open_gate()
    assert run.wait().is_success
    assert len(run.notes("started")) == len(run.notes("ran")) == 1
    assert run.steps(DagsterEventType.STEP_FAILURE) == []


def test_a_run_that_is_given_up_though_it_might_be_resumed(resuming: Stack) -> None:
    """A step goes on while its run may get another process, and fails when Dagster has failed it.

    Nobody calls ``terminate`` then, as when the launch of the resumed run fails.
    """
    run = launch(resuming, "gated_then_more")
    (started,) = run.await_notes("started")
    run.signal_process(signal.SIGKILL)
    run.await_death()
    with resuming.redis() as redis:
        until(
            lambda: not redis.exists(f"{resuming.prefix}:run:{run.run_id}:loop"), "it is orphaned"
        )
    assert is_running(started.pid)
    resuming.instance.report_run_failed(run.dagster_run, "The test has given it up.")
    given_up_at = time.monotonic()
    until(lambda: not is_running(started.pid), "its step is stopped")
    assert time.monotonic() - given_up_at < LEASE_SECONDS + 5 + _SLACK_SECONDS
    assert run.notes("ran") == []
    # no loop is there to log the end of the attempt
    assert len(run.steps(DagsterEventType.STEP_FAILURE)) == 1


def launch_on_its_own_worker(
    stack: Stack, job: str, *, run_slots: int = 1
) -> tuple[LaunchedRun, WorkerProcess]:
    """A run on a worker that executes nothing else; its steps are on the stack's."""
    queue = f"queue-{uuid.uuid4().hex[:6]}"
    worker = worker_of_runs(stack, queue, run_slots)
    run = launch(stack, job, tags={QUEUE_TAG: queue})
    run.await_start()
    return run, worker


def worker_of_runs(stack: Stack, queue: str, run_slots: int = 1) -> WorkerProcess:
    """A worker for whole runs only."""
    return stack.worker("--run-slots", str(run_slots), slots=0, queues=[queue]).await_ready()


def test_a_run_goes_from_worker_to_worker(resuming: Stack) -> None:
    """Neither the orderly nor the sudden end of its worker ends a run, nor any of its steps.

    A worker that is told to stop gives its run away at once. After ``kill -9`` of its worker a run
    is NOT_FOUND, with the reason, as soon as its lease has ended. Its one step runs on all along.
    """
    run, first = launch_on_its_own_worker(resuming, "gated_then_more")
    queue = run.dagster_run.tags[QUEUE_TAG]
    (note,) = run.await_notes("started")
    second = worker_of_runs(resuming, queue)
    first.terminate()
    assert first.wait() == 0
    assert "the run is handed over" in first.log
    run.monitor()
    run.await_message("Resumed the run; 1 steps")
    third = worker_of_runs(resuming, queue)
    pid = run.await_start(2)
    second.kill()
    until(lambda: not is_running(pid), "the run's process dies with its worker")
    assert run.health().status is WorkerStatus.RUNNING
    health = run.await_death()
    assert health.status is WorkerStatus.NOT_FOUND
    assert "its lease ended" in str(health.msg)
    assert run.status is STARTED
    run.monitor()
    run.await_start(3)
    assert is_running(note.pid)
    run.open_gate()
    assert run.wait().is_success
    assert len(run.notes("started")) == len(run.notes("ran")) == 1
    assert run.steps(DagsterEventType.STEP_SUCCESS) == ["gated", "after"]
    names = [worker.full_name for worker in (first, second, third)]
    assert [metadata(event)["worker"] for event in run.starts()] == names


def test_terminating_runs_whose_worker_is_dead(resuming: Stack) -> None:
    """A user's cancel wins over resume: the run ends CANCELED, and its steps on other workers stop.

    That holds while the dead worker's lease is still there, and at once when it is not any more.
    """
    run, worker = launch_on_its_own_worker(resuming, "to_cancel", run_slots=2)
    late = launch(resuming, "in_process_gated", tags={QUEUE_TAG: run.dagster_run.tags[QUEUE_TAG]})
    late.await_notes("started")
    run.await_notes("started", 2)
    worker.kill()
    killed_at = time.monotonic()
    assert run.terminate() is True
    late.await_death()
    assert late.terminate() is True
    assert late.status is CANCELED
    assert run.wait().status is CANCELED
    cleaned = run.await_notes("cleaned", 2)
    assert max(n.time for n in cleaned) <= killed_at + LEASE_SECONDS + 5 + _SLACK_SECONDS
    for terminated in (run, late):
        assert terminated.terminate() is False
        assert len(terminated.starts()) == 1
    assert len(run.notes("started")) == 2


def test_terminating_a_run_whose_process_is_gone(resuming: Stack) -> None:
    """A dead run that waits to be resumed is CANCELED by ``terminate``, and its steps stop."""
    run = launch(resuming, "to_cancel")
    run.await_notes("started", 2)
    run.signal_process(signal.SIGKILL)
    run.await_death()
    assert run.terminate() is True
    assert run.status is CANCELED
    run.await_notes("cleaned", 2)
    assert launch(resuming, "single").wait().is_success
    assert len(run.notes("started")) == 2


def test_draining_waits_for_a_run(final: Stack) -> None:
    """Where runs are not resumed a worker that is told to stop waits for its own, and says so."""
    run, first = launch_on_its_own_worker(final, "gated_then_more")
    run.await_notes("started")
    first.terminate()
    first.await_log(f"Waiting for run {run.run_id}: it cannot be resumed.")
    assert run.health().status is WorkerStatus.RUNNING
    run.open_gate()
    assert run.wait().is_success
    assert first.wait() == 0
