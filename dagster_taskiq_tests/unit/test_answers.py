"""Whether a task came to a good end, as its worker counts it."""

from __future__ import annotations

from typing import Any

import pytest

from dagster_taskiq.messages.results import NOWHERE, Outcome, TaskResult
from dagster_taskiq.worker.answers import has_failed


@pytest.mark.parametrize(
    ("step_end", "expected"),
    [
        ("success", False),
        ("skipped", False),
        ("failure", True),
        ("up_for_retry", True),
        ("", False),
    ],
)
def test_a_steps_events_say_how_it_ended(step_end: str, expected: bool) -> None:
    assert has_failed(TaskResult(Outcome.FINISHED, NOWHERE), step_end) is expected


@pytest.mark.parametrize(
    ("outcome", "more", "expected"),
    [
        (Outcome.FINISHED, {}, False),
        (Outcome.FINISHED, {"exit_code": 0}, False),
        (Outcome.FINISHED, {"exit_code": 1}, True),
        (Outcome.FINISHED, {"error": {"message": "stopped"}}, True),
        (Outcome.ERROR, {}, True),
        (Outcome.DIED, {"exit_code": -9}, True),
        (Outcome.UNLOGGED, {}, True),
        (Outcome.REFUSED, {"reason": "another instance"}, False),
        (Outcome.COPY, {}, False),
    ],
)
def test_other_ends(outcome: Outcome, more: dict[str, Any], expected: bool) -> None:
    assert has_failed(TaskResult(outcome, NOWHERE, **more), "") is expected
