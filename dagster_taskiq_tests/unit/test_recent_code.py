"""What a worker loads when it starts: the code that its queues have had tasks of lately."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import pytest

from dagster_taskiq.backend.memory import MemoryBackend, MemoryServer
from dagster_taskiq.errors import UnreachableServerError
from dagster_taskiq.messages.attempt_ends import AttemptEnd, EndOutcome, HistoryBatch
from dagster_taskiq.messages.queue_names import QueueKind
from dagster_taskiq.worker.child_messages import FindCode, RunAnswer
from dagster_taskiq.worker.recent_code import RECENT_SECONDS, RecentCode
from dagster_taskiq.worker.run_watch import RunWatch
from dagster_taskiq.worker.slot_base import Slot
from dagster_taskiq.worker.templates import Templates

NOW = time.time()


def an_end(run_id: str, *, step: str = "", queue: str = "q", job: str = "", ago: float = 0) -> Any:
    """Of a whole run where no step is named; ``ago`` in seconds."""
    task_id, outcome = f"{run_id} {step}", EndOutcome.SUCCEEDED
    return AttemptEnd(task_id, run_id, step, 1, queue, outcome, NOW - ago, job=job)


class Asked:
    """Dagster, as a child asks it, and templates; each run has code of its own."""

    def __init__(self, error: str = "") -> None:
        self.run_ids: list[str] = []
        self.loaded: list[tuple[str, str]] = []
        self.is_stopped = False
        self._error = error

    async def run(self, order: FindCode, on_child: object) -> RunAnswer:
        self.run_ids += order.run_ids
        codes = {f"code of {it}": f"payload of {it}" for it in order.run_ids}
        return RunAnswer(error=self._error) if self._error else RunAnswer(payloads=codes)

    async def load_ahead(self, location: str, payload: str) -> None:
        self.loaded.append((location, payload))

    async def stop(self) -> None:
        self.is_stopped = True


async def settle(awaited: asyncio.Task[Any]) -> None:
    """Have a task do what it can do without anybody else."""
    for _ in range(20):
        await asyncio.sleep(0)
    assert not awaited.done()


async def asked(
    ends: Sequence[AttemptEnd],
    queues: Sequence[str] = ("q",),
    kinds: Mapping[QueueKind, int] | None = None,
    backend: MemoryBackend | None = None,
    error: str = "",
) -> Asked:
    """What comes of the ends, the last one first."""
    history, found = backend or MemoryBackend(MemoryServer()), Asked(error)
    if ends:
        await history.add_history(HistoryBatch(ends[::-1]))
    recent = RecentCode(history, cast("Templates", found), RunWatch(cast("Slot", found)))
    running = asyncio.create_task(recent.run(kinds or dict.fromkeys(QueueKind, 1), queues))
    await settle(running)
    running.cancel()
    await asyncio.wait({running})
    assert running.cancelled()
    assert found.is_stopped
    return found


def test_what_was_executed_lately_is_loaded_the_last_one_first() -> None:
    """One run is asked for each job, and each whole run whose job nobody has told."""

    async def scenario() -> None:
        ends = [
            an_end("5", step="a", job="many"),
            an_end("5", step="b", job="many", ago=1),
            an_end("4", ago=2),
            an_end("3", step="a", job="many", ago=3),
            an_end("2", step="a", job="other", ago=4),
            an_end("4", step="a", job="third", ago=5),
            an_end("1", ago=RECENT_SECONDS + 60),
        ]
        found = await asked(ends)
        assert found.run_ids == ["5", "4", "2"]
        assert found.loaded == [(f"code of {it}", f"payload of {it}") for it in "542"]

    asyncio.run(scenario())


def test_only_what_the_worker_serves_is_loaded() -> None:
    """Its queues, and the kinds of its slots."""

    async def scenario() -> None:
        ends = [an_end("1"), an_end("2", queue="gpu"), an_end("3", step="a", ago=1)]
        assert (await asked(ends, ["gpu"])).run_ids == ["2"]
        assert (await asked(ends, ["q", "gpu"])).run_ids == ["1", "2", "3"]
        assert (await asked(ends, kinds={QueueKind.STEPS: 1})).run_ids == ["3"]
        assert (await asked(ends, ["other"])).run_ids == []

    asyncio.run(scenario())


class Away(MemoryBackend):
    """Its history cannot be read."""

    async def ended(self, most: int = 0) -> list[AttemptEnd]:
        raise UnreachableServerError(self.address, "It is away.")


def test_what_cannot_be_found_out_holds_nobody_up(caplog: pytest.LogCaptureFixture) -> None:
    """A backend that is away, a Dagster that does not answer."""
    caplog.set_level("INFO")

    async def scenario() -> None:
        assert not (await asked([], backend=Away(MemoryServer()))).run_ids
        assert "It is away." in caplog.text
        found = await asked([an_end("1")], error="no database")
        assert found.run_ids == ["1"]
        assert not found.loaded
        assert "no database" in caplog.text

    asyncio.run(scenario())
