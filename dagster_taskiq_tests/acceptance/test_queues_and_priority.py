"""Which worker takes a step, in which order, and how many at once."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from dagster import DagsterEventType, DagsterRunStatus

from dagster_taskiq_tests.acceptance.harness import (
    BrokerKind,
    Note,
    Run,
    Stack,
    open_stack,
    until,
)
from dagster_taskiq_tests.acceptance.jobs import POOL, PRIORITY_TAGS

#: What each step of ``prioritized`` is sent with, when its run adds nothing.
PRIORITIES = {
    "low_1": 1,
    "default_1": 5,
    "high_1": 9,
    "celery_high": 8,
    "low_2": 1,
    "ours_wins": 2,
    "default_2": 5,
    "high_2": 9,
    "clamped_low": 0,
    "clamped_high": 10,
}
assert list(PRIORITIES) == list(PRIORITY_TAGS)


def sent_to(run: Run) -> dict[str, str]:
    """The queue that each step was sent to, by the loop's events."""
    found = {}
    for event in run.events(DagsterEventType.ENGINE_EVENT):
        metadata = event.engine_event_data.metadata
        if (event.message or "").startswith("Sending step"):
            found[str(event.step_key)] = str(metadata["queue"].value)
    return found


def taken_by(run: Run) -> dict[str, tuple[str, str]]:
    """The worker and the queue that each step was taken by and from, by the workers' events."""
    found = {}
    for event in run.events(DagsterEventType.ENGINE_EVENT):
        metadata = event.engine_event_data.metadata
        if (event.message or "").startswith("Executing step"):
            found[str(event.step_key)] = (metadata["worker"].value, metadata["queue"].value)
    return found


# --- queues -------------------------------------------------------------------------------------


def test_queue_tags(stack: Stack) -> None:
    """A step goes to the queue of its tag, ours before dagster-celery's, and is taken there."""
    first = stack.worker(queues=["ours"], name="first")
    second = stack.worker(queues=["theirs", "dagster"], name="second")
    first.await_ready()
    second.await_ready()
    run = stack.run("routed")
    assert run.is_success
    assert sent_to(run) == {
        "untagged": "dagster",
        "ours": "ours",
        "theirs": "theirs",
        "both": "ours",
    }
    assert taken_by(run) == {
        "untagged": (second.full_name, "dagster"),
        "ours": (first.full_name, "ours"),
        "theirs": (second.full_name, "theirs"),
        "both": (first.full_name, "ours"),
    }


def test_queue_of_the_run_and_of_the_settings(stack: Stack) -> None:
    """A step without a tag goes to its run's queue, else the settings', dagster-celery's aside."""
    stack.worker(queues=["ours", "theirs", "of-run", "of-settings", "dagster"]).await_ready()
    of_run = stack.run("routed", tags={"dagster-taskiq/queue": "of-run"}, default_queue="nobody's")
    assert of_run.is_success
    assert sent_to(of_run)["untagged"] == "of-run"
    assert sent_to(of_run)["theirs"] == "theirs"
    of_settings = stack.run(
        "routed", tags={"dagster-celery/queue": "of-run"}, default_queue="of-settings"
    )
    assert of_settings.is_success
    assert sent_to(of_settings)["untagged"] == "of-settings"


def test_a_worker_serves_all_its_queues(stack: Stack) -> None:
    """``-q a -q b`` listens on both, of which dagster-celery forgets the first."""
    worker = stack.worker(queues=["ours", "theirs"]).await_ready()
    run = stack.run("routed", op_selection=["ours", "theirs"])
    assert run.is_success
    assert {name for name, _ in taken_by(run).values()} == {worker.full_name}
    assert {queue for _, queue in taken_by(run).values()} == {"ours", "theirs"}


@pytest.mark.parametrize("kind", ["redis", "rabbitmq"])
def test_a_queue_that_nobody_serves(kind: BrokerKind, tmp_path: Path) -> None:
    """The run's log names the queue and those that are served; a worker for it ends the wait."""
    with open_stack(kind, tmp_path) as stack:
        stack.worker(queues=["theirs", "dagster"]).await_ready()
        run = stack.start("routed")
        message = run.await_message("No worker listens on queue")
        assert '"ours"' in message
        assert "dagster, theirs" in message
        # a queue of RabbitMQ cannot be looked into
        where = r"It has place \d of \d" if kind == "redis" else r"\d tasks? waits?"
        assert re.search(rf" {where} in the queue\.$", message)
        # once for each step that waits there
        assert sorted(run.kinds("untagged")) == ["START", "SUCCESS"]
        stack.worker(queues=["ours"]).await_ready()
        assert run.wait().is_success
        unserved = [text for text in run.messages() if "No worker listens" in text]
        assert len(unserved) == 2


# --- priority -----------------------------------------------------------------------------------


def sent_order(run: Run) -> list[str]:
    """The steps of a run in the order in which they were sent."""
    return list(sent_to(run))


def in_order(sent: Sequence[tuple[str, str, int]]) -> list[tuple[str, str]]:
    """Run and step of what was sent, higher priority first, first in first out within one."""
    return [(run, step) for run, step, _ in sorted(sent, key=lambda item: -item[2])]


@pytest.mark.parametrize("kind", ["redis", "valkey", "rabbitmq"])
def test_priority(kind: BrokerKind, tmp_path: Path) -> None:
    """One slot takes the steps of several runs by run + step priority, then first come."""
    with open_stack(kind, tmp_path) as stack:
        stack.worker(slots=1).await_ready()
        blocker = stack.start("blocker")
        blocker.await_notes("started")
        first = stack.start("prioritized")
        until(lambda: asyncio.run(stack.depth("dagster")) == 10, "the first run's steps wait")
        second = stack.start("prioritized", tags={"dagster-taskiq/run_priority": "2"})
        until(lambda: asyncio.run(stack.depth("dagster")) == 20, "the second run's steps wait")
        blocker.open_gate()
        assert first.wait().is_success
        assert second.wait().is_success
        assert blocker.wait().is_success
        sent = [
            *((first.run_id, step, PRIORITIES[step]) for step in sent_order(first)),
            *((second.run_id, step, added(PRIORITY_TAGS[step], 2)) for step in sent_order(second)),
        ]
        assert [(note.run, note.step) for note in stack.notes("ran")] == in_order(sent)


def added(tags: dict[str, str], run_priority: int) -> int:
    """What a step is sent with whose run adds to its priority."""
    own = tags.get("dagster-taskiq/priority") or tags.get("dagster-celery/priority") or "5"
    return max(0, min(10, int(own) + run_priority))


def test_celery_run_priority(shared: Stack) -> None:
    """``dagster-celery/run_priority`` counts like ours; the loop's events say what came of it."""
    run = shared.run("prioritized", tags={"dagster-celery/run_priority": "-3"})
    assert run.is_success
    priorities = {
        str(event.step_key): event.engine_event_data.metadata["priority"].value
        for event in run.events(DagsterEventType.ENGINE_EVENT)
        if "priority" in event.engine_event_data.metadata
    }
    assert priorities == {step: added(tags, -3) for step, tags in PRIORITY_TAGS.items()}


def test_dagster_priority_alone_is_pointed_out(shared: Stack) -> None:
    """A step with only Dagster's own priority tag is named in a warning, once for the run."""
    run = shared.run("prioritized")
    warnings = [entry.user_message for entry in run.logs() if "dagster/priority" in entry.message]
    assert len(warnings) == 1
    assert "default_2" in warnings[0]


def test_a_priority_that_is_no_number(shared: Stack) -> None:
    """The run fails with a sentence that names the tag and its value."""
    run = shared.run("bad_priority")
    assert run.status is DagsterRunStatus.FAILURE
    (event,) = run.events(DagsterEventType.RUN_FAILURE)
    error = event.job_failure_data.error
    assert error is not None
    assert "'dagster-taskiq/priority' has the value 'very'" in error.to_string()


# --- limits -------------------------------------------------------------------------------------


def most_at_once(notes: Sequence[Note], steps: str = "") -> int:
    """How many of the steps, by the start of their name, were seen at work at the same time."""
    count = most = 0
    for note in sorted(notes, key=lambda item: item.time):
        if note.step.startswith(steps):
            count += {"started": 1, "ended": -1}[note.kind]
            most = max(most, count)
    return most


def test_max_concurrent(shared: Stack) -> None:
    """No more steps of a run than this are at work at once, however many slots there are."""
    run = shared.run("overlaps", max_concurrent=1)
    assert run.is_success
    assert most_at_once(run.notes()) == 1
    assert len(run.notes("ended")) == 4


def test_tag_concurrency_limits(shared: Stack) -> None:
    """No more steps with a tag than its limit are at work at once; others are free."""
    limits = [{"key": "db", "value": "small", "limit": 1}]
    run = shared.start("two_kinds", tag_concurrency_limits=limits)
    started = run.await_notes("started", 2)
    assert sorted(note.step.split("_")[0] for note in started) == ["small", "unlimited"]
    run.open_gate()
    assert run.wait().is_success
    assert most_at_once(run.notes(), "small") == 1


def pool_is_free(stack: Stack) -> bool:
    """Whether no step holds or awaits a slot of the pool."""
    info = stack.instance.event_log_storage.get_concurrency_info(POOL)
    return info.active_slot_count == 0 and info.pending_step_count == 0


@pytest.fixture
def pooled(shared: Stack) -> Stack:
    """The shared stack, with one slot in the pool."""
    shared.instance.event_log_storage.set_concurrency_slots(POOL, 1)
    return shared


def test_pool(pooled: Stack) -> None:
    """Steps of a pool wait for each other, within a run and across two, and leave it free."""
    # the pool is held until all wait: Dagster's claim of a free slot is not atomic, so that of two
    # runs that ask for it at the same instant both may get it
    holder = pooled.start("pool_gated")
    holder.await_notes("started")
    runs = [pooled.start("pools"), pooled.start("pools")]
    storage = pooled.instance.event_log_storage
    until(lambda: storage.get_concurrency_info(POOL).pending_step_count == 6, "all steps wait")
    holder.open_gate()
    assert holder.wait().is_success
    for run in runs:
        assert run.wait(90).is_success
    both = [note for run in runs for note in run.notes()]
    assert most_at_once(both) == 1
    assert len(both) == 12
    assert pool_is_free(pooled)


def test_pool_after_failures(pooled: Stack) -> None:
    """A step that raised and one whose process died have both left the pool."""
    run = pooled.run("pool_failures")
    assert run.status is DagsterRunStatus.FAILURE
    assert set(run.steps(DagsterEventType.STEP_FAILURE)) == {"pooled_failure", "pooled_exit"}
    assert pool_is_free(pooled)


def test_pool_after_a_cancel(pooled: Stack) -> None:
    """A cancelled step has left the pool when its run is over."""
    run = pooled.start("pool_gated")
    run.await_notes("started")
    pooled.instance.report_run_canceling(pooled.instance.get_run_by_id(run.run_id))
    run.signal()
    assert run.wait().status is DagsterRunStatus.CANCELED
    assert pool_is_free(pooled)


def test_pool_slot_of_a_queued_step_after_a_cancel(stack: Stack) -> None:
    """A step that had its pool slot and was still queued gives it back when it is cancelled."""
    stack.instance.event_log_storage.set_concurrency_slots(POOL, 1)
    run = stack.start("pool_gated")
    until(lambda: asyncio.run(stack.depth("dagster")) == 1, "the step waits")
    stack.instance.report_run_canceling(stack.instance.get_run_by_id(run.run_id))
    run.signal()
    assert run.wait().status is DagsterRunStatus.CANCELED
    assert run.kinds("pooled_gated") == []
    assert pool_is_free(stack)
