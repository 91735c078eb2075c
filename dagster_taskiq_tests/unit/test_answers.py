"""Whether a task came to a good end, as its worker counts it."""

from __future__ import annotations

from typing import Any

import pytest
from dagster import job, op, success_hook
from dagster._core.events import DagsterEvent
from dagster._serdes import serialize_value

from dagster_taskiq.messages.results import NOWHERE, Outcome, TaskResult
from dagster_taskiq.worker.answers import has_failed


@success_hook
def hook(_: Any) -> None: ...


@op
def good() -> str:
    return '"event_type_value": "STEP_FAILURE"'


@op
def bad(_text: str) -> None:
    raise ValueError('"event_type_value": "STEP_SUCCESS"')


@job(hooks={hook})
def both() -> None:
    bad(good())


def events_of(step: str) -> tuple[str, ...]:
    events: list[DagsterEvent] = both.execute_in_process(raise_on_error=False).all_events
    return tuple(serialize_value(it) for it in events if it.step_key == step)


def test_a_steps_events_say_how_it_ended() -> None:
    """Whatever user code has written into them, and though a hook has written more behind."""
    for step, expected in (("good", False), ("bad", True)):
        events = events_of(step)
        assert len(events) > 2
        assert has_failed(TaskResult(Outcome.FINISHED, NOWHERE, events)) is expected
    retried = tuple(it.replace("STEP_FAILURE", "STEP_UP_FOR_RETRY") for it in events_of("bad"))
    assert has_failed(TaskResult(Outcome.FINISHED, NOWHERE, retried))


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
    assert has_failed(TaskResult(outcome, NOWHERE, **more)) is expected
