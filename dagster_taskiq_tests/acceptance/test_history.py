"""What has failed in the night, as the commands tell it."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest

from dagster_taskiq_tests.acceptance.harness import BrokerKind, Stack, open_stack

LEASE_SECONDS = 5.0


@pytest.fixture(params=["redis", "postgres"])
def stack(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    kind = cast("BrokerKind", request.param)
    with open_stack(kind, tmp_path_factory.mktemp("stack")) as stack:
        yield stack


def test_what_failed_in_the_night_is_told_in_the_morning(stack: Stack) -> None:
    """Who had it, and why it failed: by itself, tried again, lost with its worker, cancelled."""
    began_at = time.time()
    steady = stack.worker(name="steady").await_ready()
    doomed = stack.worker(name="doomed", queues=["doomed"], slots=1).await_ready()
    lost = stack.start("one_gated", default_queue="doomed", lease_seconds=LEASE_SECONDS)
    cancelled = stack.start("one_gated")
    failed = stack.start("retried", ops={"fails_at_first": {"config": {"failures": 3}}})
    lost.await_notes("started")
    doomed.kill()
    cancelled.await_notes("started")
    cancelled.signal(signal.SIGTERM)
    for run in (cancelled, failed, lost):
        run.wait()
    bad, all_ended = tasks(stack, "failed,lost"), tasks(stack, "ended")
    assert {key: (it["state"], it["is_retried"], it["worker"]) for key, it in bad.items()} == {
        (lost.run_id, 1): ("lost", False, doomed.full_name),
        (failed.run_id, 1): ("failed", True, steady.full_name),
        (failed.run_id, 2): ("failed", True, steady.full_name),
        (failed.run_id, 3): ("failed", False, steady.full_name),
    }
    assert "lease" in bad[lost.run_id, 1]["reason"]
    assert bad[failed.run_id, 3]["reason"] == "ValueError: attempt 3"
    for task in bad.values():
        assert began_at <= task["sent_at"] <= task["started_at"] <= task["ended_at"] <= time.time()
    (key,) = all_ended.keys() - bad.keys()
    assert key == (cancelled.run_id, 1)
    assert (all_ended[key]["state"], all_ended[key]["worker"]) == ("cancelled", steady.full_name)
    said = call(stack, "task", "list", "--state", "failed,lost", "--since", "12h")
    assert said.count("failed, retried") == 2
    assert "\x1b" not in said
    run = json.loads(call(stack, "run", "show", failed.run_id[:8], "--json"))["run"]
    assert [it["attempt"] for it in run["ended"]] == [3, 2, 1]


def call(stack: Stack, *arguments: str) -> str:
    return stack.cli(*arguments, "-y", str(stack.settings_file()))


def tasks(stack: Stack, states: str) -> dict[tuple[str, int], dict[str, Any]]:
    """The tasks in some states, by run and attempt."""
    found = json.loads(call(stack, "task", "list", "--state", states, "--json"))["tasks"]
    return {(it["run_id"], it["attempt"]): it for it in found}
