"""What a worker's observers make of what they hear; the types of messages to and from children."""

from __future__ import annotations

import json
import logging

import pytest

from dagster_taskiq.errors import MalformedTaskError, UnreachableServerError
from dagster_taskiq.execution.arrivals import Arrival
from dagster_taskiq.messages.envelope import Envelope, QueueKind, TaskName
from dagster_taskiq.messages.results import Outcome
from dagster_taskiq.worker import child_messages
from dagster_taskiq.worker.child_messages import (
    CodeIsOld,
    Execute,
    Executed,
    FailRun,
    LogClosed,
    LogOpened,
    LookAtRun,
    NotReady,
    OrderTaken,
    Ready,
    RunAnswer,
    RunStartLogged,
)
from dagster_taskiq.worker.observer import (
    CountingObserver,
    Ending,
    LoggingObserver,
    Observers,
    WorkerObserver,
)
from dagster_taskiq_tests.messages import STEP_TASK
from dagster_taskiq_tests.unit.worker_stand_ins import PLACE, Witness


class Broken(WorkerObserver):
    """Fails."""

    def claimed(self, envelope: Envelope) -> None:
        raise ZeroDivisionError


def test_an_observer_that_fails_is_logged_and_keeps_nobody_from_hearing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nor does it stop the task that it hears of."""
    witness = Witness()
    Observers(Broken(), witness).claimed(STEP_TASK)
    assert witness.heard == ["claimed"]
    assert "Broken failed to hear of 'claimed'" in caplog.text


def test_several_observers_hear_everything_that_one_hears() -> None:
    """A method that is added to one is added to the other."""
    events = {name for name in vars(WorkerObserver) if not name.startswith("_")}
    assert events == {name for name in vars(Observers) if not name.startswith("_")}


def test_the_log_of_a_task(caplog: pytest.LogCaptureFixture) -> None:
    """A task that could not begin says nothing of its end: its run does."""
    caplog.set_level(logging.INFO)
    observer = LoggingObserver()
    observer.began(STEP_TASK, PLACE)
    observer.ended(STEP_TASK, Ending(Outcome.FINISHED, 0.0, 1.5))
    observer.ended(STEP_TASK, Ending(Outcome.DIED, 0.0, 2.0, "Killed.", "a thread"))
    observer.ended(STEP_TASK, Ending(Outcome.ERROR, 0.0, None, "No child."))
    observer.outage("redis://a", UnreachableServerError("redis://a", "refused"))
    observer.outage_over("redis://a")
    title = STEP_TASK.title
    lines = [(it.levelname, it.getMessage()) for it in caplog.records]
    assert lines[:4] == [
        ("INFO", f"{title}: starting in slot 1."),
        ("INFO", f"{title}: ended after 1.500 s. "),
        ("WARNING", f"{title} left behind a thread: its process is replaced."),
        ("WARNING", f"{title}: ended after 2.000 s. Killed."),
    ]
    assert [level for level, _ in lines[4:]] == ["WARNING", "INFO"]


def test_the_counters_of_the_listing() -> None:
    """Busy and running is what is claimed and not released."""
    counts = CountingObserver()
    counts.claimed(STEP_TASK)
    counts.refused("redis://host", "a message", ValueError())
    assert (counts.busy[QueueKind.STEPS], counts.busy[QueueKind.RUNS]) == (1, 0)
    (running,) = counts.running.values()
    assert (running.task_id, running.step_key) == (STEP_TASK.task_id, STEP_TASK.step_key)
    counts.released(STEP_TASK)
    assert not counts.running
    assert (counts.busy[QueueKind.STEPS], counts.refused_count) == (0, 1)


ORDERS = [
    Execute(
        TaskName.EXECUTE_PLAN, "{}", PLACE, Arrival("q", 1), "here", 1.5, "run", takes_own_code=True
    ),
    LookAtRun("{}"),
    FailRun("{}", "why"),
]
WORDS = [
    Ready(),
    NotReady("why"),
    CodeIsOld("a has changed", is_own=False, is_by_age=True),
    OrderTaken(),
    LogOpened("/log", 1),
    LogClosed("/log"),
    RunStartLogged(),
    Executed("result", "", 1),
    RunAnswer(is_over=True),
]


def test_messages_to_and_from_a_child_survive_the_way() -> None:
    """As JSON."""
    for order in ORDERS:
        packed = json.loads(json.dumps(child_messages.pack(order)))
        assert child_messages.unpack_order(packed) == order
    for word in WORDS:
        packed = json.loads(json.dumps(child_messages.pack(word)))
        assert child_messages.unpack_word(packed) == word


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"kind": "Execute"},  # an order is no word
        {"kind": "Executed"},
        {"kind": "Ready", "more": 1},
        {"kind": ["Ready"]},
    ],
)
def test_what_is_no_word_of_a_child_is_refused(values: dict[str, object]) -> None:
    """With an error that its slot knows."""
    with pytest.raises(ValueError, match="no"):
        child_messages.unpack_word(values)


def test_a_flood_of_refused_messages_does_not_fill_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The first of each kind is said, with the server that it came from."""
    observer = LoggingObserver()
    for address in ("amqp://broker", "redis://backend"):
        for _ in range(5):
            observer.refused(address, "a message", MalformedTaskError("it is bad"))
    assert caplog.messages == [
        "Refused a message from amqp://broker: it is bad.",
        "Refused a message from redis://backend: it is bad.",
    ]
