"""Why a task waits in its queue, in words that name workers, versions and servers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dagster_taskiq.defaults import FOREIGN_WORKERS_SECONDS, WAIT_REASON_SECONDS
from dagster_taskiq.messages.envelope import PROTOCOL, QueueKind
from dagster_taskiq.messages.queue_pauses import QueuePause
from dagster_taskiq.messages.queue_waits import QueueWait, QueueWaits, WaitHistory, WaitKind
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


def test_each_reason_is_told_once() -> None:
    """After some seconds, again if it was over in between; of busy slots never again."""
    history = WaitHistory()
    assert history.news(UNSERVED, WAIT_REASON_SECONDS, 0) is None
    assert history.news(UNSERVED, LATER, 0) is UNSERVED
    assert history.news(UNSERVED, LATER, 1) is None
    assert history.news(BUSY, LATER, 2) is BUSY
    assert history.news(None, LATER, 3) is None
    assert history.news(BUSY, LATER, 4) is None
    assert history.news(UNSERVED, LATER, 5) is UNSERVED


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
