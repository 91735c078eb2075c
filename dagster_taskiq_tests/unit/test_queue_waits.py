"""Why a task waits in its queue, in words that name workers, versions and servers."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from dagster_taskiq.defaults import (
    FIRST_NEWS_PAUSE_SECONDS,
    FOREIGN_WORKERS_SECONDS,
    LONGEST_NEWS_PAUSE_SECONDS,
    TURN_REASON_SECONDS,
    WAIT_REASON_SECONDS,
)
from dagster_taskiq.messages.envelope import PROTOCOL, QueueKind
from dagster_taskiq.messages.queue_looks import (
    QueueLook,
    named,
    queue_metadata,
    task_metadata,
)
from dagster_taskiq.messages.queue_pauses import QueuePause
from dagster_taskiq.messages.queue_waits import (
    Listeners,
    QueueWait,
    QueueWaits,
    WaitHistory,
    WaitKind,
)
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.messages.worker_records import WorkerRecord

BROKER = "redis://:***@host:6379/0"
ELSEWHERE = "amqp://user:***@rabbit//"
KEY = Signer(["k" * 32])


def worker(name: str = "w", *queues: str, **values: object) -> WorkerRecord:
    """One with a free slot of either kind."""
    usual = {"slots": 2, "run_slots": 2, "protocol": PROTOCOL, "broker": BROKER, "version": "9.9"}
    return WorkerRecord(name, f"{name}@h", "h", 1, queues or ("q",), **{**usual, **values})  # type: ignore[arg-type]


def why(
    *workers: WorkerRecord, kind: QueueKind = QueueKind.STEPS, signer: Signer | None = None
) -> QueueWait | None:
    """Why a task waits in the queue ``q``."""
    return QueueWaits(workers, kind, BROKER, signer or Signer()).of("q")


@pytest.mark.parametrize("kind", QueueKind)
def test_one_worker_that_can_take_it_is_enough(kind: QueueKind) -> None:
    """Whatever the others are."""
    others = worker("old", protocol=PROTOCOL + 1), worker("far", broker=ELSEWHERE)
    assert why(worker(), *others, kind=kind) is None


@pytest.mark.parametrize(
    "workers",
    [
        [],
        [worker("other", "long", "short")],
        [worker("of-runs", slots=0), worker("other", "long", "short")],
        [worker("leaving", state="draining"), worker("other", "long", "short")],
    ],
)
def test_no_worker_listens(workers: list[WorkerRecord]) -> None:
    """None at all, or only such as take no steps (any more)."""
    wait = why(*workers)
    assert wait is not None
    assert wait.kind is WaitKind.UNSERVED
    served = "long, short" if workers else "none"
    assert wait.reason == f'No worker listens on queue "q". Queues with workers: {served}.'


def test_no_worker_has_run_slots() -> None:
    """Then runs wait, and steps do not."""
    wait = why(worker(run_slots=0), worker("r", "runs", slots=0), kind=QueueKind.RUNS)
    assert wait is not None
    assert 'No worker with run slots listens on queue "q"' in wait.reason
    assert "Queues with run slots: runs." in wait.reason


def test_all_workers_are_of_another_version() -> None:
    """Each with its version, and what to do."""
    wait = why(worker("old", protocol=PROTOCOL + 1), worker("older", protocol=PROTOCOL + 2))
    assert wait is not None
    assert wait.kind is WaitKind.PROTOCOL
    assert f"old@h (dagster-taskiq 9.9, protocol {PROTOCOL + 1}); older@h" in wait.reason
    assert f"protocol {PROTOCOL}:" in wait.reason
    assert "Start a worker" in wait.reason


def test_a_crowd_is_not_named_one_by_one() -> None:
    """A reason is for people."""
    wait = why(*(worker(f"w{number}", protocol=0) for number in range(1000)))
    assert wait is not None
    assert wait.reason.count("w") < 20
    assert "and 995 more" in wait.reason


def test_a_worker_refuses_the_signature() -> None:
    """One is enough, as it drops what it takes."""
    wait = why(worker("keyed", key_ids=KEY.key_ids), worker())
    assert wait is not None
    assert wait.kind is WaitKind.REFUSED
    assert wait.reason.startswith("Worker keyed@h refuses it")


def test_all_workers_listen_on_another_broker() -> None:
    """Both addresses are named. They may lead to one server, so it counts only of idle workers."""
    wait = why(worker(broker=ELSEWHERE))
    assert wait is not None
    assert wait.kind is WaitKind.BROKER
    assert f"w@h on {ELSEWHERE}" in wait.reason
    assert f"{BROKER}, to which this run sends" in wait.reason
    assert why(worker(broker=ELSEWHERE, busy_slots=2)) is None


@pytest.mark.parametrize("address", ["", BROKER, "redis://host", "redis://u@host:6379"])
def test_the_same_broker_in_other_words(address: str) -> None:
    """Also of a worker that does not name its broker."""
    assert why(worker(broker=address)) is None


def test_all_run_slots_are_busy() -> None:
    """With their number; of steps that is no news."""
    workers = (
        worker("a", busy_run_slots=2, busy_slots=2),
        worker("b", run_slots=1, busy_run_slots=1),
    )
    wait = why(*workers, kind=QueueKind.RUNS)
    assert wait == QueueWait(WaitKind.BUSY, 'All 3 run slots of queue "q" are busy.')
    assert why(*workers) is None


UNSERVED = QueueWait(WaitKind.UNSERVED, "nobody")
BUSY = QueueWait(WaitKind.BUSY, "busy")
FOREIGN = QueueWait(WaitKind.PROTOCOL, "another version")
LATER = WAIT_REASON_SECONDS + 1
LISTENERS = Listeners("q", QueueKind.STEPS, ("w@h",), 3, 4)


def told(history: WaitHistory, wait: QueueWait | None, now: float, waited: float = LATER) -> bool:
    return history.news(wait, waited, now, LISTENERS) is not None


def test_each_reason_is_told_once() -> None:
    """After some seconds, and again if it was over in between."""
    history = WaitHistory()
    assert not told(history, UNSERVED, 0, waited=WAIT_REASON_SECONDS)
    assert told(history, UNSERVED, 0)
    assert not told(history, UNSERVED, 100)
    assert told(history, BUSY, 200)
    assert told(history, UNSERVED, 300)
    assert not told(history, None, 400)
    assert told(history, UNSERVED, 500)


def test_slots_that_become_free_and_busy_are_no_news() -> None:
    """Of a task that waits for long it is said once that it waits for others."""
    history = WaitHistory()
    waited = TURN_REASON_SECONDS
    assert not told(history, None, 0, waited)
    news = history.news(None, waited + 1, 1, LISTENERS)
    assert news == QueueWait(
        WaitKind.BUSY, 'Its turn has not come: 3 of 4 step slots of queue "q" are busy.'
    )
    for now in range(100, 1000, 100):
        assert not told(history, BUSY, now, waited + now)
        assert not told(history, None, now, waited + now)
    assert history.news(None, 1e6, 1e6) is None, "nobody is known to listen"


def test_reasons_that_come_and_go_are_told_less_and_less_often() -> None:
    """A worker that dies and starts all the time does not fill the log of a long wait."""
    history, day = WaitHistory(), 24 * 3600
    tellings = [now for now in range(0, day, 3) if told(history, (UNSERVED, BUSY)[now % 2], now)]
    assert tellings[1] <= FIRST_NEWS_PAUSE_SECONDS + 6
    pauses = [later - now for now, later in itertools.pairwise(tellings)]
    assert pauses[5:7] == sorted(pauses[5:7])
    assert max(pauses) <= LONGEST_NEWS_PAUSE_SECONDS + 6
    assert len(tellings) < 10 + day / LONGEST_NEWS_PAUSE_SECONDS
    assert told(history, FOREIGN, day + LONGEST_NEWS_PAUSE_SECONDS)


def test_who_listens_on_a_queue() -> None:
    """Those that take tasks of that kind from it, with all their slots."""
    workers = [
        worker("b", "q", "other", slots=4, busy_slots=3),
        worker("a", busy_slots=1),
        worker("elsewhere", "other"),
        worker("leaving", state="draining"),
        worker("of-runs", slots=0),
        worker("doubtful", is_trusted=False),
    ]
    waits = QueueWaits(workers, QueueKind.STEPS, BROKER, Signer())
    assert waits.listeners("q") == Listeners("q", QueueKind.STEPS, ("a@h", "b@h"), 4, 6)
    assert waits.listeners("nobody's") == Listeners("nobody's", QueueKind.STEPS, (), 0, 0)


def test_a_look_is_said_in_words() -> None:
    """The place if the server tells it; else how many wait; nothing where it says neither."""
    look = QueueLook(9, {"a": 4})
    assert look.sentence("a") == "It has place 4 of 9 in the queue."
    assert look.sentence("b") == "9 tasks wait in the queue."
    assert QueueLook(1).sentence("b") == "1 task waits in the queue."
    assert QueueLook(0).sentence("b") == QueueLook().sentence("b") == ""
    assert QueueLook(2, {"a": 4}).sentence("a", "x") == "x has place 4 of 4 in the queue."
    assert task_metadata("a", 7, look) == {"priority": 7, "tasks before it": 3}
    assert task_metadata("b", 7, look) == {"priority": 7}
    assert queue_metadata("q", UNSERVED, QueueLook(), None) == {"queue": "q", "reason": "unserved"}
    assert queue_metadata("q", BUSY, look, LISTENERS) == {
        "queue": "q",
        "reason": "busy",
        "tasks in queue": 9,
        "workers": "w@h",
        "busy slots": "3 of 4",
    }
    assert named([str(number) for number in range(1000)]).endswith("18, 19 and 980 more")


def test_hopeless_is_what_has_only_other_versions_for_long() -> None:
    """Anything else in between counts: a worker that listens may be the right one to come."""
    history = WaitHistory()
    for wait in (UNSERVED, None):
        history.news(FOREIGN, LATER, 100)
        assert not history.is_hopeless(99 + FOREIGN_WORKERS_SECONDS)
        assert history.is_hopeless(100 + FOREIGN_WORKERS_SECONDS)
        history.news(wait, LATER, 101)
        assert not history.is_hopeless(1000 + FOREIGN_WORKERS_SECONDS)


def test_a_record_that_is_not_signed_decides_nothing() -> None:
    """Neither that a queue is served, nor that its tasks are refused or of another version."""
    doubtful = worker("x", is_trusted=False, key_ids=KEY.key_ids, protocol=PROTOCOL + 1)
    stranger = worker("y", is_trusted=False, key_ids=("another",))
    for record, reason in ((doubtful, "The record of worker x@h is not signed"), (stranger, "y@h")):
        for others in ([], [worker("z", key_ids=KEY.key_ids)]):
            wait = why(record, *others, signer=KEY)
            assert wait is not None
            assert wait.kind is WaitKind.UNTRUSTED
            assert reason in wait.reason


# --- pauses ---


def test_a_paused_queue_says_by_whom_and_why() -> None:
    pause = QueuePause("q", "The warehouse is migrated.", 1.0, "host-a")
    for workers in ([], [worker()]):
        waits = QueueWaits(workers, QueueKind.STEPS, BROKER, Signer(), pauses={"q": pause})
        assert waits.of("q") == QueueWait(
            WaitKind.PAUSED, 'Queue "q" was paused on host host-a: The warehouse is migrated.'
        )


def test_paused_workers_are_a_reason_only_where_there_are_no_others() -> None:
    paused = replace(worker(), state="paused", pause_reason="disk full")
    waits = QueueWaits([paused], QueueKind.STEPS, BROKER, Signer())
    assert waits.of("q") == QueueWait(
        WaitKind.PAUSED, f'All workers of queue "q" are paused: {paused.name} (disk full).'
    )
    assert QueueWaits([paused, worker()], QueueKind.STEPS, BROKER, Signer()).of("q") is None
