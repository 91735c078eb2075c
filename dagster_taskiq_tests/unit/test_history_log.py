"""What a process tells the history: in batches, whatever becomes of the backend meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

import pytest

from dagster_taskiq.backend.history_log import HistoryLog
from dagster_taskiq.backend.memory import MemoryBackend, MemoryServer
from dagster_taskiq.defaults import HISTORY_ENDS
from dagster_taskiq.errors import UnreachableServerError
from dagster_taskiq.messages.attempt_ends import (
    AttemptEnd,
    Counted,
    Counter,
    EndOutcome,
    HistoryBatch,
)

SENT, SUCCEEDED, FAILED = (
    Counter("q", "steps", what) for what in (Counted.SENT, Counted.SUCCEEDED, Counted.FAILED)
)


def an_end(name: str, outcome: EndOutcome = EndOutcome.SUCCEEDED) -> AttemptEnd:
    return AttemptEnd(name, "run", "step", 1, "q", outcome, time.time())


class Backend(MemoryBackend):
    """Counts its batches, and loses answers."""

    def __init__(self) -> None:
        self.server = MemoryServer()
        super().__init__(self.server)
        self.batches: list[HistoryBatch] = []
        self.loses_answers = False
        self.is_broken = False
        self.came = asyncio.Event()

    async def until(self, count: int) -> None:
        """Wait until so many batches have come."""
        while len(self.batches) < count:
            self.came.clear()
            await self.came.wait()

    async def add_history(self, batch: HistoryBatch) -> None:
        self.batches.append(batch)
        self.came.set()
        await super().add_history(batch)
        if self.loses_answers:
            raise UnreachableServerError(self.address, "The answer was lost.")
        if self.is_broken:
            raise ValueError("a bug")


@pytest.fixture
def backend() -> Backend:
    return Backend()


@pytest.fixture
def log(backend: Backend) -> HistoryLog:
    return HistoryLog(backend)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 30))


def ended(backend: Backend) -> set[str]:
    return {end.task_id for end in run(backend.ended())}


def test_all_goes_in_one_batch(backend: Backend, log: HistoryLog) -> None:
    """Sent and ended tasks; and where there is nothing to tell, nothing is asked."""
    run(log.send())
    assert backend.batches == []
    for name in ("one", "two"):
        log.note_sent("q", "steps")
        log.note_end(an_end(name))
    run(log.send())
    run(log.send())
    assert len(backend.batches) == 1
    assert ended(backend) == {"one", "two"}
    assert run(backend.counts()) == {SENT: 2, SUCCEEDED: 2}


def test_it_is_told_every_few_seconds(backend: Backend) -> None:
    """By the task that the client keeps; and the rest when it ends."""
    log = HistoryLog(backend, seconds=0.01)

    async def work() -> None:
        telling = asyncio.create_task(log.run())
        log.note_end(an_end("one"))
        await backend.until(1)
        log.note_end(an_end("two"))
        await backend.until(2)
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)

    run(work())
    assert ended(backend) == {"one", "two"}


def test_an_outage_loses_nothing(backend: Backend, log: HistoryLog) -> None:
    """What was noted before and in it is told after it."""
    backend.server.freeze()
    for name in ("before", "in it"):
        log.note_end(an_end(name))
        run(log.send())
    backend.server.thaw()
    run(log.send())
    assert ended(backend) == {"before", "in it"}
    assert run(backend.counts()) == {SUCCEEDED: 2}


def test_a_lost_answer_counts_once(backend: Backend, log: HistoryLog) -> None:
    backend.loses_answers = True
    log.note_end(an_end("one"))
    for _ in range(3):
        run(log.send())
    backend.loses_answers = False
    log.note_end(an_end("two"))
    run(log.send())
    assert run(backend.counts()) == {SUCCEEDED: 2}
    assert ended(backend) == {"one", "two"}


def test_a_long_outage_takes_no_more_memory_than_the_backend_keeps(
    backend: Backend, log: HistoryLog
) -> None:
    """Of each group the last; the counters are right all the same."""
    backend.server.freeze()
    log.note_end(an_end("failed", EndOutcome.FAILED))
    for number in range(3 * HISTORY_ENDS):
        log.note_end(an_end(f"ok {number}"))
        log.note_sent("q", "steps")
        if number % 100 == 0:
            run(log.send())
    run(log.send())
    assert sum(len(kept) for kept in log._ends.values()) <= HISTORY_ENDS
    assert not log._noted
    backend.server.thaw()
    run(log.send())
    assert "failed" in ended(backend)
    assert len(ended(backend)) == HISTORY_ENDS + 1
    assert run(backend.counts())[SUCCEEDED] == run(backend.counts())[SENT] == 3 * HISTORY_ENDS


def test_a_defect_ends_nobody(
    backend: Backend, log: HistoryLog, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said, and not tried again for ever."""
    backend.is_broken = True
    log.note_end(an_end("one"))
    run(log.send())
    assert "1 ends are missing in the history" in caplog.text
    backend.is_broken = False
    log.note_end(an_end("two", EndOutcome.FAILED))
    run(log.send())
    assert len(backend.batches) == 2
    assert run(backend.counts())[FAILED] == 1
