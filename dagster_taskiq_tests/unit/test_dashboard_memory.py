"""What the page keeps of its looks: silent and lost workers, depths, ended attempts, charts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest

from dagster_taskiq.backend import TaskState
from dagster_taskiq.dashboard.charts import (
    HEIGHT,
    WIDTH,
    line,
    nice_seconds,
    nice_top,
    stacked_bars,
)
from dagster_taskiq.dashboard.ended import ALL_ENDS, FEW_ENDS, EndMemory, unknown_note
from dagster_taskiq.dashboard.looks import Look
from dagster_taskiq.dashboard.memory import (
    MEMORY_SECONDS,
    SAMPLE_SECONDS,
    SILENT_SECONDS,
    Memory,
)
from dagster_taskiq.dashboard.summary import alerts
from dagster_taskiq.dashboard.words import ago, duration, moment, short_duration
from dagster_taskiq.messages.attempt_ends import AttemptEnd, EndGroup, EndOutcome
from dagster_taskiq.messages.worker_records import LOST
from dagster_taskiq.overview import Overview, RunView, ServerView, TaskView
from dagster_taskiq_tests.unit.overview_scene import worker

SERVER = ServerView(("broker", "backend"), "memory", "memory://test", 0.001)


class Time:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Watcher:
    """A memory that looks every two seconds."""

    def __init__(self) -> None:
        self.time = Time()
        self.memory = Memory(self.time, self.time)

    def watch(self, seconds: float, *records: object) -> None:
        """Look for a while at these workers."""
        for _ in range(int(seconds / 2)):
            self.time.now += 2
            self.memory.note(Overview(workers=records))  # type: ignore[arg-type]

    def silent(self) -> list[str]:
        return sorted(self.memory.silent_seconds())


def test_a_worker_whose_heartbeats_end_is_silent() -> None:
    """By when its record changed here: its clock may say anything."""
    watcher, dead = Watcher(), worker("dead@h", sent_at=5.0)
    for beat in range(3):
        watcher.watch(4, replace(dead, sent_at=5.0 + beat))
    assert watcher.silent() == []
    watcher.watch(SILENT_SECONDS + 2, replace(dead, sent_at=7.0))
    assert watcher.silent() == ["dead@h"]
    watcher.watch(2)
    assert watcher.silent() == []


def test_who_was_away_calls_nobody_silent() -> None:
    """A worker may have spoken while nobody looked."""
    watcher, one = Watcher(), worker("one@h", sent_at=5.0)
    watcher.watch(4, one)
    watcher.time.now += 600
    watcher.watch(2, one)
    assert watcher.silent() == []


def test_a_lost_worker_that_was_started_again_is_not_missed() -> None:
    """It stays in its table for a while, and needs nobody any more."""
    lost = [worker(name, state=LOST, sent_at=40.0) for name in ("a@h", "b@h", "b@h")]

    def missed(*names: str) -> list[str]:
        alive = [worker(name, sent_at=99.0) for name in names]
        overview = Overview(servers=[SERVER], workers=alive, lost_workers=lost)
        return [it.title for it in alerts(Look(at=100.0, overview=overview))]

    assert missed("c@h") == ["2 workers (a@h, b@h) are lost"]
    assert missed("a@h") == ["Worker b@h is lost"]
    assert missed("a@h", "b@h") == []


def test_a_task_keeps_the_name_that_it_was_seen_with() -> None:
    """A worker's next heartbeat names what it has taken, and a dead one's none."""
    memory = Memory()
    waiting = TaskView("t", "run", TaskState.UNKNOWN, "load", 2, "dagster")
    taken = TaskView("t", "run", TaskState.EXPIRED)
    foreign = TaskView("t", "other", TaskState.CLAIMED)

    def seen(task: TaskView) -> TaskView:
        runs = [RunView("run", True, False, [task])]
        return next(memory.note(Overview(runs=runs)).tasks())

    assert seen(taken).step_key is None
    seen(waiting)
    assert (seen(taken).step_key, seen(taken).attempt, seen(taken).queue) == ("load", 2, "dagster")
    assert seen(foreign).step_key is None


def test_samples_are_of_the_last_hour() -> None:
    watcher = Watcher()
    watcher.watch(MEMORY_SECONDS + 600, worker(slots=2, busy_slots=1, run_slots=1))
    samples = watcher.memory.samples()
    assert len(samples) == pytest.approx(MEMORY_SECONDS / SAMPLE_SECONDS, abs=1)
    assert (samples[-1].busy, samples[-1].slots) == (1, 3)
    assert watcher.time.now - samples[0].at <= MEMORY_SECONDS


# --- ended attempts ---


def ends(outcome: EndOutcome, first: int, last: int) -> list[AttemptEnd]:
    """One a second, the newest first."""
    return [
        AttemptEnd(f"{outcome.value} {n}", "run", "step", 1, "dagster", outcome, float(n))
        for n in range(last, first - 1, -1)
    ]


def test_ended_attempts_add_up_over_looks() -> None:
    """Each look reads few, and the next one all where those may not have been all that are new."""
    memory = EndMemory()
    assert memory.next_most == ALL_ENDS
    found = memory.note(ends(EndOutcome.FAILED, 1, 5), 5.0)
    assert len(found.all) == 5
    assert unknown_note(found, 5.0) == ""
    assert memory.next_most == FEW_ENDS
    assert len(memory.note(ends(EndOutcome.FAILED, 3, 8), 8.0).all) == 8
    memory.note(ends(EndOutcome.FAILED, 9, 8 + FEW_ENDS), 100.0)
    assert memory.next_most == ALL_ENDS
    found = memory.note(ends(EndOutcome.FAILED, 1, 8 + FEW_ENDS), 100.0)
    assert len(found.all) == 8 + FEW_ENDS
    assert unknown_note(found, 100.0) == ""
    assert found.all[0].ended_at == 8 + FEW_ENDS


def test_what_is_not_known_of_the_last_hour_is_said() -> None:
    memory, last = EndMemory(), 1000
    read = ends(EndOutcome.SUCCEEDED, last - ALL_ENDS + 1, last)
    found = memory.note([*read, *ends(EndOutcome.FAILED, 1, 5)], float(last))
    assert found.known_since == {EndGroup.SUCCEEDED: last - ALL_ENDS + 1}
    assert "known for 4 min" in unknown_note(found, float(last))
    later = memory.note(read[:FEW_ENDS], last + MEMORY_SECONDS)
    assert unknown_note(later, last + MEMORY_SECONDS) == ""


def test_old_ends_are_forgotten_beyond_what_the_backend_keeps() -> None:
    memory = EndMemory()
    memory.note(ends(EndOutcome.SUCCEEDED, 1, 250), 250.0)
    for start in range(251, 1000, 50):
        memory.note(ends(EndOutcome.SUCCEEDED, start, start + 49), float(start + 49))
    assert len(memory.note([], 1000.0).all) == 1000
    found = memory.note(ends(EndOutcome.SUCCEEDED, 1001, 1001), 1000.0 + 2 * MEMORY_SECONDS)
    assert len(found.all) == ALL_ENDS


# --- charts and words ---


@pytest.mark.parametrize(
    ("value", "top"), [(0, 1), (1, 1), (7, 8), (9, 10), (11, 20), (4001, 5000)]
)
def test_the_upper_edge_is_a_round_number(value: float, top: float) -> None:
    assert nice_top(value) == top


@pytest.mark.parametrize(("value", "top"), [(0.2, 1), (31, 60), (61, 120), (40_000, 40_000)])
def test_the_upper_edge_is_a_round_time(value: float, top: float) -> None:
    assert nice_seconds(value) == top


def _numbers(path: str) -> list[float]:
    return [float(it) for it in re.findall(r"-?\d+\.?\d*", path)]


@pytest.mark.parametrize("ages", [(3600.0, 0.0), (20.0, 10.0, 0.0), (5.0,)])
def test_a_line_is_inside_its_chart_and_broken_by_gaps(ages: Sequence[float]) -> None:
    """The ends of an hour are its edges; who has not looked for a while has seen nothing."""
    drawn = line([(1000.0 - age, 5.0) for age in ages], 1000.0, 10.0, "busy")
    numbers = _numbers(drawn.path)
    assert all(0 <= it <= WIDTH for it in numbers[::2])
    assert all(0 <= it <= HEIGHT for it in numbers[1::2])
    assert drawn.path.count("M") == (2 if 3600.0 in ages else 1)


def test_bars_stand_on_each_other_and_inside() -> None:
    """Also where one of many is too low to be drawn to scale."""
    bars = stacked_bars([[1, 99], [0, 0], [100, 0]], ["bad", "good"], ["a", "b", "c"], 100)
    assert [(it.tone, it.title) for it in bars] == [("bad", "a"), ("good", "a"), ("bad", "c")]
    assert bars[0].y + bars[0].height == pytest.approx(HEIGHT)
    assert bars[1].y + bars[1].height == pytest.approx(bars[0].y, abs=0.02)
    assert min(it.y for it in bars) >= 0
    assert bars[0].height >= 1.5


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-5, "0 s"),
        (59, "59 s"),
        (60, "1 min"),
        (185, "3 min 5 s"),
        (7260, "2 h 1 min"),
        (90_000, "1 d 1 h"),
        (None, "\N{EN DASH}"),
    ],
)
def test_a_time_is_said_in_two_units(seconds: float | None, words: str) -> None:
    assert duration(seconds) == words


def test_other_words() -> None:
    assert [short_duration(it) for it in (0.0, 0.04, 1.5, 75)] == [
        "1 ms",
        "40 ms",
        "1.5 s",
        "1 min 15 s",
    ]
    assert [ago(at, 100.0) for at in (99.0, 40.0, 200.0, None)] == [
        "1 s ago",
        "1 min ago",
        "0 s ago",
        "\N{EN DASH}",
    ]
    assert moment(0.0) == "1970-01-01 00:00:00 UTC"
    assert moment(1e30) == ""
