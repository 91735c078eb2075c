"""``worker list``, ``terminate`` and ``reload``, and ``status``: whom they mean, how they end."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from click.testing import Result

from dagster_taskiq.cli import asking, main, tables
from dagster_taskiq.messages.worker_records import WorkerRecord
from dagster_taskiq_tests.cli_runner import cli_runner


@dataclass
class Crowd:
    """A backend that knows some workers and keeps the orders to them."""

    records: list[WorkerRecord] = field(default_factory=list)
    lost: list[WorkerRecord] = field(default_factory=list)
    orders: dict[str, str] = field(default_factory=dict)
    connections: int = 0

    def add(self, name: str, *queues: str) -> None:
        host = name.partition("@")[2]
        self.records.append(WorkerRecord(name.upper(), name, host, 1, queues or ("dagster",)))

    async def startup(self) -> None:
        self.connections += 1

    async def shutdown(self) -> None: ...

    async def workers(self) -> list[WorkerRecord]:
        return self.records

    async def lost_workers(self) -> list[WorkerRecord]:
        return self.lost

    async def send_control(self, worker_id: str, order: str) -> None:
        assert worker_id not in self.orders
        self.orders[worker_id] = json.loads(order.splitlines()[-1])["kind"]


@pytest.fixture
def crowd(monkeypatch: pytest.MonkeyPatch) -> Crowd:
    """No worker, yet."""
    crowd = Crowd()
    monkeypatch.setenv("DAGSTER_TASKIQ_BROKER_URL", "redis://localhost:6379/0")
    monkeypatch.setattr(asking, "open_backend", lambda _options, _signer: crowd)
    return crowd


def test_a_record_that_is_not_signed_is_told_nothing(
    crowd: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps no order from the others, whatever it says of itself; a listing marks it."""
    monkeypatch.setenv("DAGSTER_TASKIQ_SIGNING_KEY", "k" * 32)
    crowd.add("a@one")
    crowd.add("b@two")
    crowd.records[0] = replace(crowd.records[0], is_trusted=False)
    crowd.records.append(replace(crowd.records[0], name="c@one", key_ids=("another",)))
    told = call("worker", "terminate", "--all")
    assert told.exit_code == 0
    assert set(crowd.orders) == {"B@TWO"}
    assert "the record of worker a@one is not signed" in told.stderr
    assert "worker c@one refuses it" in told.stderr
    alone = call("worker", "terminate", "a@one")
    assert alone.exit_code == 1
    assert "the record of worker a@one is not signed" in alone.stderr
    listed = call("worker", "list").stdout
    assert listed.count("running (not signed)") == 2


def test_a_record_that_is_outdated_counts_for_nothing(crowd: Crowd) -> None:
    """It may be that of a dead worker, kept by somebody: it is listed, and said to be so."""
    crowd.add("a@one")
    crowd.records = [replace(crowd.records[0], is_trusted=False, is_outdated=True)]
    told = call("worker", "terminate", "a")
    assert told.exit_code == 1
    assert "the record of worker a@one is outdated by this host's clock" in told.stderr
    assert crowd.orders == {}
    listed = call("worker", "list")
    assert listed.exit_code == 0
    assert "running (outdated)" in listed.stdout
    named = call("worker", "list", "a")
    assert named.exit_code == 1
    assert "running (outdated)" in named.stdout
    assert "No worker named 'a' is running." in named.stderr
    assert call("status", "-A", "app").exit_code == 1


def call(*arguments: str, **more: Any) -> Result:
    return cli_runner().invoke(main, arguments, **more)


# --- whom a name means ---


@pytest.mark.parametrize("command", ["terminate", "reload"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a", {"A@ONE", "A@TWO"}),
        ("a@two", {"A@TWO"}),
        ("@one", {"A@ONE", "B@ONE"}),
        ("--all", {"A@ONE", "B@ONE", "A@TWO"}),
    ],
)
def test_orders_reach_the_named_ones(
    crowd: Crowd, command: str, name: str, expected: set[str]
) -> None:
    """A name on whatever host, one worker, all of a host, all of them."""
    for worker in ("a@one", "b@one", "a@two"):
        crowd.add(worker)
    done = call("worker", command, name)
    assert done.exit_code == 0
    assert crowd.orders == dict.fromkeys(expected, command)
    assert done.output.count("Told ") == len(expected)


@pytest.mark.parametrize("name", ["nobody", "a@elsewhere", "@elsewhere", "one"])
@pytest.mark.parametrize("command", ["terminate", "reload", "list"])
def test_an_unknown_name_is_an_error(crowd: Crowd, command: str, name: str) -> None:
    """Where other workers run, a name that none has is misspelt."""
    crowd.add("a@one")
    done = call("worker", command, name)
    assert done.exit_code == 1
    assert name.removeprefix("@") in done.stderr
    assert crowd.orders == {}


@pytest.mark.parametrize(
    "arguments",
    [["terminate", "a"], ["terminate", "--all"], ["terminate"], ["reload", "a"]],
    ids=" ".join,
)
def test_orders_to_nobody_are_no_error(crowd: Crowd, arguments: list[str]) -> None:
    """As in dagster-celery, scripts that stop the workers of an idle cluster go on."""
    done = call("worker", *arguments)
    assert done.exit_code == 0
    assert "Warning: No worker" in done.stderr


def test_terminate_without_a_name(crowd: Crowd) -> None:
    """It means the worker named dagster, as in dagster-celery; if there is none it says so.

    Both over one connection.
    """
    crowd.add("a@one")
    done = call("worker", "terminate")
    assert (done.exit_code, crowd.orders) == (0, {})
    assert "No worker named 'dagster'" in done.stderr
    crowd.add("dagster@one")
    assert call("worker", "terminate").exit_code == 0
    assert crowd.orders == {"DAGSTER@ONE": "terminate"}
    assert crowd.connections == 2


@pytest.mark.parametrize("arguments", [["reload"], ["reload", "a", "-a"], ["terminate", "a", "-a"]])
def test_orders_name_somebody(crowd: Crowd, arguments: list[str]) -> None:
    """A name and --all contradict each other."""
    crowd.add("a@one")
    assert call("worker", *arguments).exit_code == 2
    assert crowd.orders == {}


# --- the list ---


def test_the_list_never_cuts(crowd: Crowd) -> None:
    """Scripts look for whole names and queues in it, in a pipe and in a narrow terminal."""
    long = "a-worker-with-a-name-of-some-length@a-host-name-in-a-cloud.region.example.org"
    queues = [f"a-queue-with-a-long-name-{number}" for number in range(9)]
    crowd.add(long, *queues)
    crowd.add("b@one")
    lines = call("worker", "list", env={"COLUMNS": "20"}).output.splitlines()
    assert [line.split()[0] for line in lines] == ["worker", long, "b@one"]
    assert ", ".join(queues) in lines[1]
    assert lines[0].index("steps") == lines[1].index("0/0") == lines[2].index("0/0")


@pytest.mark.usefixtures("crowd")
def test_the_list_of_nobody() -> None:
    """It says that there is none, and is no error."""
    done = call("worker", "list")
    assert (done.exit_code, done.stdout) == (0, "No worker is running.\n")


def test_the_list_of_a_name(crowd: Crowd) -> None:
    """Its exit code says whether one runs, for health checks."""
    assert call("worker", "list").exit_code == 0
    assert call("worker", "list", "a").exit_code == 1
    for worker in ("a@one", "b@one", "a@two"):
        crowd.add(worker)
    done = call("worker", "list", "@one")
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.output.splitlines()] == ["worker", "a@one", "b@one"]


def test_a_lost_worker_is_listed_and_counts_for_nothing(crowd: Crowd) -> None:
    """Not for an exit code, not for an order, not for a probe."""
    crowd.add("a@one")
    crowd.lost = [replace(crowd.records.pop(), state="lost", sent_at=time.time() - 200)]
    alone = call("worker", "list")
    assert alone.exit_code == 0
    assert "lost 3 min ago" in alone.stdout
    assert alone.stdout.endswith("No worker is running.\n")
    named = call("worker", "list", "a")
    assert (named.exit_code, "lost 3 min ago" in named.stdout) == (1, True)
    assert "No worker named 'a' is running." in named.stderr
    assert "No worker is running" in call("worker", "terminate", "--all").stderr
    assert call("worker", "ping", "a").exit_code == 1
    assert call("status", "-A", "app").exit_code == 1
    assert crowd.orders == {}
    listed = json.loads(call("worker", "list", "--json").stdout)
    assert listed["workers"] == []
    assert [it["name"] for it in listed["lost_workers"]] == ["a@one"]
    crowd.add("b@two")
    rows = [line.split()[0] for line in call("worker", "list").stdout.splitlines()]
    assert rows == ["worker", "b@two", "a@one"]


@pytest.mark.parametrize(
    ("name", "queues"),
    [
        ("a@one", ("q",)),
        ("a-longer-name@a1b2c3d4e5f6", ("short-queue", "long-queue", "reports", "dagster", "gpu")),
        ("a-name-of-some-length@a-host-of-a-cloud.region-1.example.org", ("short-queue",)),
    ],
)
def test_the_list_fits_a_terminal(
    crowd: Crowd, monkeypatch: pytest.MonkeyPatch, name: str, queues: tuple[str, ...]
) -> None:
    """What has no room in its row stands below it, whole."""
    crowd.add(name, *queues)
    numbers = {"done": 12345, "failed": 123, "refused": 17, "memory_bytes": 12 * 2**30}
    crowd.records = [replace(crowd.records[0], slots=16, busy_slots=16, version="0.1.0", **numbers)]
    monkeypatch.setattr(tables, "is_terminal", lambda _: True)
    lines = call("worker", "list", env={"COLUMNS": "80"}).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    words = " ".join(lines).replace(",", " ").replace(";", " ").split()
    assert {name, "12345", "123", "16/16", "running", *queues} <= set(words)


# --- status ---


@pytest.mark.parametrize("app", ["dagster_celery.app", "dagster_celery_k8s.app", "x.y"])
def test_status(crowd: Crowd, app: str) -> None:
    """Liveness probes look for ``HOST: OK`` in it, as ``celery status`` says it."""
    assert call("status", "-A", app).exit_code == 1
    crowd.add("a@one")
    done = call("status", "-A", app)
    assert done.exit_code == 0
    assert done.output.splitlines() == ["->  a@one: OK", "", "1 node online."]


def test_status_of_some(crowd: Crowd) -> None:
    """Celery's ``-d`` after ``--``; a worker that is not there is no answer."""
    crowd.add("a@one")
    crowd.add("b@one")
    done = call("status", "--", "-d", "b@one")
    assert done.exit_code == 0
    assert "a@one" not in done.output
    assert call("status", "--", "-d", "c@one").exit_code == 1


def test_a_worker_that_stops_at_the_first_of_two_orders_is_told_now(
    crowd: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that executes nothing is gone before the second one is sent."""
    crowd.add("a@one")
    told: list[str] = []

    async def tell(worker_id: str, _order: str) -> None:
        told.append(worker_id)
        crowd.records.clear()

    monkeypatch.setattr(crowd, "send_control", tell)
    done = call("worker", "terminate", "a", "--now")
    assert (done.exit_code, done.output) == (0, "Told a@one to stop now.\n")
    assert told == ["A@ONE", "A@ONE"]
