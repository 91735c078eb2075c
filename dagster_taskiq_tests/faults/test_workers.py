"""A worker dies or is frozen: its steps end in time, and no attempt runs twice."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from dagster_taskiq_tests.acceptance.harness import BrokerKind, is_running, open_stack, until
from dagster_taskiq_tests.faults.checks import (
    LEASE_SECONDS,
    LONG_SECONDS,
    SLACK_SECONDS,
    STEP_FAILURE,
    TEST_SECONDS,
    UP_FOR_RETRY,
    await_crowd,
    await_ends,
    check_crowd,
    check_each_once,
    executions,
    fatal_worker,
    start,
    wall_time_of,
)
from dagster_taskiq_tests.faults.jobs import CROWD_RUNNING, DEATH_POINTS

pytestmark = pytest.mark.timeout(TEST_SECONDS)

#: Every kind of server between run and worker.
KINDS: tuple[BrokerKind, ...] = ("redis", "embedded", "rabbitmq")


@pytest.mark.parametrize("kind", [*KINDS, "redis+postgres"])
def test_a_worker_is_killed(kind: BrokerKind, tmp_path: Path) -> None:
    """All that it had started dies at once, and its steps are lost within lease + 5 s.

    The steps have started processes of their own, and one of them holds Python's lock.
    """
    with open_stack(kind, tmp_path) as stack:
        first = stack.worker(slots=3).await_ready()
        run = start(stack, "crowd")
        pids = await_crowd(run)
        below = [process.pid for process in first.descendants()]
        assert set(pids) <= set(below)
        first.kill()
        killed_at = time.time()
        await_ends(below, SLACK_SECONDS)
        stack.worker(slots=3).await_ready()
        check_crowd(run.wait(LONG_SECONDS))
        for step in CROWD_RUNNING:
            waited = wall_time_of(run, (UP_FOR_RETRY, STEP_FAILURE), step) - killed_at
            assert waited <= LEASE_SECONDS + 5 + SLACK_SECONDS


@pytest.mark.parametrize("kind", [*KINDS, "rabbitmq+postgres", "postgres"])
def test_a_worker_is_killed_at_a_certain_point(kind: BrokerKind, tmp_path: Path) -> None:
    """Before the step has begun, it runs elsewhere; after its end, that counts. Once, either way.

    One worker dies when it has taken a message, one when it has claimed the task, one when it has
    acked, and one when the step has ended and the result is not stored; none uses up a retry.
    """
    with open_stack(kind, tmp_path) as stack:
        victims = {
            point: fatal_worker(stack, point, slots=1, queues=[point]) for point in DEATH_POINTS
        }
        run = start(stack, "one_for_each_death")
        for point, worker in victims.items():
            assert worker.wait(LONG_SECONDS) == -signal.SIGKILL, worker.log
            assert "Traceback" not in worker.log, point
        assert executions(run) == {("ended", 1): 1}
        stack.worker(slots=2, queues=DEATH_POINTS).await_ready()
        check_each_once(run.wait(LONG_SECONDS), DEATH_POINTS)


def test_claims_vanish(tmp_path: Path) -> None:
    """Keys that are deleted, as a stepped clock would: no attempt runs beside its retry.

    The steps' worker lives, and has stopped them when they are judged.
    """
    with open_stack("redis", tmp_path) as stack:
        stack.worker(slots=3).await_ready()
        run = start(stack, "crowd")
        pids = await_crowd(run)
        with stack.redis() as server:
            claims = list(server.scan_iter(f"{stack.prefix}:claim:*", count=1000))
            assert server.delete(*claims) == len(CROWD_RUNNING)
        judgements = (UP_FOR_RETRY, STEP_FAILURE)
        until(lambda: any(run.steps(kind) for kind in judgements), "its steps are judged")
        assert not any(map(is_running, pids)), "judged while they were running"
        check_crowd(run.wait(LONG_SECONDS))


def test_a_worker_is_frozen_for_longer_than_its_lease(tmp_path: Path) -> None:
    """Its steps are dead before anybody judges, its results are refused, the retries' stand.

    The broker has no part in it, since the messages are acked, so one is enough.
    """
    with open_stack("redis", tmp_path) as stack:
        frozen = stack.worker(slots=3).await_ready()
        run = start(stack, "crowd")
        pids = await_crowd(run)
        frozen.process.send_signal(signal.SIGSTOP)
        judgements = (UP_FOR_RETRY, STEP_FAILURE)
        until(lambda: any(run.steps(kind) for kind in judgements), "its steps are judged")
        assert not any(map(is_running, pids)), "judged while they were running"
        other = stack.worker(slots=3).await_ready()
        run.await_notes("ran", 5)  # the retries have begun
        frozen.process.send_signal(signal.SIGCONT)
        check_crowd(run.wait(LONG_SECONDS))
        until(lambda: frozen.log.count("was refused") == 3, "its results are refused")
        other.terminate()
        assert other.wait() == 0
        # the one that was frozen goes on at full width
        again = start(stack, "varied")
        again.await_notes("ran", 3)
        again.open_gate()
        check_each_once(again.wait(), {note.step for note in again.notes("ran")})
