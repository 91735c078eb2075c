"""The commands that show what has ended: which of it, and how it looks."""

from __future__ import annotations

import time
from typing import Any

import pytest

from dagster_taskiq.cli import looking
from dagster_taskiq.errors import UnreachableServerError
from dagster_taskiq.messages.attempt_ends import AttemptEnd, EndOutcome, HistoryBatch
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq_tests.unit.overview_scene import Scene, step
from dagster_taskiq_tests.unit.test_cli_listings import ESCAPE, call, do, lines, shape
from dagster_taskiq_tests.unit.test_cli_listings import scene as scene  # noqa: PLC0414

HOUR = 3600


def ending(
    name: str, outcome: EndOutcome, ago: float, run_id: str = "run-1", **values: Any
) -> AttemptEnd:
    at = time.time() - ago
    words = {"job": "nightly", "worker": "w@h", "host": "h", "slot": 1, "started_at": at - 130}
    task_id = f"{name}-0123456789"
    return AttemptEnd(task_id, run_id, name, 1, "dagster", outcome, at, **{**words, **values})


@pytest.fixture
def night(scene: Scene) -> Scene:
    """One step that waits, and what a night has brought."""
    ends = [
        ending("won", EndOutcome.SUCCEEDED, 60),
        ending("broke", EndOutcome.FAILED, 2 * HOUR, reason="ValueError: boom"),
        ending("again", EndOutcome.FAILED, 3 * HOUR, is_retried=True, reason="It was busy."),
        ending("gone", EndOutcome.LOST, 5 * HOUR, run_id="run-2", reason="The worker is gone."),
        ending("stopped", EndOutcome.CANCELLED, 50 * HOUR, worker="", slot=None, started_at=None),
    ]
    do(scene.open(), scene.send(step("waits")), scene.backend.add_history(HistoryBatch(ends)))
    return scene


def steps(*arguments: str) -> list[str]:
    return [it["step_key"] for it in shape("task", "list", *arguments)["tasks"]]


@pytest.mark.usefixtures("night")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", ["waits"]),
        ("--state waiting", ["waits"]),
        ("--state failed,lost", ["broke", "again", "gone"]),
        ("--state failed --state lost", ["broke", "again", "gone"]),
        ("--state retried", ["again"]),
        ("--state cancelled", ["stopped"]),
        ("--state ended", ["won", "broke", "again", "gone", "stopped"]),
        ("--state succeeded,waiting", ["waits", "won"]),
        ("--since 12h", ["waits", "won", "broke", "again", "gone"]),
        ("--since 3min", ["waits", "won"]),
        ("--state failed,lost --since 4h", ["broke", "again"]),
        ("--state ended --run run-2", ["gone"]),
        ("--state failed --run run-2", []),
    ],
)
def test_states_and_times_choose(options: str, expected: list[str]) -> None:
    """Without any, it is what is in flight, as ever."""
    assert steps(*options.split()) == expected


@pytest.mark.usefixtures("night")
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--state faild", "'faild' is no state. Did you mean 'failed'? There are waiting, running"),
        ("--state failed,", "'' is no state."),
        ("--since 12x", "'12x' is no time: say it like 90s, 30min, 12h or 2d."),
        ("--since -1h", "is no time"),
    ],
)
def test_what_is_no_state_or_time_is_named(options: str, sentence: str) -> None:
    done = call("task", "list", *options.split())
    assert done.exit_code == 2
    assert sentence in " ".join(done.stderr.split())


@pytest.mark.usefixtures("night")
def test_a_night_is_told_in_tables() -> None:
    """By run, the last end first; each reason below its table."""
    assert lines("task", "list", "--state", "failed,lost") == [
        "run run-1, job nightly",
        "task step try state ended took worker",
        "broke-01 broke 1 failed 2 h ago 2 min w@h",
        "again-01 again 1 failed, retried 3 h ago 2 min w@h",
        "broke-01: ValueError: boom",
        "again-01: It was busy.",
        "",
        "run run-2, job nightly",
        "task step try state ended took worker",
        "gone-012 gone 1 lost 5 h ago 2 min w@h",
        "gone-012: The worker is gone.",
    ]
    found = call("task", "list", "--state", "ended").stdout
    assert max(map(len, found.splitlines())) <= 80


@pytest.mark.usefixtures("night")
def test_an_ended_task_is_shown_whole() -> None:
    task = shape("task", "list", "--state", "retried")["tasks"][0]
    assert shape("task", "show", "again")["task"] == task
    assert (task["state"], task["is_retried"], task["worker"]) == ("failed", True, "w@h")
    assert task["ended_at"] - task["started_at"] == pytest.approx(130)
    found = lines("task", "show", "again")
    assert found[:6] == [
        "task again-0123456789",
        "run run-1",
        "job nightly",
        "step again",
        "attempt 1",
        "state failed, retried 3 h ago",
    ]
    assert "worker w@h, slot 1" in found
    assert found[-1] == "reason It was busy."
    assert "started -" in lines("task", "show", "stopped")


@pytest.mark.usefixtures("night")
def test_tasks_in_flight_and_ended_ones_have_the_same_keys() -> None:
    waiting, *ended = shape("task", "list", "--since", "90d")["tasks"]
    assert len(ended) == 5
    for task in ended:
        assert list(task) == list(waiting)
    assert waiting["ended_at"] is waiting["is_retried"] is None


@pytest.mark.usefixtures("night")
def test_a_run_that_is_over_is_shown() -> None:
    """And what has ended of one that goes on."""
    assert lines("run", "show", "run-2")[:4] == [
        "run run-2",
        "loop over",
        "",
        "ended lately",
    ]
    found = shape("run", "show", "run-2")["run"]
    assert (found["has_loop"], found["is_resumable"], found["tasks"]) == (False, None, [])
    assert [it["step_key"] for it in found["ended"]] == ["gone"]
    assert call("run", "show", "nothing").stderr.startswith(
        "Error: No run in flight or ended lately has the id 'nothing'."
    )


def test_what_runs_and_what_has_ended_of_a_run_stand_together(scene: Scene) -> None:
    end = ending("done", EndOutcome.SUCCEEDED, 1, run_id="run")
    do(scene.open(), scene.send(step("waits")), scene.backend.add_history(HistoryBatch([end])))
    found = lines("run", "show", "run")
    assert found[:2] == ["run run", "loop alive"]
    assert found.index("ended lately") > next(n for n, it in enumerate(found) if "waits" in it)


def test_the_night_is_told_without_the_broker(
    night: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked most when something is down."""

    def away(_: object) -> None:
        raise UnreachableServerError("amqp://h", "Cannot reach amqp://h.")

    monkeypatch.setattr(looking, "open_broker", away)
    assert steps("--state", "failed,lost") == ["broke", "again", "gone"]
    assert call("task", "list").exit_code == 1


def test_nothing_has_ended(scene: Scene) -> None:
    do(scene.open())
    for states, said in (
        ("failed", "No task has ended lately that can be seen.\n"),
        ("failed,lost", "No task is in flight or has ended lately that can be seen.\n"),
        ("running", "No task is in flight that can be seen.\n"),
    ):
        done = call("task", "list", "--state", states)
        assert (done.exit_code, done.stdout, done.stderr) == (0, "", said)


def test_ends_of_others_are_made_plain(scene: Scene) -> None:
    """Anybody who can write to the backend may have put them there."""
    bad = f"a{ESCAPE}\nb"
    end = ending(bad, EndOutcome.FAILED, 1, run_id=bad, job=bad, worker=bad, reason=bad)
    do(scene.backend.add_history(HistoryBatch([end])))
    for command in (("task", "list", "--state", "failed"), ("task", "show", "a")):
        done = call(*command)
        assert done.exit_code == 0
        assert "\x1b" not in done.stdout
    far = ending("far", EndOutcome.FAILED, 1, sent_at=1e300, started_at=-1e300)
    do(scene.backend.add_history(HistoryBatch([far])))
    assert "sent -" in lines("task", "show", "far")


def test_what_is_not_signed_is_not_shown(night: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_TASKIQ_SIGNING_KEY", "k" * 32)
    assert steps("--state", "ended") == []
    night.backend._signer = Signer(["k" * 32])
    do(night.backend.add_history(HistoryBatch([ending("signed", EndOutcome.FAILED, 1)])))
    assert steps("--state", "ended") == ["signed"]
