"""What waits and runs, as the commands show it, on servers of each kind."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

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
    place.call("worker", "ping", "only")  # its heartbeat says which instance it has
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
