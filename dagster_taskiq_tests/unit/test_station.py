"""What a station makes of its child's answer, and what it does where it can have no child."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

import pytest

from dagster_taskiq.backend import Claim, ClaimAnswer
from dagster_taskiq.brokers import Delivery
from dagster_taskiq.errors import NoProcessError
from dagster_taskiq.messages.envelope import Envelope, QueueKind, TaskName
from dagster_taskiq.messages.results import Outcome, Place, TaskResult
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.messages.time_limits import TimeLimits
from dagster_taskiq.worker import slot_pool
from dagster_taskiq.worker import station as station_module
from dagster_taskiq.worker.leases import Lease, StopReason
from dagster_taskiq.worker.receiver import SettlingReceiver
from dagster_taskiq.worker.station import Station, _result_of
from dagster_taskiq_tests.messages import STEP_TASK

PLACE = Place("w@h", "worker-id", "h", 4711, 2)


@pytest.mark.parametrize("reason", [None, *StopReason])
def test_only_a_cancel_rules_out_a_retry(reason: StopReason | None) -> None:
    """An interrupt before the step's start may also be a lost lease, or a stranger's signal."""
    result = result_of(
        TaskResult(Outcome.FINISHED, PLACE, reason="Stopped.", is_cancelled=True), reason
    )
    assert result.is_cancelled == (reason is StopReason.CANCELLED)
    expected = "this" if reason else "a signal that its worker had not sent"
    assert result.reason == f"Stopped after {expected}."


def test_the_words_of_a_database_stay_as_they_are() -> None:
    """Of a step that was also interrupted: that was not why its events were refused."""
    result = result_of(
        TaskResult(Outcome.UNLOGGED, PLACE, reason="The disk is full.", is_cancelled=True),
        StopReason.CANCELLED,
    )
    assert result.is_cancelled
    assert result.reason == "The disk is full."


def result_of(said: TaskResult, reason: StopReason | None) -> TaskResult:
    """What a station makes of a child's result, where it has stopped the task for that reason."""
    claim = Claim("run", "task", "token", 30.0, "epoch", PLACE)
    lease = Lease(claim, 4711, 0.0, lambda: None, lambda: None, stop_reason=reason)
    lease.stop_cause = "this" if reason else ""
    answer = {"kind": "result", "result": said.to_bytes().decode(), "resident_kib": 1}
    return _result_of(answer, lease, "")


SECONDS = 30.0


class ShortSlot:
    """A slot that can have no process while ``is_short``."""

    location = ""
    number = 1
    pid = 0
    is_short = True

    async def prepare(self, location: str = "") -> None:
        if self.is_short:
            raise NoProcessError("slot 1: cannot start a process: EMFILE")

    def retire(self) -> None: ...


def a_station(*slots: ShortSlot) -> Station:
    """A station that has only its slots, and cannot claim anything."""
    nothing = cast("Any", None)
    return Station(
        QueueKind.STEPS,
        cast("Any", MagicMock()),
        backend=nothing,
        leases=nothing,
        slots=cast("Any", list(slots)),
        run_watch=nothing,
        place=PLACE,
        result_expires_seconds=1.0,
        limits=TimeLimits(),
        signer=nothing,
        queues=("q",),
    )


async def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.005)


def test_a_worker_without_processes_claims_nothing_and_has_its_slots_afterwards(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It goes on when every slot can have a process again, and says once each that it is so."""
    monkeypatch.setattr(slot_pool, "_SHORTAGE_SECONDS", 0.01)
    caplog.set_level(logging.INFO)
    slots = [ShortSlot(), ShortSlot()]
    station = a_station(*slots)
    pool = station._slots
    message = cast("Envelope", SimpleNamespace(code_location=""))

    async def scenario() -> None:
        await pool.end_shortage(lambda: False)  # nothing is missing
        for _ in slots:
            await station._execute(message, cast("Any", None))  # a claim would raise
        assert station.is_short
        recovering = asyncio.gather(*(pool.end_shortage(lambda: False) for _ in slots))
        slots[0].is_short = False
        await _until(lambda: len(pool._lacking) == 1)
        assert not recovering.done()
        slots[1].is_short = False
        await asyncio.wait_for(recovering, SECONDS)

    asyncio.run(scenario())
    assert not station.is_short
    assert len(pool._idle) == len(slots)
    assert caplog.text.count("takes no steps until") == 1
    assert caplog.text.count("takes steps again") == 1


class DyingSlot(ShortSlot):
    """A slot whose child dies before it has begun, and which can then have none."""

    is_short = False

    async def run(self, *_: object) -> None:
        self.is_short = True
        await self.prepare()


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        (TaskName.EXECUTE_PLAN, Outcome.REFUSED),
        (TaskName.EXECUTE_JOB, None),
        (TaskName.RESUME_JOB, Outcome.ERROR),
    ],
)
def test_a_task_that_was_claimed_before_the_shortage_is_given_back(
    name: TaskName, outcome: Outcome | None
) -> None:
    """A step by its loop, a launched run by its message, which was not acked."""
    stored: list[Outcome] = []
    acked: list[str] = []
    station = a_station(DyingSlot())

    async def claim(*_: object, **__: object) -> ClaimAnswer:
        return ClaimAnswer.GRANTED

    async def complete(_claim: Claim, data: bytes, *, is_refused: bool, **_: object) -> bool:
        stored.append(TaskResult.from_bytes(data).outcome)
        assert is_refused is (stored[-1] is Outcome.REFUSED)
        return True

    async def ack() -> None:
        acked.append(name.value)

    station._backend = cast("Any", SimpleNamespace(claim=claim, complete=complete))
    station._leases = cast("Any", MagicMock())
    envelope = replace(STEP_TASK, name=name)
    asyncio.run(station._execute(envelope, cast("Any", SimpleNamespace(ack=ack))))
    assert stored == ([outcome] if outcome else [])
    assert len(acked) == (0 if name is TaskName.EXECUTE_JOB else 1)
    assert station.is_short
    station._leases.release.assert_called_once()  # type: ignore[attr-defined]


def test_a_message_is_given_back_before_its_worker_recovers() -> None:
    """Another worker may have a process for it; this one takes no other in its place meanwhile."""
    happened: list[str] = []

    async def scenario() -> None:
        async def release() -> None:
            happened.append("released")

        async def recover() -> None:
            happened.append("recovered")

        receiver = SettlingReceiver(cast("Any", MagicMock()), 1, recover)
        await receiver.callback(Delivery(data=b"", ack=release, release=release))

    asyncio.run(scenario())
    assert happened == ["released", "recovered"]


def test_a_result_that_is_too_large_is_left_to_the_log_and_says_so() -> None:
    """It names the step, the size and the setting; what is stored instead is small and sealed.

    It is no error: a step whose success is in Dagster's log must not fail after it.
    """
    signer = Signer(["k" * 32], max_bytes=2000)
    station = SimpleNamespace(_signer=signer)
    envelope = replace(STEP_TASK, step_key="big")
    whole = TaskResult(Outcome.FINISHED, PLACE, events=("x" * 3000,))
    sealed = Station._sealed(station, envelope, whole)  # type: ignore[arg-type]
    stored = TaskResult.from_bytes(sealed, signer, envelope.task_id)
    assert stored.outcome is Outcome.DIED
    assert stored.events == ()
    for part in ("Step big of run run", "3,", "max_message_bytes allows 2,000"):
        assert part in stored.reason


def test_a_claim_that_was_answered_late_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that is most of a lease old would have its task stopped as soon as it begins."""
    lease_seconds = 30.0
    claim = Claim("run", "task", "token", lease_seconds, "epoch", PLACE)
    now = 1000.0
    asked_at: list[float] = []
    delays = [lease_seconds * 0.7, lease_seconds * 0.1]

    async def answer(*_: object, **__: object) -> ClaimAnswer:
        nonlocal now
        asked_at.append(now)
        now += delays[len(asked_at) - 1]
        return ClaimAnswer.GRANTED

    monkeypatch.setattr(station_module, "clock", lambda: now)
    station = a_station()
    station._backend = cast("Any", SimpleNamespace(claim=answer))
    envelope = cast("Envelope", SimpleNamespace(name=TaskName.EXECUTE_PLAN, task_id="task"))
    counts_from = asyncio.run(station._claim(claim, envelope, cast("Any", None)))
    assert counts_from == asked_at[-1]
    assert len(asked_at) == len(delays)
