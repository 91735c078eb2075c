"""What a worker tells Dagster of runs that could not start, where the first try fails."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from dagster_taskiq.errors import SlotError
from dagster_taskiq.worker import run_watch
from dagster_taskiq.worker.child_messages import FailRun, RunAnswer
from dagster_taskiq.worker.run_watch import RunWatch
from dagster_taskiq.worker.slot_base import ChildDied, Slot

NO_FILE = SlotError("slot 0: cannot start a process: OSError(24, 'Too many open files')")
AWAY = RunAnswer(is_over=False, error="Dagster's database is away")
HEARD = RunAnswer(is_over=False, error="")


class FakeSlot:
    """Answers in turn, the last one for ever."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.orders: list[FailRun] = []

    async def run(self, order: FailRun, on_child: Any) -> Any:
        self.orders.append(order)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def stop(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_watch, "_FIRST_PAUSE_SECONDS", 0.001)


def fail(slot: FakeSlot) -> None:
    watch = RunWatch(cast("Slot", slot))
    asyncio.run(asyncio.wait_for(watch.fail("payload", "its process was killed"), 10))


def test_dagster_is_told_until_it_has_heard() -> None:
    """No process can be started for it, the child dies, the database is away."""
    slot = FakeSlot(NO_FILE, ChildDied(-9, 1), AWAY, HEARD)
    fail(slot)
    assert [order.reason for order in slot.orders] == ["its process was killed"] * 4


def test_telling_ends_with_the_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The worker's log says what has become of the run."""
    monkeypatch.setattr(run_watch, "TELL_SECONDS", 0.05)
    fail(FakeSlot(NO_FILE))
    assert "stays STARTING" in caplog.text


def test_telling_ends_with_the_worker() -> None:
    """It has not the time to wait for a process."""
    slot = FakeSlot(NO_FILE)

    async def stop_meanwhile() -> None:
        watch = RunWatch(cast("Slot", slot))
        telling = asyncio.create_task(watch.fail("payload", "its process was killed"))
        await asyncio.sleep(0)
        await watch.stop()
        await asyncio.wait_for(telling, 10)

    asyncio.run(stop_meanwhile())
