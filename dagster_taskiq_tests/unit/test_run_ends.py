"""What a worker tells the history of whole runs; of steps it tells nothing."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest

from dagster_taskiq.backend.history_log import HistoryLog
from dagster_taskiq.backend.memory import MemoryBackend, MemoryServer
from dagster_taskiq.execution.tasks import EXIT_SUPERSEDED
from dagster_taskiq.messages.attempt_ends import AttemptEnd, EndOutcome
from dagster_taskiq.messages.envelope import Envelope, TaskName
from dagster_taskiq.messages.results import Outcome, TaskResult
from dagster_taskiq.worker.run_ends import RunEnds
from dagster_taskiq_tests.messages import STEP_TASK
from dagster_taskiq_tests.unit.worker_stand_ins import PLACE

RUN_TASK = replace(
    STEP_TASK, name=TaskName.EXECUTE_JOB, step_key=None, attempt=0, sent_at=time.time()
)


def ended(
    result: TaskResult,
    *,
    is_cancelled: bool = False,
    task: Envelope = RUN_TASK,
    begins: bool = True,
) -> list[AttemptEnd]:
    """What the history knows after a task has come to this."""
    backend = MemoryBackend(MemoryServer())
    log = HistoryLog(backend)
    observer = RunEnds(log)
    if begins:
        observer.began(task, PLACE)
    observer.completed(task, result, is_cancelled=is_cancelled, size_bytes=1)
    observer.released(task)
    assert not observer._begun

    async def read() -> list[AttemptEnd]:
        await log.send()
        return await backend.ended()

    return asyncio.run(read())


@pytest.mark.parametrize(
    ("result", "is_cancelled", "outcome", "reason"),
    [
        (TaskResult(Outcome.FINISHED, PLACE, exit_code=0), False, EndOutcome.SUCCEEDED, ""),
        (TaskResult(Outcome.FINISHED, PLACE, exit_code=1), False, EndOutcome.FAILED, "its log"),
        (TaskResult(Outcome.FINISHED, PLACE, exit_code=1), True, EndOutcome.CANCELLED, ""),
        (TaskResult(Outcome.DIED, PLACE, reason="Killed."), False, EndOutcome.LOST, "Killed."),
        (TaskResult(Outcome.ERROR, PLACE, reason="No code."), False, EndOutcome.FAILED, "No code."),
    ],
    ids=["succeeded", "failed", "cancelled", "died", "not begun"],
)
def test_the_end_of_a_run_is_told(
    result: TaskResult, is_cancelled: bool, outcome: EndOutcome, reason: str
) -> None:
    """As the worker sees it, with its place and its times."""
    (end,) = ended(result, is_cancelled=is_cancelled)
    assert (end.kind, end.outcome) == ("runs", outcome)
    assert reason in end.reason
    assert bool(reason) == bool(end.reason)
    assert (end.worker, end.host, end.slot) == (PLACE.worker, PLACE.host, PLACE.slot)
    assert end.sent_at is not None
    assert end.started_at is not None
    assert end.sent_at <= end.started_at <= end.ended_at <= time.time()


def test_what_goes_on_elsewhere_has_not_ended() -> None:
    """On another worker, or in another process of the run; and a step is told by its run."""
    assert ended(TaskResult(Outcome.REFUSED, PLACE, reason="Another instance.")) == []
    assert ended(TaskResult(Outcome.DIED, PLACE, exit_code=EXIT_SUPERSEDED)) == []
    assert ended(TaskResult(Outcome.FINISHED, PLACE), task=STEP_TASK) == []


def test_a_run_that_had_no_child_never_started() -> None:
    (end,) = ended(TaskResult(Outcome.ERROR, PLACE, reason="No child."), begins=False)
    assert end.started_at is None
