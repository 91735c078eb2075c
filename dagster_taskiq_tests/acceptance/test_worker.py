"""A worker's start, its command line, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from pathlib import Path

import psutil
import pytest
import yaml
from dagster import DagsterRunStatus
from taskiq import BrokerMessage

from dagster_taskiq.brokers import open_broker
from dagster_taskiq.messages.envelope import QueueKind, physical_queue
from dagster_taskiq_tests.acceptance.harness import (
    BrokerKind,
    Stack,
    forks,
    is_running,
    open_stack,
    until,
)
from dagster_taskiq_tests.server_processes import temporary_directory
from dagster_taskiq_tests.servers import private_redis

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
    """By the worker; the one fork server is a copy of it, and all others are copies of that."""
    (stack.directory / "sitecustomize.py").write_text(COUNTER)
    path = os.pathsep.join([str(stack.directory), stack.environment["PYTHONPATH"]])
    worker = stack.worker(slots=3, environment={"PYTHONPATH": path}, is_fresh=True).await_ready()
    run = stack.run("serial")
    assert run.is_success
    (server,) = [it for it in psutil.Process(worker.pid).children() if forks(it)]
    below = server.children(recursive=True)
    assert {note.pid for note in run.notes("ran")} <= {it.pid for it in below}
    # of each slot, for steps and for runs
    assert len([it for it in below if not forks(it)]) == 2 * 3
    assert (stack.directory / "imports").read_text().split() == [str(worker.pid)]


# --- the command line ---------------------------------------------------------------------------


def test_list_and_terminate(stack: Stack) -> None:
    """``worker list`` shows who works, ``worker terminate`` stops one by name, or all."""
    settings = str(stack.settings_file())
    alpha = stack.worker(name="alpha", queues=["a", "b"])
    beta = stack.worker(name="beta", slots=1)
    alpha.await_ready()
    beta.await_ready()
    listed = stack.cli("worker", "list", "-y", settings, is_fresh=True)
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
    said = [
        stack.cli("worker", "start", "-dc", "1", "-y", settings, is_fresh=True) for _ in range(2)
    ]
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
    worker = stack.worker(environment={"TMPDIR": str(files)}, settings=settings, is_fresh=True)
    until(lambda: list(files.iterdir()), "it has made a directory")
    worker.terminate()
    assert worker.wait() == 0
    assert list(files.iterdir()) == []


#: A module that keeps the end of the worker up, once that has closed all that it had open.
ENDS_SLOWLY = """
import atexit, multiprocessing, os, pathlib, time
directory = pathlib.Path(os.environ["DAGSTER_TASKIQ_TEST_DIRECTORY"])

def wait():
    (directory / "ending").touch()
    while not (directory / "go").exists():
        time.sleep(0.01)

if multiprocessing.parent_process() is None:
    atexit.register(wait)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_ends(stack: Stack, number: int) -> None:
    """What it does at its very end is not cut short: it leaves no file then, either."""
    (stack.directory / "slow_end.py").write_text(ENDS_SLOWLY)
    with temporary_directory() as files:  # of a short name, since sockets are made there
        environment = {"TMPDIR": str(files)}
        options = ("-A", "slow_end:any")
        worker = stack.worker(*options, slots=1, environment=environment, is_fresh=True)
        worker.await_ready().terminate()
        until((stack.directory / "ending").exists, "it ends")
        worker.process.send_signal(number)
        (stack.directory / "go").touch()
        assert worker.wait() == 0
        assert list(files.iterdir()) == []
        assert "Traceback" not in worker.log


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
    environment = {"ACCEPTANCE_BROKER": stack.broker.url}
    worker = stack.worker(environment=environment, settings=path, is_fresh=True)
    worker.await_ready()
    assert "queues of-the-file" in worker.log
    assert "worker_prefetch_multiplier is a setting of Celery" in worker.log
    assert stack.run("simple", default_queue="of-the-file").is_success


def test_servers_from_the_environment(tmp_path: Path) -> None:
    """Without a YAML the environment names the server, for workers and runs alike."""
    with private_redis() as server, open_stack("embedded", tmp_path) as stack:
        environment = {"DAGSTER_TASKIQ_BROKER_URL": server.url}
        stack.worker(
            environment=environment, settings=stack.empty_file(), is_fresh=True
        ).await_ready()
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
    worker = stack.worker("-i", "no_such_module", slots=1, is_fresh=True)
    assert worker.wait() not in (0, 3)
    (line,) = [line for line in worker.log.splitlines() if line.startswith("Error: ")]
    assert "no_such_module" in line
    assert "dagster_taskiq/cli" not in worker.log


@pytest.mark.parametrize("is_warm", [True, False], ids=["warm", "cold"])
def test_includes_are_imported_before_the_first_step(stack: Stack, is_warm: bool) -> None:
    """``-i`` and ``-A`` once for all slots, or by each child; ``-A`` by the worker, too."""
    for module in ("included", "team_app"):
        (stack.directory / f"{module}.py").write_text(
            "import os, pathlib\n"
            "directory = os.environ['DAGSTER_TASKIQ_TEST_DIRECTORY']\n"
            "pathlib.Path(directory, f'{__name__}-{os.getpid()}').touch()\n"
        )
    way = [] if is_warm else ["--no-warm-code"]
    options = ("-i", "included", "-A", "team_app:any", *way)
    worker = stack.worker(*options, slots=1, is_fresh=True).await_ready()
    run = stack.run("serial")
    (pid,) = {note.pid for note in run.notes("ran")}
    found = {it.name for it in stack.directory.glob("*-*")}
    assert f"team_app-{worker.pid}" in found
    assert f"included-{worker.pid}" not in found
    importers = [it for it in found if it.startswith("included-")]
    assert len(importers) == (1 if is_warm else 2)  # a step's child and a run's
    assert (f"included-{pid}" in found) != is_warm
    assert (f"team_app-{pid}" in found) != is_warm


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
