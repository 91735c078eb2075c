"""The worker's life: its children, its end, its command line, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from dagster import DagsterEventType, DagsterRunStatus
from taskiq import BrokerMessage

from dagster_taskiq.brokers import open_broker
from dagster_taskiq.messages.envelope import QueueKind, physical_queue
from dagster_taskiq_tests.acceptance.harness import (
    BrokerKind,
    Run,
    Stack,
    WorkerProcess,
    is_running,
    open_stack,
    until,
)
from dagster_taskiq_tests.servers import private_redis

FAILURE = DagsterEventType.STEP_FAILURE
SUCCESS = DagsterEventType.STEP_SUCCESS
UP_FOR_RETRY = DagsterEventType.STEP_UP_FOR_RETRY

LEASE_SECONDS = 3.0

#: How long a loaded machine may take, beside what a promise allows, to write and read a log.
_SLACK_SECONDS = 3.0


# --- start --------------------------------------------------------------------------------------

#: Every Python process runs it first; this one notes who imports Dagster.
COUNTER = """
import os, sys

class Counter:
    def find_spec(self, name, path=None, target=None):
        if name == "dagster":
            with open(os.path.join(os.path.dirname(__file__), "imports"), "a") as file:
                file.write(f"{os.getpid()}\\n")

sys.meta_path.insert(0, Counter())
"""


def test_dagster_is_imported_once(stack: Stack) -> None:
    """By the worker; the one fork server is a copy of it, and the children are copies of that."""
    (stack.directory / "sitecustomize.py").write_text(COUNTER)
    path = os.pathsep.join([str(stack.directory), stack.environment["PYTHONPATH"]])
    worker = stack.worker(slots=3, environment={"PYTHONPATH": path}).await_ready()
    run = stack.run("serial")
    assert run.is_success
    (server,) = {psutil.Process(note.pid).ppid() for note in run.notes("ran")}
    assert psutil.Process(server).ppid() == worker.pid
    # of each slot, for steps and for runs
    assert len(psutil.Process(server).children()) == 2 * 3
    assert (stack.directory / "imports").read_text().split() == [str(worker.pid)]


# --- death of the worker ------------------------------------------------------------------------


def kill_during_a_step(worker: WorkerProcess, run: Run) -> float:
    """Kill the worker once the run's step has begun; the time of that."""
    (note,) = run.await_notes("started")
    below = worker.descendants()
    assert note.pid in {process.pid for process in below}
    assert note.more["child"] in {process.pid for process in below}
    worker.kill()
    killed_at = time.time()
    _, alive = psutil.wait_procs(below, timeout=5)
    assert alive == []
    return killed_at


def time_of(run: Run, kind: DagsterEventType, step: str) -> float:
    """When an event was logged."""
    (entry,) = (
        entry
        for entry in run.logs()
        if entry.dagster_event and entry.dagster_event.event_type is kind and entry.step_key == step
    )
    return entry.timestamp


@pytest.mark.parametrize("kind", ["redis", "rabbitmq"])
def test_a_killed_worker_s_step_is_retried(kind: BrokerKind, tmp_path: Path) -> None:
    """No process of a killed worker lives on, and its step goes to another within lease + 5 s."""
    with open_stack(kind, tmp_path) as stack:
        first = stack.worker(slots=1).await_ready()
        run = stack.start("hangs_once", lease_seconds=LEASE_SECONDS)
        run.await_notes("started")
        stack.worker(slots=1).await_ready()
        killed_at = kill_during_a_step(first, run)
        assert run.wait().is_success
        waited = time_of(run, UP_FOR_RETRY, "with_grandchild") - killed_at
        assert waited <= LEASE_SECONDS + 5 + _SLACK_SECONDS
        assert run.notes("again")[0].attempt == 2
        assert run.output("add_one") == 2


def test_a_killed_worker_s_step_fails(stack: Stack) -> None:
    """Without a retry policy the run fails within lease + 5 s, with the reason in the log."""
    worker = stack.worker(slots=1).await_ready()
    run = stack.start("hangs", lease_seconds=LEASE_SECONDS)
    killed_at = kill_during_a_step(worker, run)
    assert run.wait().status is DagsterRunStatus.FAILURE
    waited = time_of(run, FAILURE, "with_grandchild") - killed_at
    assert waited <= LEASE_SECONDS + 5 + _SLACK_SECONDS
    reason = run.failure("with_grandchild")
    assert worker.full_name in reason
    assert "its lease on this attempt ended" in reason


# --- death of a child ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack with a worker of one slot, which is of use only while the slot comes back."""
    with open_stack("redis", tmp_path_factory.mktemp("stack")) as stack:
        stack.worker(slots=1).await_ready()
        yield stack


def test_deaths_of_children(single: Stack) -> None:
    """A step's process that dies fails the step at once, by its exit code or signal's name."""
    run = single.run("deaths")
    assert run.status is DagsterRunStatus.FAILURE
    assert "exit code 3" in run.failure("exits")
    assert "SIGSEGV" in run.failure("segfaults")
    assert "SIGKILL" in run.failure("kills_itself")
    # the one slot came back each time
    assert "add_one" in run.steps(SUCCESS)


def test_a_child_killed_from_outside(single: Stack) -> None:
    """A step that is killed from outside is failed at once, not when its lease of 30 s ends."""
    run = single.start("hangs")
    (note,) = run.await_notes("started")
    os.kill(note.pid, signal.SIGKILL)
    assert run.wait(15).status is DagsterRunStatus.FAILURE
    assert "SIGKILL" in run.failure("with_grandchild")
    until(lambda: not is_running(note.more["child"]), "what the step had started is dead")


def test_an_idle_child_is_killed(single: Stack) -> None:
    """Nothing comes of it: the slot gets another child before the next step."""
    (pid,) = {note.pid for note in single.run("serial").notes("ran")}
    os.kill(pid, signal.SIGKILL)
    run = single.run("serial")
    assert run.is_success
    assert run.events(UP_FOR_RETRY) == []
    assert pid not in {note.pid for note in run.notes("ran")}


def test_the_guard_is_killed(stack: Stack) -> None:
    """The worker replaces its guard, and the new one does what the first would have done."""
    worker = stack.worker(slots=1).await_ready()
    (guard,) = (p for p in worker.descendants() if "guard.py" in " ".join(p.cmdline()))
    guard.kill()
    worker.await_log("The guard process ended")
    run = stack.start("hangs", lease_seconds=LEASE_SECONDS)
    kill_during_a_step(worker, run)
    assert run.wait().status is DagsterRunStatus.FAILURE


def test_the_fork_server_is_killed(stack: Stack) -> None:
    """The process that children are forked from is replaced too, and the children with it."""
    worker = stack.worker(slots=1).await_ready()
    (before,) = {note.pid for note in stack.run("serial").notes("ran")}
    psutil.Process(before).parent().kill()  # type: ignore[union-attr]
    run = stack.run("serial")
    assert run.is_success
    assert before not in {note.pid for note in run.notes("ran")}
    assert not is_running(before)
    worker.terminate()
    assert worker.wait() == 0


# --- recycling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--"]], ids=["ours", "celery"])
def test_max_tasks_per_child(stack: Stack, arguments: list[str]) -> None:
    """A child is replaced after so many tasks."""
    stack.worker(*arguments, "--max-tasks-per-child", "2", slots=1).await_ready()
    run = stack.run("serial")
    assert run.is_success
    # the first child had "one" before
    first, second, third, fourth = (note.pid for note in run.notes("ran"))
    assert first != second
    assert second == third
    assert third != fourth


def test_max_memory_per_child(stack: Stack) -> None:
    """A child above the limit is replaced, after the step that took it there has ended."""
    stack.worker("--max-memory-per-child", str(260 << 10), slots=1).await_ready()
    run = stack.run("growing")
    assert run.is_success
    assert len({note.pid for note in run.notes("ran")}) == 3
    below = stack.run("serial")
    assert len({note.pid for note in below.notes("ran")}) == 1


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


# --- the command line ---------------------------------------------------------------------------


def test_list_and_terminate(stack: Stack) -> None:
    """``worker list`` shows who works, ``worker terminate`` stops one by name, or all."""
    settings = str(stack.settings_file())
    alpha = stack.worker(name="alpha", queues=["a", "b"])
    beta = stack.worker(name="beta", slots=1)
    alpha.await_ready()
    beta.await_ready()
    listed = stack.cli("worker", "list", "-y", settings)
    assert re.search(rf"{alpha.full_name} +a, b +0/2 .* running +{alpha.pid}", listed)
    assert re.search(rf"{beta.full_name} +dagster +0/1 .* running +{beta.pid}", listed)
    said = stack.cli("worker", "terminate", "alpha", "-y", settings)
    assert alpha.full_name in said
    assert alpha.wait() == 0
    assert beta.process.poll() is None
    assert [record.name for record in stack.worker_records()] == [beta.full_name]
    stack.cli("worker", "terminate", "--all", "-y", settings)
    assert beta.wait() == 0
    assert stack.worker_records() == []


def test_background(stack: Stack) -> None:
    """``-d`` leaves a worker running; it says the name, a unique one, the pid and the log."""
    settings = str(stack.settings_file())
    said = [stack.cli("worker", "start", "-dc", "1", "-y", settings) for _ in range(2)]
    matches = [re.search(r"Started worker (\S+), pid (\d+), log (.+)", text) for text in said]
    names, pids, logs = zip(*(match.groups() for match in matches if match), strict=True)
    try:
        assert len(set(names)) == 2
        for log in logs:
            until(lambda: "is ready" in Path(log).read_text(), "the worker is ready")  # noqa: B023
        assert stack.run("simple").is_success
        assert stack.cli("worker", "terminate", "--all", "-y", settings).count("to stop") == 2
        until(lambda: not any(is_running(int(pid)) for pid in pids), "the workers have ended")
    finally:
        for pid in pids:
            if is_running(int(pid)):
                os.kill(int(pid), signal.SIGKILL)


def test_a_signal_before_it_listens_to_any(stack: Stack, tmp_path: Path) -> None:
    """A worker that is stopped while it starts leaves no file, as one that has been at work."""
    files = tmp_path / "files"
    files.mkdir()
    settings = tmp_path / "settings.yaml"
    os.mkfifo(settings)  # it reads them for ever
    worker = stack.worker(environment={"TMPDIR": str(files)}, settings=settings)
    until(lambda: list(files.iterdir()), "it has made a directory")
    worker.terminate()
    assert worker.wait() == 0
    assert list(files.iterdir()) == []


@pytest.mark.parametrize("key", ["config", "celery"])
def test_yaml(stack: Stack, key: str) -> None:
    """dagster-celery's YAML starts a worker, with ``env:`` values, in both its spellings."""
    assert stack.broker is not None
    path = stack.directory / "celery.yaml"
    config = {
        "broker": {"env": "ACCEPTANCE_BROKER"},
        "config_source": {
            "key_prefix": stack.broker.key_prefix,
            "task_default_queue": "of-the-file",
            "worker_concurrency": 1,
            "worker_prefetch_multiplier": 1,
        },
    }
    path.write_text(yaml.safe_dump({"execution": {key: config}}))
    worker = stack.worker(environment={"ACCEPTANCE_BROKER": stack.broker.url}, settings=path)
    worker.await_ready()
    assert "queues of-the-file" in worker.log
    assert "worker_prefetch_multiplier is a setting of Celery" in worker.log
    assert stack.run("simple", default_queue="of-the-file").is_success


def test_servers_from_the_environment(tmp_path: Path) -> None:
    """Without a YAML the environment names the server, for workers and runs alike."""
    with private_redis() as server, open_stack("embedded", tmp_path) as stack:
        environment = {"DAGSTER_TASKIQ_BROKER_URL": server.url}
        stack.worker(environment=environment, settings=stack.empty_file()).await_ready()
        run = stack.run("diamond", environment=environment)
        assert run.is_success
        assert not (stack.home / "dagster_taskiq").exists()


# --- what cannot be loaded, and what is no task -------------------------------------------------


def test_a_module_that_the_worker_has_not(shared: Stack, tmp_path: Path) -> None:
    """A step whose code the worker cannot import fails with that reason; the worker goes on."""
    (tmp_path / "only_here.py").write_text(
        "from dagster import job, op\n"
        "from dagster_taskiq import taskiq_executor\n"
        "@op\n"
        "def absent(): pass\n"
        "@job(executor_def=taskiq_executor)\n"
        "def absent_job(): absent()\n"
    )
    run = shared.run("only_here:absent_job", module_path=tmp_path)
    assert run.status is DagsterRunStatus.FAILURE
    assert "No module named 'only_here'" in run.failure("absent")
    assert shared.run("simple").is_success


def test_an_include_that_is_missing(stack: Stack) -> None:
    """A worker that cannot import a module it was told to does not start, and says which."""
    worker = stack.worker("-i", "no_such_module", slots=1)
    assert worker.wait() not in (0, 3)
    (line,) = [line for line in worker.log.splitlines() if line.startswith("Error: ")]
    assert "no_such_module" in line
    assert "dagster_taskiq/cli" not in worker.log


def test_includes_are_imported_by_each_child_and_the_app_by_the_worker_too(stack: Stack) -> None:
    """``-i`` and ``-A`` run before the first step, in the process that executes it."""
    for module in ("included", "team_app"):
        (stack.directory / f"{module}.py").write_text(
            "import os, pathlib\n"
            "directory = os.environ['DAGSTER_TASKIQ_TEST_DIRECTORY']\n"
            "pathlib.Path(directory, f'{__name__}-{os.getpid()}').touch()\n"
        )
    worker = stack.worker("-i", "included", "-A", "team_app:any", slots=1).await_ready()
    run = stack.run("serial")
    (pid,) = {note.pid for note in run.notes("ran")}
    for process in (f"included-{pid}", f"team_app-{pid}", f"team_app-{worker.pid}"):
        assert (stack.directory / process).exists()
    assert not (stack.directory / f"included-{worker.pid}").exists()


def _forged(task_id: str, **changes: object) -> bytes:
    message = {
        "task_id": task_id,
        "task_name": "execute_plan",
        "labels": {},
        "labels_types": None,
        "args": [],
        "kwargs": {},
        **changes,
    }
    return json.dumps(message).encode()


#: Messages that are no tasks, some of which would hold a slot of Taskiq's own worker for ever.
GARBAGE = [
    b"",
    b"\xff\xfe not even text",
    b"{}",
    b"[1, 2, 3]",
    b"null",
    _forged("1", task_name="somebody.elses"),
    _forged("2", labels={"ack_type": "bogus"}),
    _forged("3", labels={"timeout": "abc"}),
    _forged("4", kwargs={"context": 1}),
    _forged("5", args=[1, 2, 3, 4]),
    _forged("6", kwargs={"header": {}, "payload": {}}),
    _forged("7", kwargs={"header": None, "payload": "x"}),
]


async def send_garbage(stack: Stack) -> None:
    """Put it all into the default queue."""
    assert stack.broker is not None
    broker = open_broker(stack.broker)
    await broker.startup()
    queue = physical_queue(stack.broker.key_prefix, QueueKind.STEPS, "dagster")
    try:
        for number, data in enumerate(GARBAGE):
            labels = {"queue_name": queue, "priority": 9}
            name = f"garbage-{number}"
            await broker.kick(
                BrokerMessage(task_id=name, task_name="x", message=data, labels=labels)
            )
    finally:
        await broker.shutdown()


@pytest.mark.parametrize("kind", ["redis", "rabbitmq"])
def test_garbage_in_the_queue(kind: BrokerKind, tmp_path: Path) -> None:
    """Messages that are no tasks are refused and counted; the worker's slots stay free."""
    with open_stack(kind, tmp_path) as stack:
        asyncio.run(send_garbage(stack))
        worker = stack.worker(slots=1).await_ready()
        worker.await_log("Refused a message")
        until(lambda: stack.refused_count() == len(GARBAGE), "all are refused")
        assert stack.run("diamond").is_success
        assert asyncio.run(stack.depth("dagster")) == 0
