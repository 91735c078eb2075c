"""What waits and runs, as the commands show it and steer it, on servers of each kind."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from dagster import DagsterRunStatus

from dagster_taskiq_tests.acceptance.harness import (
    BrokerKind,
    Run,
    Stack,
    WorkerProcess,
    open_stack,
    until,
)

KINDS: tuple[BrokerKind, ...] = ("redis", "rabbitmq", "embedded", "postgres")

#: How long a worker that is stopped is given to answer; one that lives answers in milliseconds.
SHORT_SECONDS = "0.5"


@dataclass
class Place:
    """A stack with one worker of one slot, and how its commands are called."""

    stack: Stack
    worker: WorkerProcess
    settings: str
    is_blind: bool

    def call(self, *arguments: str, exit_code: int = 0) -> str:
        done = self.stack.try_cli(*arguments, "-y", self.settings)
        assert done.returncode == exit_code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def shape(self, *arguments: str, exit_code: int = 0) -> Any:
        done = self.stack.try_cli(*arguments, "--json", "-y", self.settings)
        assert done.returncode == exit_code, done.stdout + done.stderr
        return json.loads(done.stdout)

    def await_instance(self) -> None:
        """The worker says a moment after its start which instance it has."""

        def is_told() -> bool:
            (record,) = self.shape("worker", "list")["workers"]
            return bool(record["storage"])

        until(is_told, "the worker says which instance it has")

    def depths(self) -> dict[str, int]:
        """How many steps wait in each queue."""
        done = self.stack.try_cli("status", "-q", "far", "--json", "-y", self.settings)
        return {queue["name"]: queue["depth"] for queue in json.loads(done.stdout)["queues"]}

    def tasks(self, run: Run, *states: str) -> list[dict[str, Any]]:
        options = [word for state in states for word in ("--state", state)]
        found = self.shape("task", "list", *options)["tasks"]
        return [task for task in found if task["run_id"] == run.run_id]


@pytest.fixture(scope="module", params=KINDS)
def place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    kind = cast("BrokerKind", request.param)
    with open_stack(kind, tmp_path_factory.mktemp("stack")) as stack:
        worker = stack.worker("--run-slots", "0", slots=1, name="only").await_ready()
        yield Place(stack, worker, str(stack.settings_file()), kind == "rabbitmq")


def test_what_is_in_flight_is_seen(place: Place) -> None:
    """A step that runs, one that waits behind it, and one that waits for a worker."""
    runs = place.stack.start("one_gated")
    runs.await_notes("started")
    waits = place.stack.start("one_gated")
    unserved = place.stack.start("one_gated", default_queue="far")
    for run in (waits, unserved):
        run.await_message("Sending step")  # said just before it is sent
    until(lambda: place.depths() == {"dagster": 1, "far": 1}, "both tasks wait")
    place.call("worker", "ping", "only")  # its heartbeat tells what it runs
    (running,) = place.tasks(runs)
    assert (running["step_key"], running["attempt"], running["state"]) == ("gated", 1, "running")
    assert (running["worker"], running["queue"]) == (place.worker.full_name, "dagster")
    _check_status(place, [runs, waits, unserved])
    _check_waiting(place, waits, unserved)
    _check_run(place, runs, running["task_id"])
    for run in (runs, waits):
        run.open_gate()
        assert run.wait().is_success
    place.call("worker", "ping", "only")  # its heartbeat tells what it has done
    (record,) = place.shape("worker", "list")["workers"]
    assert record["done"] >= 2
    assert record["failed"] == 0
    assert record["memory_bytes"] > 0
    unserved.signal(signal.SIGTERM)
    unserved.wait()


def _check_status(place: Place, runs: Sequence[Run]) -> None:
    found = place.shape("status", "-q", "far", exit_code=1)
    assert all(it["product"] and not it["problem"] for it in found["servers"])
    dagster, far = found["queues"]
    assert (dagster["depth"], dagster["running"], dagster["is_stuck"]) == (1, 1, False)
    assert (far["depth"], far["workers"], far["is_stuck"]) == (1, [], True)
    if place.is_blind:
        assert dagster["priorities"] is dagster["oldest_sent_at"] is None
    else:
        assert dagster["priorities"] == {"5": 1}
        assert dagster["oldest_sent_at"] > runs[0].notes("started")[0].time - 60
    said = place.call("status", "-q", "far", exit_code=1)
    assert f"->  {place.worker.full_name}: OK" in said
    assert 'No worker listens on queue "far"' in said
    assert "\x1b" not in said
    assert place.call("status", "-A", "x").endswith("1 node online.\n")  # a probe


def _check_waiting(place: Place, waits: Run, unserved: Run) -> None:
    if place.is_blind:
        found = place.shape("task", "list")
        assert {"queue": "dagster", "kind": "steps", "count": 1} in found["unseen"]
        assert place.shape("run", "show", waits.run_id)["run"]["has_loop"]
        return
    (task,) = place.tasks(waits, "waiting")
    assert (task["position"], task["priority"]) == (1, 5)
    assert task["reason"] == 'All 1 step slots of queue "dagster" are busy.'
    (far,) = place.tasks(unserved)
    assert far["reason"].startswith("No worker listens")
    assert place.shape("task", "show", far["task_id"][:10])["task"] == far
    (queue,) = place.shape("queue", "show", "far", exit_code=1)["queues"]
    assert queue["waiting"] == [far]


def _check_run(place: Place, run: Run, task_id: str) -> None:
    found = place.shape("run", "show", run.run_id[:8])["run"]
    assert [it["task_id"] for it in found["tasks"]] == [task_id]
    (worker,) = place.shape("worker", "show", "on*")["workers"]
    assert (worker["busy_slots"], worker["tasks"]) == (1, found["tasks"])
    said = place.call("worker", "show", "only")
    assert "gated" in said
    assert run.run_id[:8] in said
    assert "Did you mean" in place.call("run", "show", f"{run.run_id[:-1]}?", exit_code=1)


def test_a_worker_answers_while_its_event_loop_goes_round(place: Place) -> None:
    """A worker that hangs is listed for a while, and does not answer."""
    assert f"{place.worker.full_name} has answered within" in place.call("worker", "ping", "only")
    os.kill(place.worker.pid, signal.SIGSTOP)
    try:
        silent = place.call("worker", "ping", "only", "-t", SHORT_SECONDS, exit_code=1)
        assert f"No answer within 0.5 s from {place.worker.full_name}." in silent
    finally:
        os.kill(place.worker.pid, signal.SIGCONT)
    assert "has answered" in place.call("worker", "ping", "on*")
    assert "Did you mean 'only'?" in place.call("worker", "ping", "onyl", exit_code=1)


# --- the doctor ---


def findings(place: Place, *arguments: str, exit_code: int = 0, **environment: str) -> Any:
    """Level and text of each check, by its name."""
    more = [*arguments, "--json", "-y", place.settings]
    done = place.stack.try_cli("doctor", *more, environment=environment)
    assert done.returncode == exit_code, done.stdout + done.stderr
    checks = json.loads(done.stdout)["checks"]
    return {it["check"]: (it["level"], f"{it['summary']} {it['advice'] or ''}") for it in checks}


def test_the_doctor_finds_nothing_wrong_where_nothing_is(place: Place) -> None:
    """All checks that are about something here are green, or warn of what a test's servers lack."""
    place.await_instance()
    found = findings(place, "-m", "dagster_taskiq_tests.acceptance.limit_jobs")
    lacks_log = "no append-only file" in found["redis_data"][1]
    levels = {name: level for name, (level, _) in found.items()}
    warned = {name for name, level in levels.items() if level == "WARN"}
    assert warned <= ({"redis_data"} if lacks_log else set())
    assert {"FAIL"} & set(levels.values()) == set()
    green = {"broker", "backend", "workers", "queues", "probe", "same_instance", "io_managers"}
    assert green <= {name for name, level in levels.items() if level == "ok"}
    assert "dagster to a worker and the backend in " in found["probe"][1]
    is_on_postgresql = place.stack.broker is not None and "postgres" in place.stack.broker.url
    assert levels["connections"] == levels["postgresql"] == ("ok" if is_on_postgresql else "skip")
    assert levels["rabbitmq"] == ("ok" if place.is_blind else "skip")
    assert place.shape("task", "list")["tasks"] == []  # no trace of the probe


def test_the_doctor_is_red_where_something_is_wrong(place: Place, tmp_path: Path) -> None:
    """Keys on one side, another instance, a worker that hangs."""
    (tmp_path / "dagster.yaml").touch()
    broken = {"DAGSTER_TASKIQ_SIGNING_KEY": "k" * 32}
    if place.stack.broker is not None:  # the embedded server is found by its home
        broken["DAGSTER_HOME"] = str(tmp_path)
    place.await_instance()
    os.kill(place.worker.pid, signal.SIGSTOP)
    try:
        found = findings(place, "-t", SHORT_SECONDS, exit_code=1, **broken)
    finally:
        os.kill(place.worker.pid, signal.SIGCONT)
    assert found["keys"][0] == found["probe"][0] == "FAIL"
    assert "no worker took the probe within" in found["probe"][1]
    assert place.worker.full_name in found["keys"][1]
    if place.stack.broker is not None:
        assert found["same_instance"][0] == "FAIL"


# --- steering ---


def test_queues_and_tasks_are_steered(place: Place) -> None:
    """A queue that is paused holds its steps; they are moved, cancelled, and removed."""
    place.call("queue", "purge", "far", "--yes")  # what a step has left that was withdrawn
    said = place.call("queue", "pause", "dagster", "--reason", "hands off")
    assert said == "Queue dagster is paused; 1 worker obeys.\n"
    moved, cancelled, purged = (place.stack.start("one_gated") for _ in range(3))
    for run in (moved, cancelled, purged):
        run.await_message("Sending step")
    until(lambda: place.depths() == {"dagster": 3, "far": 0}, "all wait")
    assert 'Queue "dagster" was paused on host' in place.call("status")
    if place.is_blind:
        assert "No task in flight" in place.call("task", "cancel", "00", exit_code=1)
        cancelled.signal(signal.SIGTERM)
        cancelled.wait()
    else:
        (task,) = place.tasks(cancelled)
        said = place.call("task", "cancel", task["task_id"][:12], "--reason", "bad input")
        assert "which no worker had started" in said
        assert cancelled.wait().status is DagsterRunStatus.FAILURE
        assert "bad input" in cancelled.failure("gated")
    said = place.call("queue", "move", "dagster", "far", "--yes")
    assert "Moved 2 steps and 0 runs from queue dagster to far." in said
    assert ("Dropped 1 message whose task was over." in said) == place.is_blind
    until(lambda: place.depths() == {"dagster": 0, "far": 2}, "both are moved")
    moved.await_message('moves from queue "dagster" to queue "far". It was moved by')
    assert place.call("worker", "queue", "add", "only", "far") == (
        f"{place.worker.full_name} listens on dagster, far.\n"
    )
    runs = {run.run_id: run for run in (moved, purged)}
    until(lambda: any(run.notes("started") for run in runs.values()), "one is executed")
    (running,) = (run for run in runs.values() if run.notes("started"))
    (waits,) = (run for run in runs.values() if run is not running)
    assert "Ended 1 step and 0 runs from queue far." in place.call("queue", "purge", "far", "--yes")
    assert waits.wait().status is DagsterRunStatus.FAILURE
    assert 'Removed from queue "far" by' in waits.failure("gated")
    _cancel_running(place, running)
    place.call("worker", "queue", "remove", "only", "far")
    assert "1 worker obeys" in place.call("queue", "resume", "dagster")
    assert "is not paused" in place.call("queue", "resume", "dagster", exit_code=1)


def _cancel_running(place: Place, run: Run) -> None:
    place.call("worker", "ping", "only")  # its heartbeat tells what it runs
    (task,) = place.tasks(run, "running")
    said = place.call("task", "cancel", task["task_id"], "--reason", "too slow")
    assert said == f"Told the worker of step gated of run {run.run_id} to stop it.\n"
    assert run.wait().status is DagsterRunStatus.FAILURE
    assert "too slow" in run.failure("gated")


def test_a_worker_is_steered(place: Place) -> None:
    """Its slots, a pause, and its end, which is waited for; the steps go where they may."""
    name = place.worker.full_name
    assert place.call("worker", "pause", "only", "--reason", "disk full") == (
        f"{name} is paused; 0 of its tasks go on.\n"
    )
    assert "paused: disk full" in place.call("worker", "show", "only")
    runs = [place.stack.start("one_gated") for _ in range(2)]
    until(lambda: place.depths()["dagster"] == 2, "both wait")
    assert f'All workers of queue "dagster" are paused: {name} (disk full).' in place.call("status")
    assert place.call("worker", "slots", "only", "2") == f"{name} has 2 slots for steps.\n"
    assert "executes no runs" in place.call("worker", "slots", "only", "2", "--runs", exit_code=1)
    assert place.call("worker", "resume", "only") == f"{name} takes tasks again.\n"
    for run in runs:
        run.await_notes("started")
    said = place.call("worker", "slots", "only", "1")
    assert said == f"{name} has 1 slot for steps, and 1 more until its task ends.\n"
    said = place.call("worker", "terminate", "only", "--now", "--wait")
    assert said == f"Told {name} to stop now.\n{name} is gone.\n"
    for run in runs:
        run.signal(signal.SIGTERM)
        run.wait()
