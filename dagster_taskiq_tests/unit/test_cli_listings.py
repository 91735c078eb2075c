"""The commands that show what waits and runs: what they print, and how they end."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import Result

from dagster_taskiq.backend.memory import MemoryBackend
from dagster_taskiq.brokers.memory import MemoryBroker
from dagster_taskiq.cli import asking, looking, main
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.messages.withheld_steps import Withheld, WithheldGroup
from dagster_taskiq.messages.worker_records import WorkerRecord
from dagster_taskiq.overview import MOST_WAITING
from dagster_taskiq_tests.cli_runner import cli_runner
from dagster_taskiq_tests.unit.overview_scene import RUN, Scene, step, worker
from dagster_taskiq_tests.unit.test_imports import PACKAGE

#: Where the address of the memory broker is another one than the backend's.
ONE, TWO = "redis://localhost:6379/0", "amqp://localhost"

ESCAPE = "\x1b[31m"


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    """What the commands find; each of them has its own connections."""
    return _scene(monkeypatch, is_searchable=True)


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> Scene:
    """The same on a broker as RabbitMQ."""
    monkeypatch.setenv("DAGSTER_TASKIQ_BACKEND_URL", ONE)
    return _scene(monkeypatch, is_searchable=False)


def _scene(monkeypatch: pytest.MonkeyPatch, *, is_searchable: bool) -> Scene:
    scene = Scene(is_searchable=is_searchable)
    monkeypatch.setenv("DAGSTER_TASKIQ_BROKER_URL", ONE if is_searchable else TWO)
    for module in (asking, looking):
        monkeypatch.setattr(
            module, "open_backend", lambda _, signer: MemoryBackend(scene.state, signer)
        )
    monkeypatch.setattr(looking, "open_broker", lambda _: MemoryBroker(scene.queues))
    return scene


def call(*arguments: str) -> Result:
    return cli_runner().invoke(main, arguments)


def shape(*arguments: str) -> Any:
    return json.loads(call(*arguments, "--json").stdout)


def lines(*arguments: str) -> list[str]:
    """What is printed, with one space between columns."""
    return [re.sub(" +", " ", line).strip() for line in call(*arguments).stdout.splitlines()]


def do(*steps: Coroutine[Any, Any, Any]) -> None:
    async def all_of_them() -> None:
        for it in steps:
            await it

    asyncio.run(all_of_them())


# --- status ---


def test_status_shows_servers_queues_and_workers(scene: Scene) -> None:
    """With Celery's lines, which probes look for."""
    now = time.time()
    tasks = [step(f"s{n}", priority=9 - n, sent_at=now - 30 * n, state="") for n in range(2)]
    do(scene.beat(worker("a@one")), scene.send(*tasks))
    done = call("status")
    assert done.exit_code == 0
    found = lines("status")
    assert found[0].startswith("broker and backend memory, answers within ")
    assert "dagster steps 2 30 s 9: 1, 8: 1 0 1" in found
    assert found[-3:] == ["-> a@one: OK", "", "1 node online."]
    assert ESCAPE not in done.stdout


def test_a_queue_with_tasks_and_no_worker_is_said_by_the_exit_code(scene: Scene) -> None:
    """But not to a liveness probe, which would have a worker killed for it."""
    do(scene.beat(worker("a@one")), scene.send(step("far", queue="far")))
    for command in (("status",), ("queue", "list"), ("queue", "show", "far")):
        done = call(*command)
        assert done.exit_code == 1
        assert 'far, steps: No worker listens on queue "far".' in done.stdout
        assert done.stderr == "Error: Tasks wait that no worker takes, in queue far (steps).\n"
        assert call(*command, "--json").exit_code == 1
    assert call("queue", "show", "dagster").exit_code == 0
    assert call("status", "-A", "app").exit_code == 0
    assert call("status", "--", "-d", "a@one").exit_code == 0


def test_a_probe_does_not_depend_on_the_broker(blind: Scene) -> None:
    do(blind.beat(worker("a@one")))
    blind.queues.freeze()
    assert call("status", "-A", "app").exit_code == 0
    assert call("worker", "show", "a").exit_code == 0
    assert call("status", "-A", "app", "--json").exit_code == 2


def test_a_server_that_is_away_is_said_in_a_sentence(blind: Scene) -> None:
    """Each command with the address; status shows what the others answer."""
    do(blind.beat(worker("a@one")))
    blind.queues.freeze()
    for command in ("status", "queue list", "queue show x", "task list", "task show x"):
        done = call(*command.split())
        assert done.exit_code == 1
        assert done.stderr.startswith("Error: Cannot reach memory://test:")
        assert len(done.stderr.splitlines()) == 1
    found = lines("status")
    assert found[:2] == ["broker away", "memory://test"]
    assert found[2].startswith("backend memory, answers within ")
    broker, backend = shape("status")["servers"]
    assert (broker["roles"], broker["product"]) == (["broker"], None)
    assert (backend["roles"], backend["problem"]) == (["backend"], "")


def test_status_watches(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on while something is wrong, and says when it is right again."""
    looks: list[float] = []

    def pause(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 1:
            do(scene.beat(worker("a@one")))
        elif len(looks) == 2:
            raise KeyboardInterrupt

    # not as an attribute of the package, which has the command under that name
    module = import_module("dagster_taskiq.cli.status")
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=pause))
    done = call("status", "--watch")
    assert looks == [2.0, 2.0]
    first, second = done.stdout.split("Error: No worker is running.")
    assert "online" not in first
    assert "1 node online." in second


def test_what_a_server_cannot_tell_is_a_dash_with_the_reason(blind: Scene) -> None:
    do(blind.beat(worker()), blind.send(step("one"), step("two", queue="far")))
    found = lines("queue", "list")
    assert "dagster steps 1 - - 0 1" in found
    (reason,) = [it for it in found if it.startswith("-: RabbitMQ says how many")]
    assert not any(it.startswith("far") for it in found)
    for command in (("status", "-q", "far"), ("queue", "list", "--queue", "far")):
        assert "far steps 1 - - 0 none" in lines(*command)
        assert call(*command).exit_code == 1
    (queue,) = shape("queue", "show", "far")["queues"]
    assert (queue["priorities"], queue["oldest_sent_at"], queue["waiting"]) == (None, None, None)
    assert queue["blindness"] == reason.removeprefix("-: ")


# --- queues ---


def test_a_queue_shows_who_waits_and_who_listens(scene: Scene) -> None:
    do(
        scene.beat(worker("a@one", busy_slots=2)),
        scene.send(step("low", priority=1), step("high", priority=9), RUN),
    )
    found = lines("queue", "show", "dagster")
    assert "workers of steps: a@one" in found
    assert [it.split()[1] for it in found if "waiting -" in it] == ["high", "low", "(the"]
    steps, runs = shape("queue", "show", "dagster")["queues"]
    assert [it["step_key"] for it in steps["waiting"]] == ["high", "low"]
    assert [(it["kind"], it["step_key"]) for it in runs["waiting"]] == [("runs", None)]


def test_an_unknown_queue_is_an_error_with_the_nearest(scene: Scene) -> None:
    """The default one is known, though it is empty."""
    do(scene.send(step("one", queue="reports")))
    done = call("queue", "show", "report")
    assert done.exit_code == 1
    assert done.stderr.endswith("Did you mean 'reports'?\n")
    assert call("queue", "show", "dagster").exit_code == 0


# --- tasks and runs ---


@pytest.fixture
def busy(scene: Scene) -> Scene:
    """One run with a step that runs and one that waits, another with one that is lost."""
    here = [step("runs", job="etl"), step("waits")]
    lost = replace(step("lost"), run_id="other-run")

    async def work() -> None:
        await scene.open("run")
        await scene.beat(worker("a@one"), here[0], lost)
        await scene.claim(here[0], worker("a@one"))
        await scene.open("other-run")
        await scene.claim(lost, worker("b@two"))
        scene.state.expire_claim("other-run", lost.task_id)
        await scene.send(here[1])

    do(work())
    return scene


@pytest.mark.usefixtures("busy")
def test_tasks_are_listed_by_run() -> None:
    def steps(*arguments: str) -> list[tuple[str, str]]:
        return [(it["step_key"], it["state"]) for it in shape("task", "list", *arguments)["tasks"]]

    assert steps() == [("lost", "lost"), ("runs", "running"), ("waits", "waiting")]
    assert steps("--run", "run") == [("runs", "running"), ("waits", "waiting")]
    assert steps("--run", "oth") == [("lost", "lost")]
    assert steps("--state", "lost", "--state", "running") == steps()[:2]
    found = lines("task", "list")
    assert [it for it in found if it.startswith("run ")] == ["run other-run", "run run"]
    assert any(re.fullmatch(r"\w{8} waits 1 waiting - queue dagster, place 1", it) for it in found)
    assert any(re.fullmatch(r"\w{8} runs 1 running \d+ d a@one", it) for it in found)
    assert call("task", "list", "--state", "dead").exit_code == 2


@pytest.mark.usefixtures("busy")
def test_a_task_and_a_run_are_found_by_the_beginning_of_their_ids() -> None:
    tasks = shape("task", "list")["tasks"]
    for task in tasks:
        assert shape("task", "show", task["task_id"][:12]) == {"task": task}
    found = lines("task", "show", tasks[1]["task_id"])
    assert found[2:4] == ["job etl", "step runs"]
    assert "worker a@one, slot 1, pid 7" in found
    run = shape("run", "show", "oth")["run"]
    assert (run["run_id"], run["has_loop"]) == ("other-run", True)
    assert [it["step_key"] for it in run["tasks"]] == ["lost"]
    assert lines("run", "show", "run")[:2] == ["run run", "loop alive"]
    ends = [call("task", "show", "zzz"), call("run", "show", "runn"), call("task", "show", "")]
    assert [it.exit_code for it in ends] == [1, 1, 1]
    assert "No task in flight or ended lately has the id 'zzz'." in ends[0].stderr
    assert "Did you mean 'run'?" in ends[1].stderr
    assert "Several ids begin with ''" in ends[2].stderr


HELD = Withheld(
    (
        WithheldGroup("", "max_concurrent is 1.", (("waits", 17.0), ("later", 17.0))),
        WithheldGroup("db", f"Its slots are taken{ESCAPE}.", (("pooled", 17.0),)),
    ),
    3,
)


def test_what_a_run_holds_back_is_shown(busy: Scene) -> None:
    """But for what was sent since it has told it; with its reasons, in 80 columns."""
    do(busy.backend.tell_withheld("run", HELD, token="t"))
    done = call("run", "show", "run")
    part = done.stdout.partition("held back: ready, but not sent\n")[2].splitlines()
    assert [re.sub(" +", " ", re.sub(r"\d+ d", "N d", line)) for line in part] == [
        " step for by",
        " later N d limits of the run",
        " pooled N d pool db",
        " max_concurrent is 1.",
        " Its slots are taken\N{REPLACEMENT CHARACTER}[31m.",
        " 3 more steps are held back.",
    ]
    assert max(map(len, part)) < 80
    run = shape("run", "show", "run")["run"]
    assert run["held_back"][0] == {
        "step_key": "later",
        "since": 17.0,
        "pool": None,
        "reason": "max_concurrent is 1.",
    }
    assert (run["held_back"][1]["pool"], run["held_back_more"]) == ("db", 3)
    other = shape("run", "show", "oth")["run"]
    assert (other["held_back"], other["held_back_more"]) == ([], 0)
    assert "held back" not in call("run", "show", "oth").stdout
    busy.state.expire_loop("run")
    assert shape("run", "show", "run")["run"]["held_back"] == []


def test_an_error_is_safe_to_show(scene: Scene) -> None:
    """The ids that it names may be anybody's who can write to the backend."""
    do(scene.open(f"run-{ESCAPE}\n1"), scene.open(f"run-{ESCAPE}\n2"))
    done = call("run", "show", "run-")
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.isprintable()
    assert "run-\N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}1, " in line


def test_a_run_that_waits_for_a_worker_is_a_run_in_flight(scene: Scene) -> None:
    do(scene.send(RUN))
    assert lines("run", "show", "run")[1] == "loop not begun: it waits in a queue"
    assert shape("run", "show", "run")["run"]["is_resumable"] is None


def test_what_is_not_shown_one_by_one_is_counted(scene: Scene) -> None:
    do(scene.send(*(step(f"s{number}") for number in range(MOST_WAITING + 3))))
    found = shape("task", "list")
    assert len(found["tasks"]) == MOST_WAITING
    assert found["unseen"] == [{"queue": "dagster", "kind": "steps", "count": 3}]
    said = "Not shown: 3 more tasks in queue dagster (steps). Only the next 100 are.\n"
    assert call("task", "list").stderr == said


def test_a_task_that_is_not_signed_as_it_must_be_is_counted(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said why it is not shown: most likely two keys differ."""
    do(scene.send(step("one")))
    monkeypatch.setenv("DAGSTER_TASKIQ_SIGNING_KEY", "k" * 32)
    said = call("task", "list").stderr
    assert "Not shown: 1 task in queue dagster (steps). They are too long" in said


def test_texts_of_others_are_made_plain(scene: Scene) -> None:
    """A task's sender may be anybody; JSON escapes them."""
    do(scene.send(step(f"a{ESCAPE}b\nc", queue=f"q{ESCAPE}", run_id=f"r{ESCAPE}")))
    for command in (("task", "list"), ("queue", "list"), ("status",)):
        assert "\x1b" not in call(*command).stdout
        assert "\x1b" not in call(*command).stderr
        assert "\x1b" not in call(*command, "--json").stdout


def test_nothing_is_seen_of_an_embedded_server_that_rests(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """No command starts it."""
    monkeypatch.delenv("DAGSTER_TASKIQ_BROKER_URL", raising=False)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    done = call("task", "list")
    assert (done.exit_code, done.stdout) == (0, "")
    assert "No process uses the embedded server" in done.stderr
    assert call("worker", "ping", "a").exit_code == 1
    assert call("status").exit_code == 1


# --- workers ---


def test_a_worker_is_shown_with_what_it_runs(busy: Scene) -> None:
    found = lines("worker", "show", "a")
    assert found[0] == "worker a@one"
    assert "slots 0 of 2 for steps busy, 0 of 1 for runs" in found
    assert re.fullmatch(r"\w{8} run etl runs 1 \d+ d dagster 1 7", found[-1])
    do(busy.beat(worker("b@two", other_backend="redis://elsewhere")))
    assert "state running (gives back tasks whose backend is redis://elsewhere)" in lines(
        "worker", "show", "b@two"
    )
    (record,) = shape("worker", "show", "*@one")["workers"]
    assert (record["name"], record["slots"]) == ("a@one", 2)
    assert [it["step_key"] for it in record["tasks"]] == ["runs"]
    both = shape("worker", "list")["workers"]
    assert [it["name"] for it in both] == ["a@one", "b@two"]
    assert {**both[0], "tasks": record["tasks"]} == record


def test_each_code_location_of_a_worker_has_a_line(scene: Scene) -> None:
    do(
        scene.beat(
            worker(warm_code=("the instance", "from a import it"), cold_code=("b: no\nway",))
        )
    )
    found = call("worker", "show", "w").stdout.splitlines()
    first = next(number for number, line in enumerate(found) if line.startswith("warm code"))
    assert found[first : first + 3] == [
        "warm code  the instance",
        "           from a import it",
        "cold code  b: no\N{REPLACEMENT CHARACTER}way",
    ]
    do(scene.beat(worker()))
    assert "cold code  -" in call("worker", "show", "w").stdout


def test_a_lost_worker_is_shown_and_is_no_running_one(scene: Scene) -> None:
    """With what it had been at, and red in the status; the exit code says that it is gone."""
    lost = worker("a@one", sent_at=time.time() - 60, done=7)
    do(
        scene.backend.heartbeat(lost, expires_seconds=0),
        scene.beat(worker("b@two")),
    )
    done = call("worker", "show", "a")
    assert done.exit_code == 1
    assert "lost 60 s ago" in done.stdout
    assert "7 tasks done" in done.stdout
    (record,) = shape("worker", "show", "a")["lost_workers"]
    assert (record["state"], record["done"], record["tasks"]) == ("lost", 7, [])
    found = lines("status")
    assert "-> a@one: lost, last heard of 60 s ago" in found
    assert found[-1] == "1 node online."
    assert [it["name"] for it in shape("status")["lost_workers"]] == ["a@one"]


@pytest.mark.parametrize("command", ["list", "show", "ping", "terminate", "reload"])
def test_an_unknown_worker_is_an_error_with_the_nearest(scene: Scene, command: str) -> None:
    do(scene.beat(worker("short-1@one")))
    for name, meant in (("shrt-1", "short-1"), ("short-1@on", "short-1@one"), ("@onne", "@one")):
        done = call("worker", command, name)
        assert done.exit_code == 1
        assert done.stderr.endswith(f"Did you mean {meant!r}?\n")


@pytest.mark.parametrize("command", ["list", "show", "terminate", "reload"])
def test_a_name_may_be_a_pattern(scene: Scene, command: str) -> None:
    do(*(scene.beat(worker(it)) for it in ("short-1@one", "short-2@two", "long-1@one")))
    done = call("worker", command, "short-*")
    assert done.exit_code == 0
    assert "short-1@one" in done.stdout
    assert "short-2@two" in done.stdout
    assert "long" not in done.stdout


@contextmanager
def answering(scene: Scene, *records: WorkerRecord) -> Iterator[None]:
    """Workers that answer pings meanwhile."""
    is_over = threading.Event()

    async def answer(record: WorkerRecord) -> None:
        backend = MemoryBackend(scene.state, Signer())
        while not is_over.is_set():
            for order in await backend.wait_for_control(record.worker_id, 0.01):
                pings = ("an older one", json.loads(order)["ping_id"])
                await backend.heartbeat(replace(record, pings=pings), expires_seconds=60)

    async def answer_all() -> None:
        await asyncio.gather(*map(answer, records))

    thread = threading.Thread(target=lambda: asyncio.run(answer_all()))
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def test_a_ping_says_the_round_trip(scene: Scene) -> None:
    """A heartbeat that does not name the ping is no answer."""
    both = worker("a@one"), worker("b@two")
    do(*map(scene.beat, both))
    with answering(scene, both[0]):
        done = call("worker", "ping", "a")
        assert done.exit_code == 0
        assert re.fullmatch(r"a@one has answered within \d+ ms\.\n", done.stdout)
        one_silent = call("worker", "ping", "*", "--timeout", "0.3")
    assert one_silent.exit_code == 1
    assert "a@one has answered" in one_silent.stdout
    assert one_silent.stderr == "Error: No answer within 0.3 s from b@two.\n"


def test_a_worker_that_would_refuse_a_ping_is_told_none(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_TASKIQ_SIGNING_KEY", "k" * 32)
    do(scene.beat(worker("a@one")))
    done = call("worker", "ping", "a")
    assert done.exit_code == 1
    assert "The ping would be of no use" in done.stderr


# --- what the documents say ---

JSON_OF = (PACKAGE.parent / "docs" / "command-line.md").read_text(encoding="utf8")


def keys_of(value: Any) -> set[str]:
    """All keys of a JSON value but priorities, which are numbers."""
    if isinstance(value, list):
        return {key for it in value for key in keys_of(it)}
    if not isinstance(value, dict):
        return set()
    return {key for key in value if not key.isdigit()} | keys_of(list(value.values()))


def test_every_key_of_the_json_is_documented(busy: Scene) -> None:
    do(busy.send(step("far", queue="far")))
    shapes = [
        shape("status"),
        shape("queue", "show", "far"),
        shape("task", "list"),
        shape("run", "show", "run"),
        shape("worker", "show", "a"),
    ]
    assert keys_of(shapes) <= set(re.findall(r"`([a-z_]+)`", JSON_OF))
