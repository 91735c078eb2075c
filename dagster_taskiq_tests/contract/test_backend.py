"""What every backend promises: its operations are atomic, repeatable, and lose nothing.

The last part is a state machine: whatever order claims, ends of leases, results, cancels and
judgements come in, a task is granted at most once unless it was reopened, and no result is stored
by a worker that does not hold the claim.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dagster_taskiq.backend import Backend, Claim, ClaimAnswer, TaskReport, TaskState
from dagster_taskiq.errors import SupersededLoopError, UnreachableServerError
from dagster_taskiq.messages.attempt_ends import HistoryBatch
from dagster_taskiq.messages.queue_pauses import QueuePause
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.messages.withheld_steps import Withheld
from dagster_taskiq.messages.worker_records import RunningTask, WorkerRecord
from dagster_taskiq_tests.contract.backend_bench import (
    KINDS,
    LONG_LEASE,
    PATIENCE_SECONDS,
    SHORT_LEASE,
    Bench,
    Kind,
    PrivateHarness,
    an_end,
    private_bench,
    record,
    shared_bench,
)

T = TypeVar("T")


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Of the server; pytest goes through the module with one after the other."""
    return cast("Kind", request.param)


@pytest.fixture
def empty(kind: Kind) -> Iterator[Bench]:
    """No run is open."""
    with shared_bench(kind) as bench:
        yield bench


@pytest.fixture
def bench(empty: Bench) -> Bench:
    """With an open run."""
    empty.open_run()
    return empty


# --- claims ---


def test_a_claim_is_granted_and_seen(bench: Bench) -> None:
    """The loop sees who has the task, and for how long by the server's clock."""
    claim = bench.claimed()
    report = bench.report(claim.task_id)
    assert (report.state, report.place) == (TaskState.CLAIMED, claim.place)
    assert 0 < report.lease_left_seconds <= claim.lease_seconds
    later = bench.report(claim.task_id)
    assert later.lease_left_seconds <= report.lease_left_seconds
    assert bench.renew(claim).is_held
    assert bench.report(claim.task_id).lease_left_seconds > claim.lease_seconds / 2


def test_two_workers_claim_one_task(bench: Bench) -> None:
    """One wins, the other is told so; also when both ask at once, many times."""

    async def race(one: Claim, other: Claim) -> Sequence[ClaimAnswer]:
        return await asyncio.gather(
            bench.backend.claim(one, needs_live_run=True),
            second.claim(other, needs_live_run=True),
        )

    second = bench.open()
    for _ in range(50):
        one = bench.new_claim()
        answers = bench.call(race(one, bench.new_claim(one.task_id)))
        assert sorted(answers) == [ClaimAnswer.CLAIMED, ClaimAnswer.GRANTED]


def test_a_claim_may_be_repeated(bench: Bench) -> None:
    """When its answer was lost, the same claim is granted again, for another whole lease."""
    claim = bench.claimed()
    wait_until(lambda: bench.report(claim.task_id).lease_left_seconds < LONG_LEASE - 0.1)
    left = bench.report(claim.task_id).lease_left_seconds
    assert bench.claim(claim) is ClaimAnswer.GRANTED
    assert bench.report(claim.task_id).lease_left_seconds > left
    assert bench.complete(claim)
    assert bench.claim(claim) is ClaimAnswer.DONE


def test_a_lease_ends(bench: Bench) -> None:
    """Without renewal the claim is over: nobody else gets the task, and no result is taken."""
    claim = bench.claimed(lease_seconds=SHORT_LEASE)
    wait_until(lambda: bench.state(claim.task_id) is TaskState.EXPIRED)
    assert bench.claim(bench.new_claim(claim.task_id)) is ClaimAnswer.CLAIMED
    assert bench.claim(claim) is ClaimAnswer.CLAIMED
    assert not bench.renew(claim).is_held
    assert not bench.complete(claim)
    assert bench.read(claim.task_id) == {}
    assert bench.state(claim.task_id) is TaskState.EXPIRED


def test_renewals_keep_a_claim(bench: Bench) -> None:
    """A renewed claim outlives its first lease, and all are renewed in one call in their order."""
    lasting, ended = bench.claimed(lease_seconds=1), bench.claimed(lease_seconds=SHORT_LEASE)
    wait_until(lambda: bench.state(ended.task_id) is TaskState.EXPIRED)
    for _ in range(24):
        first, second, third = bench.call(bench.backend.renew([lasting, ended, lasting]))
        assert first.is_held
        assert not second.is_held
        assert third.is_held
        bench.harness.sleep(0.05)
    assert bench.complete(lasting)
    assert not bench.renew(lasting).is_held


def test_nothing_to_renew(bench: Bench) -> None:
    """An idle worker may ask all the same."""
    assert bench.call(bench.backend.renew([])) == []


def test_a_renewal_says_what_the_worker_must_know(bench: Bench) -> None:
    """Whether it is cancelled, whether its run has a loop, whether that may come back."""
    claim = bench.claimed()
    renewal = bench.renew(claim)
    assert renewal.is_held
    assert renewal.is_run_alive
    assert not renewal.is_resumable
    assert renewal.cancel_order is None
    assert renewal.epoch == bench.epoch
    assert bench.cancel(claim.task_id) == [TaskState.CLAIMED]
    assert bench.renew(claim).cancel_order == "enough"
    bench.close_run()
    assert not bench.renew(claim).is_run_alive


def test_a_run_that_may_be_resumed_says_so(empty: Bench) -> None:
    """Its steps wait for the next loop, until the run was closed in order."""
    empty.open_run(is_resumable=True, lease_seconds=SHORT_LEASE)
    claim = empty.new_claim()
    assert empty.claim(claim, needs_live_run=False) is ClaimAnswer.GRANTED
    wait_until(lambda: not empty.renew(claim).is_run_alive)
    assert empty.renew(claim).is_resumable
    empty.open_run(is_resumable=True)
    assert empty.renew(claim).is_run_alive
    empty.close_run()
    assert not empty.renew(claim).is_resumable


def test_a_run_that_is_disowned_is_not_resumed(empty: Bench) -> None:
    """Whatever its loop says while it lives, once it is dead its steps are not kept for another."""
    empty.open_run(is_resumable=True)
    claim = empty.claimed()
    assert empty.renew(claim).is_resumable
    for _ in range(2):
        empty.disown_run()
    assert not empty.renew(claim).is_resumable
    assert empty.renew_run() == empty.epoch
    assert empty.renew(claim).is_run_alive
    empty.harness.expire_loop(empty.run_id)
    renewal = empty.renew(claim)
    assert (renewal.is_run_alive, renewal.is_resumable) == (False, False)


def test_a_disowned_run_that_is_opened_again_may_be_resumed(empty: Bench) -> None:
    """The word was about the former loop; also where it came before any."""
    empty.disown_run()
    empty.open_run(is_resumable=True)
    claim = empty.claimed()
    assert empty.renew(claim).is_resumable
    empty.disown_run()
    empty.open_run(is_resumable=True, generation=1)
    assert empty.renew(claim).is_resumable


def test_a_loop_that_has_closed_its_run_does_not_revive_it(empty: Bench) -> None:
    """A renewal that its close has overtaken comes too late; the next loop's do not."""
    empty.open_run()
    other = empty.open()
    mine, empty.backend = empty.backend, other
    empty.open_run()
    empty.close_run()
    empty.backend = mine
    assert empty.renew_run() is None
    assert empty.claim(empty.new_claim()) is ClaimAnswer.RUN_GONE
    empty.backend = other
    empty.open_run(generation=1)
    assert empty.renew_run() == empty.epoch
    assert empty.claim(empty.new_claim()) is ClaimAnswer.GRANTED


def test_no_step_starts_without_a_living_run(empty: Bench) -> None:
    """Before it is opened, after its lease, after it was closed; a run's own task needs none."""
    empty.open_run()
    empty.close_run()
    assert empty.claim(empty.new_claim()) is ClaimAnswer.RUN_GONE
    assert empty.claim(empty.new_claim(), needs_live_run=False) is ClaimAnswer.GRANTED
    empty.open_run(lease_seconds=SHORT_LEASE)
    wait_until(lambda: empty.claim(empty.new_claim()) is ClaimAnswer.RUN_GONE)
    refused = empty.new_claim()
    assert empty.claim(refused) is ClaimAnswer.RUN_GONE
    empty.open_run()
    assert empty.claim(refused) is ClaimAnswer.GRANTED


def test_what_a_worker_has_dropped_is_known(empty: Bench) -> None:
    """Its message is gone, so a loop that lives after all must not wait for it; it may be sent."""
    empty.open_run(lease_seconds=30)
    empty.close_run()
    claim = empty.new_claim()
    assert empty.claim(claim) is ClaimAnswer.RUN_GONE
    assert empty.state(claim.task_id) is TaskState.DROPPED
    empty.open_run(generation=1)
    assert empty.state(claim.task_id) is TaskState.DROPPED
    assert empty.reopen(claim.task_id)
    assert empty.state(claim.task_id) is TaskState.UNKNOWN
    for _ in range(2):  # also a copy that is dropped late
        empty.close_run()
        assert empty.claim(claim) is ClaimAnswer.RUN_GONE
        empty.open_run(generation=1)
    assert empty.claim(claim) is ClaimAnswer.GRANTED
    assert empty.state(claim.task_id) is TaskState.CLAIMED


def test_a_launched_run_is_free_until_it_has_begun(empty: Bench) -> None:
    """It waits for the claim's end, not for its loop, which is not there yet."""
    first, second, third = (empty.new_claim("run-task") for _ in range(3))
    assert claim_until_begun(empty, first) is ClaimAnswer.GRANTED
    assert claim_until_begun(empty, second) is ClaimAnswer.PENDING
    empty.expire(first)
    assert empty.state("run-task") is TaskState.EXPIRED
    assert claim_until_begun(empty, second) is ClaimAnswer.GRANTED
    assert not empty.renew(first).is_held
    assert not empty.complete(first)
    empty.begin(first)  # too late: it is not his any more
    assert claim_until_begun(empty, third) is ClaimAnswer.PENDING
    for _ in range(2):
        empty.begin(second)
    assert claim_until_begun(empty, third) is ClaimAnswer.CLAIMED
    empty.expire(second)
    assert claim_until_begun(empty, third) is ClaimAnswer.CLAIMED
    assert empty.state("run-task") is TaskState.EXPIRED


def test_a_launched_run_that_is_reopened_has_not_begun(empty: Bench) -> None:
    """It is as new, and free again until it begins."""
    first, second, third = (empty.new_claim("run-task") for _ in range(3))
    assert claim_until_begun(empty, first) is ClaimAnswer.GRANTED
    empty.begin(first)
    empty.expire(first)
    assert empty.reopen("run-task")
    assert claim_until_begun(empty, second) is ClaimAnswer.GRANTED
    assert claim_until_begun(empty, third) is ClaimAnswer.PENDING
    empty.expire(second)
    assert claim_until_begun(empty, third) is ClaimAnswer.GRANTED


def test_a_launched_run_that_ended_before_it_began(empty: Bench) -> None:
    """Its end, whatever it was, counts as one; so does its cancel."""
    ended, cancelled = empty.new_claim(), empty.new_claim()
    assert claim_until_begun(empty, ended) is ClaimAnswer.GRANTED
    assert empty.complete(ended)
    assert claim_until_begun(empty, empty.new_claim(ended.task_id)) is ClaimAnswer.DONE
    assert empty.cancel(cancelled.task_id) == [TaskState.CANCELLED]
    assert claim_until_begun(empty, cancelled) is ClaimAnswer.CANCELLED


def test_a_claim_that_is_released_is_over(empty: Bench) -> None:
    """A launched run is free at once, a step for its loop to judge; nobody ends another's."""
    first, second = (empty.new_claim("run") for _ in range(2))
    assert claim_until_begun(empty, first) is ClaimAnswer.GRANTED
    empty.release(second)
    assert claim_until_begun(empty, second) is ClaimAnswer.PENDING
    empty.release(first)
    assert claim_until_begun(empty, second) is ClaimAnswer.GRANTED
    empty.release(first)
    assert empty.state("run") is TaskState.CLAIMED
    empty.open_run()
    step = empty.claimed()
    empty.release(step)
    assert empty.state(step.task_id) is TaskState.EXPIRED
    assert not empty.renew(step).is_held
    assert not empty.complete(step)


def claim_until_begun(bench: Bench, claim: Claim) -> ClaimAnswer:
    return bench.claim(claim, needs_live_run=False, until_begun=True)


# --- results ---


def test_a_result_arrives_with_the_claims_end(bench: Bench) -> None:
    """It wakes the loop, is stored, ends the claim and leaves a tombstone."""
    claim = bench.claimed()
    assert bench.complete(claim, b"\x00any bytes\xff")
    assert bench.results() == {claim.task_id: b"\x00any bytes\xff"}
    assert bench.read(claim.task_id) == {claim.task_id: b"\x00any bytes\xff"}
    assert bench.state(claim.task_id) is TaskState.DONE
    assert bench.claim(bench.new_claim(claim.task_id)) is ClaimAnswer.DONE


def test_a_waiting_loop_is_woken_at_once(bench: Bench) -> None:
    """By push: it does not look again and again."""

    async def wait_and_complete() -> tuple[dict[str, bytes], float]:
        waiting = asyncio.ensure_future(bench.backend.wait_for_results(bench.run_id, 20))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        began = time.monotonic()
        assert await other.complete(claim, b"x", expires_seconds=60)
        return await waiting, time.monotonic() - began

    claim, other = bench.claimed(), bench.open()
    found, seconds = bench.call(wait_and_complete())
    assert found == {claim.task_id: b"x"}
    assert seconds < 1


@pytest.mark.parametrize("timeout_seconds", [0, 0.0001, 0.05])
def test_waiting_ends_with_the_timeout(bench: Bench, timeout_seconds: float) -> None:
    """Also a wait for no time: it looks, and does not wait for ever."""
    began = time.monotonic()
    assert bench.results(timeout_seconds) == {}
    assert bench.control("nobody", timeout_seconds) == []
    assert time.monotonic() - began < 5


def test_a_completion_may_be_repeated(bench: Bench) -> None:
    """When its answer was lost, it is said to be stored, and nothing is stored twice."""
    claim = bench.claimed()
    assert bench.complete(claim, b"first")
    assert bench.complete(claim, b"second")
    assert bench.results() == {claim.task_id: b"first"}
    assert bench.results(0.01) == {}


def test_many_results_arrive_together(bench: Bench) -> None:
    """Each once, more than one batch of them."""
    claims = [bench.new_claim() for _ in range(700)]

    async def work() -> None:
        for start in range(0, len(claims), 100):
            part = claims[start : start + 100]
            await asyncio.gather(
                *(bench.backend.claim(claim, needs_live_run=True) for claim in part)
            )
            done = [
                bench.backend.complete(claim, claim.task_id.encode(), expires_seconds=60)
                for claim in part
            ]
            assert all(await asyncio.gather(*done))

    bench.call(work())
    found: dict[str, bytes] = {}
    rounds = 0
    while len(found) < len(claims):
        arrived = bench.results()
        assert not set(arrived) & set(found)
        found |= arrived
        rounds += 1
    assert found == {claim.task_id: claim.task_id.encode() for claim in claims}
    assert rounds <= 5


def test_runs_do_not_see_each_others_results(bench: Bench) -> None:
    """Each has a mailbox of its own."""
    claim = bench.claimed()
    assert bench.complete(claim)
    mine, bench.run_id = bench.run_id, uuid.uuid4().hex
    bench.open_run()
    assert bench.results(0.01) == {}
    bench.run_id = mine
    assert bench.results() == {claim.task_id: b"result"}


def test_forgotten_results_leave_the_tombstone(bench: Bench) -> None:
    """They take no room any more, and the task still cannot run again."""
    claim = bench.claimed()
    bench.complete(claim)
    for _ in range(2):
        bench.forget_results(claim.task_id)
    assert bench.read(claim.task_id) == {}
    assert bench.state(claim.task_id) is TaskState.DONE
    assert bench.claim(bench.new_claim(claim.task_id)) is ClaimAnswer.DONE
    assert not bench.condemn(claim.task_id)
    assert not bench.reopen(claim.task_id)
    assert bench.complete(claim)
    assert bench.read(claim.task_id) == {}


def test_results_expire(bench: Bench) -> None:
    """Nobody need read them; and only that long."""
    claim = bench.claimed()
    bench.complete(claim, expires=1)
    bench.harness.sleep(1)
    wait_until(lambda: not bench.read(claim.task_id))
    assert bench.state(claim.task_id) is TaskState.DONE


def test_an_empty_result_is_one(bench: Bench) -> None:
    """The backend does not look into what it stores."""
    claim = bench.claimed()
    assert bench.complete(claim, b"")
    assert bench.read(claim.task_id) == {claim.task_id: b""}
    assert bench.results() == {claim.task_id: b""}


def test_reading_no_results(bench: Bench) -> None:
    """No ids, and ids without results."""
    assert bench.read() == {}
    assert bench.read("nothing") == {}
    bench.forget_results()


# --- cancel ---


def test_a_cancelled_task_is_never_claimed(bench: Bench) -> None:
    """What was unclaimed stays so; the answer to a repeated cancel is the same."""
    for _ in range(2):
        assert bench.cancel("task") == [TaskState.CANCELLED]
    assert bench.state("task") is TaskState.CANCELLED
    assert bench.claim(bench.new_claim("task")) is ClaimAnswer.CANCELLED
    assert not bench.reopen("task")


def test_the_holder_of_a_cancelled_task_is_told(bench: Bench) -> None:
    """By push, and at each renewal; its result is still taken, since it says how it ended."""
    claim = bench.claimed()
    for _ in range(2):
        assert bench.cancel(claim.task_id) == [TaskState.CLAIMED]
    first = bench.control(claim.place.worker_id)[0]
    assert first == b"enough"
    assert bench.renew(claim).cancel_order == "enough"
    assert bench.complete(claim)
    assert bench.cancel(claim.task_id) == [TaskState.DONE]


def test_an_expired_task_is_not_said_to_have_never_started(bench: Bench) -> None:
    """It may have: only an unclaimed one is CANCELLED, however often it is asked."""
    claim = bench.claimed()
    bench.expire(claim)
    for _ in range(2):
        assert bench.cancel(claim.task_id) == [TaskState.EXPIRED]
    assert bench.claim(bench.new_claim(claim.task_id)) is not ClaimAnswer.GRANTED
    assert not bench.complete(claim)
    assert not bench.reopen(claim.task_id)
    assert bench.condemn(claim.task_id)


def test_a_lost_task_is_not_said_to_have_never_started(bench: Bench) -> None:
    """Nor is a condemned one; its tombstone stays."""
    claim = bench.claimed()
    bench.expire(claim)
    assert bench.condemn(claim.task_id)
    assert bench.cancel(claim.task_id) == [TaskState.LOST]
    assert bench.state(claim.task_id) is TaskState.LOST


def test_many_tasks_are_cancelled_in_one_call(bench: Bench) -> None:
    """Of all kinds, with an answer for each in its place."""
    done, held, expired = bench.claimed(), bench.claimed(), bench.claimed()
    bench.complete(done)
    bench.expire(expired)
    others = [uuid.uuid4().hex for _ in range(1000)]
    answers = bench.cancel(*others, done.task_id, held.task_id, expired.task_id)
    assert answers[:1000] == [TaskState.CANCELLED] * 1000
    assert answers[1000:] == [TaskState.DONE, TaskState.CLAIMED, TaskState.EXPIRED]
    assert bench.cancel() == []


# --- judgement ---


def test_only_what_nobody_holds_can_be_condemned(bench: Bench) -> None:
    """Expired and vanished tasks can; claimed and done ones cannot; again is the same."""
    held, done, expired = bench.claimed(), bench.claimed(), bench.claimed()
    bench.complete(done)
    bench.expire(expired)
    assert not bench.condemn(held.task_id)
    assert not bench.condemn(done.task_id)
    for task_id in (expired.task_id, "vanished"):
        for _ in range(2):
            assert bench.condemn(task_id)
        assert bench.state(task_id) is TaskState.LOST
        assert bench.claim(bench.new_claim(task_id)) is ClaimAnswer.LOST
        assert not bench.reopen(task_id)
    assert bench.state(held.task_id) is TaskState.CLAIMED
    assert bench.complete(held)


def test_a_condemned_tasks_result_is_refused(bench: Bench) -> None:
    """The step's next attempt may be under way already."""
    claim = bench.claimed()
    bench.expire(claim)
    assert bench.condemn(claim.task_id)
    assert not bench.complete(claim)
    assert not bench.renew(claim).is_held
    assert bench.read(claim.task_id) == {}
    assert bench.results(0.01) == {}


def test_a_reopened_task_is_claimed_once_more(bench: Bench) -> None:
    """By a new claim; the old one is over."""
    claim = bench.claimed()
    assert not bench.reopen(claim.task_id)
    bench.expire(claim)
    for _ in range(2):
        assert bench.reopen(claim.task_id)
    assert bench.state(claim.task_id) is TaskState.UNKNOWN
    second = bench.claimed(claim.task_id)
    assert not bench.reopen(claim.task_id)
    assert bench.claim(claim) is ClaimAnswer.CLAIMED
    assert not bench.renew(claim).is_held
    assert not bench.complete(claim)
    assert bench.complete(second)
    assert not bench.reopen(claim.task_id)


def test_inspect_looks_at_a_thousand_tasks_in_one_call(bench: Bench) -> None:
    """Quickly, with the right answer for each."""
    held, done = bench.claimed(), bench.claimed()
    bench.complete(done)
    tasks = [uuid.uuid4().hex for _ in range(1000)]
    began = time.monotonic()
    epoch, reports = bench.call(
        bench.backend.inspect(bench.run_id, [*tasks, held.task_id, done.task_id])
    )
    assert time.monotonic() - began < 1
    assert epoch == bench.epoch
    assert len(reports) == 1002
    assert {reports[task].state for task in tasks} == {TaskState.UNKNOWN}
    assert reports[held.task_id].place == held.place
    assert reports[done.task_id] == TaskReport(TaskState.DONE)


def test_inspecting_nothing_gives_the_epoch(bench: Bench) -> None:
    """A loop without tasks in flight may ask for it."""
    assert bench.call(bench.backend.inspect(bench.run_id, [])) == (bench.epoch, {})


# --- the run's loops ---


def test_opening_a_run_may_be_repeated(empty: Bench) -> None:
    """By the same loop, when the answer was lost."""
    assert empty.open_run() == empty.open_run()


def test_a_second_loop_of_the_same_number_is_refused_while_the_first_lives(empty: Bench) -> None:
    """Afterwards it may begin, and then the first one is refused."""
    empty.open_run(token="one", lease_seconds=SHORT_LEASE)
    second = empty.open()
    first, empty.backend = empty.backend, second

    def is_open() -> bool:
        try:
            empty.open_run(token="two")
        except SupersededLoopError:
            return False
        return True

    wait_until(is_open)
    empty.backend = first
    assert empty.renew_run("one") is None
    with pytest.raises(SupersededLoopError, match=empty.run_id):
        empty.open_run(token="one")
    empty.backend = second
    assert empty.renew_run("two") == empty.epoch


def test_a_resumed_loop_takes_over_at_once(empty: Bench) -> None:
    """The number of the resumption decides, whoever is alive; lower ones are refused for good."""
    empty.open_run(token="old", generation=0)
    newer = empty.open()
    old, empty.backend = empty.backend, newer
    empty.open_run(token="new", generation=1)
    empty.backend = old
    assert empty.renew_run("old") is None
    with pytest.raises(SupersededLoopError):
        empty.open_run(token="old", generation=0)
    # an old loop that ends does not end the run of the new one
    empty.call(old.close_run(empty.run_id, token="old"))
    empty.backend = newer
    assert empty.renew_run("new") == empty.epoch
    assert empty.claim(empty.new_claim()) is ClaimAnswer.GRANTED
    empty.call(newer.close_run(empty.run_id, token="new"))
    empty.call(newer.close_run(empty.run_id, token="new"))
    empty.backend = old
    with pytest.raises(SupersededLoopError):
        empty.open_run(token="old", generation=0)


def test_tombstones_outlive_the_loop(bench: Bench) -> None:
    """A message redelivered after the run is recognised."""
    done = bench.claimed()
    bench.complete(done)
    bench.cancel("cancelled")
    bench.close_run()
    assert bench.claim(bench.new_claim(done.task_id)) is ClaimAnswer.DONE
    assert bench.claim(bench.new_claim("cancelled")) is ClaimAnswer.CANCELLED


# --- refusal ---


def test_a_refused_task_is_for_another_worker(bench: Bench) -> None:
    """Its loop is woken and told why; nobody may claim it before the loop has reopened it."""
    claim = bench.claimed()
    task_id = claim.task_id
    assert bench.refuse(claim)
    assert bench.refuse(claim), "an answer that was lost may be asked for again"
    assert bench.results() == {task_id: b"refused"}
    assert bench.state(task_id) is TaskState.REFUSED
    assert not bench.renew(claim).is_held
    assert bench.claim(bench.new_claim(task_id)) is ClaimAnswer.REFUSED
    assert not bench.condemn(task_id)
    for _ in range(2):
        assert bench.reopen(task_id)
    assert bench.read(task_id) == {}
    assert bench.state(task_id) is TaskState.UNKNOWN
    assert bench.complete(bench.claimed(task_id))
    assert not bench.reopen(task_id)
    assert bench.read(task_id) == {task_id: b"result"}


def test_a_refused_task_can_be_cancelled(bench: Bench) -> None:
    """It has never started, and never will."""
    claim = bench.claimed()
    assert bench.refuse(claim)
    assert bench.cancel(claim.task_id) == [TaskState.CANCELLED]
    assert bench.claim(bench.new_claim(claim.task_id)) is ClaimAnswer.CANCELLED
    assert not bench.reopen(claim.task_id)


def test_who_does_not_hold_a_task_cannot_refuse_it(bench: Bench) -> None:
    """A claim that has ended may be somebody else's by now."""
    claim = bench.claimed()
    bench.expire(claim)
    assert not bench.refuse(claim)


# --- workers and control ---


def test_workers_are_listed_by_name(bench: Bench) -> None:
    """As they last described themselves, until they sign off."""
    for worker_id in ("b", "a"):
        bench.call(bench.backend.heartbeat(record(worker_id), expires_seconds=30))
    bench.call(bench.backend.heartbeat(record("b", busy_slots=2), expires_seconds=30))
    assert bench.call(bench.backend.workers()) == [record("a"), record("b", busy_slots=2)]
    for _ in range(2):
        bench.call(bench.backend.goodbye("a"))
        assert bench.call(bench.backend.workers()) == [record("b", busy_slots=2)]


def test_a_silent_worker_leaves_the_list(bench: Bench) -> None:
    """Without heartbeats it is gone when its record expires."""
    bench.call(bench.backend.heartbeat(record("a"), expires_seconds=SHORT_LEASE))
    wait_until(lambda: bench.call(bench.backend.workers()) == [])


def test_a_worker_that_has_ended_without_a_word_is_lost(empty: Bench) -> None:
    """It does not count, and is shown as it was last, until it is heard of again or signs off."""
    bench = empty

    def listed() -> tuple[list[WorkerRecord], list[WorkerRecord]]:
        live = bench.call(bench.backend.workers())
        return live, bench.call(bench.backend.lost_workers())

    def beat(worker_id: str, expires_seconds: float) -> None:
        bench.call(bench.backend.heartbeat(record(worker_id), expires_seconds=expires_seconds))

    beat("b", LONG_LEASE)
    for worker_id in ("c", "a"):
        beat(worker_id, SHORT_LEASE)
    lost = [record(it, state="lost") for it in ("a", "c")]
    wait_until(lambda: listed() == ([record("b")], lost))
    bench.call(bench.backend.tidy())
    assert listed() == ([record("b")], lost)
    beat("a", LONG_LEASE)
    assert listed() == ([record("a"), record("b")], lost[1:])
    for worker_id in ("a", "c"):
        bench.call(bench.backend.goodbye(worker_id))
    assert listed() == ([record("b")], [])


def test_no_workers(empty: Bench) -> None:
    """On an empty server."""
    assert empty.call(empty.backend.workers()) == []
    assert empty.call(empty.backend.lost_workers()) == []


def test_workers_say_what_they_execute(empty: Bench) -> None:
    """What each said last, until it signs off or is silent for too long."""
    first, second = (RunningTask(f"t{n}", "run", "step", 1, "a", 1.5) for n in range(2))

    def beat(worker_id: str, *tasks: RunningTask, expires_seconds: float = LONG_LEASE) -> None:
        beating = empty.backend.heartbeat(
            record(worker_id), expires_seconds=expires_seconds, running=tasks
        )
        empty.call(beating)

    def told() -> list[RunningTask]:
        return sorted(empty.call(empty.backend.running()), key=lambda task: task.task_id)

    beat("a", first)
    assert told() == [first]
    beat("a")
    assert told() == []
    beat("a", first)
    beat("b", second)
    assert told() == [first, second]
    empty.call(empty.backend.goodbye("a"))
    assert told() == [second]
    beat("b", second, expires_seconds=SHORT_LEASE)
    wait_until(lambda: told() == [])


def test_runs_that_are_not_over_are_listed(empty: Bench) -> None:
    """With their loops, and those of their tasks that somebody has or that wait for a judgement."""
    bench, first = empty, empty.run_id
    bench.open_run(is_resumable=True)
    held, expired, done = (bench.claimed() for _ in range(3))
    bench.expire(expired)
    bench.complete(done)
    bench.run_id = second = str(uuid.uuid4())
    launched = bench.new_claim("launched")
    assert bench.claim(launched, needs_live_run=False, until_begun=True) is ClaimAnswer.GRANTED
    bench.run_id = str(uuid.uuid4())
    bench.open_run()
    bench.close_run()
    found = bench.call(bench.backend.runs())
    reports = {report.run_id: report for report in found}
    assert [report.run_id for report in found] == sorted([first, second])
    assert (reports[first].has_loop, reports[first].is_resumable) == (True, True)
    assert (reports[second].has_loop, reports[second].is_resumable) == (False, False)
    states = {key: report.state for key, report in reports[first].tasks.items()}
    assert states == {held.task_id: TaskState.CLAIMED, expired.task_id: TaskState.EXPIRED}
    assert reports[first].tasks[held.task_id].place == held.place
    assert reports[second].tasks["launched"].place == launched.place
    bench.run_id = first
    bench.close_run()
    bench.complete(held)
    bench.condemn(expired.task_id)
    (left,) = bench.call(bench.backend.runs())
    assert left.run_id == second


@pytest.mark.parametrize("key", [["k" * 32], []])
def test_records_are_verified(bench: Bench, key: list[str]) -> None:
    """By who has a key."""
    bench.call(bench.backend.heartbeat(record("a"), expires_seconds=30))
    reader = bench.open(Signer(key))
    (found,) = bench.call(reader.workers())
    assert found == record("a", is_trusted=not key)


def test_control_messages_arrive_once_in_order(bench: Bench) -> None:
    """Whether the worker waits already or not."""
    for number in range(3):
        bench.call(bench.backend.send_control("w", f"order {number}"))
    assert bench.control("w") == [b"order 0", b"order 1", b"order 2"]
    assert bench.control("w", 0.01) == []
    assert bench.control("other", 0.01) == []


def test_a_waiting_worker_gets_control_messages_at_once(bench: Bench) -> None:
    """By push."""

    async def wait_and_send() -> tuple[list[Any], float]:
        waiting = asyncio.ensure_future(bench.backend.wait_for_control("w", 20))
        await asyncio.sleep(0.05)
        began = time.monotonic()
        await bench.backend.send_control("w", "terminate")
        return await waiting, time.monotonic() - began

    messages, seconds = bench.call(wait_and_send())
    assert messages == [b"terminate"]
    assert seconds < 1


# --- which state it is ---


def test_who_shares_a_state_knows_it_by_one_name(kind: Kind) -> None:
    """Whatever becomes of its data; where a name would go with the data there is none."""
    with shared_bench(kind) as bench, shared_bench(kind) as another:
        name = bench.backend.identity
        bench.harness.forget()
        bench.harness.restart()
        assert bench.open().identity == name
        if kind in ("redis", "valkey"):
            assert name == another.backend.identity == ""
        else:
            assert len({name, another.backend.identity, ""}) == 3


# --- errors ---

SECRET = "opensesame"


def calls(bench: Bench) -> Mapping[str, Callable[[], Awaitable[Any]]]:
    """One call of every method that talks to the server, by name."""
    backend, claim = bench.backend, bench.new_claim("task")
    return {
        "startup": backend.startup,
        "open_run": lambda: backend.open_run(
            "run", generation=0, token="t", is_resumable=False, lease_seconds=1
        ),
        "renew_run": lambda: backend.renew_run(
            "run", generation=0, token="t", is_resumable=False, lease_seconds=1
        ),
        "close_run": lambda: backend.close_run("run", token="t"),
        "disown_run": lambda: backend.disown_run("run"),
        "wait_for_results": lambda: backend.wait_for_results("run", 0.01),
        "read_results": lambda: backend.read_results("run", ["task"]),
        "forget_results": lambda: backend.forget_results("run", ["task"]),
        "inspect": lambda: backend.inspect("run", ["task"]),
        "cancel": lambda: backend.cancel("run", {"task": ""}),
        "condemn": lambda: backend.condemn("run", "task"),
        "reopen": lambda: backend.reopen("run", "task"),
        "claim": lambda: backend.claim(claim, needs_live_run=True),
        "renew": lambda: backend.renew([claim]),
        "complete": lambda: backend.complete(claim, b"", expires_seconds=1),
        "begin": lambda: backend.begin(claim),
        "release": lambda: backend.release(claim),
        "heartbeat": lambda: backend.heartbeat(record("w"), expires_seconds=1),
        "goodbye": lambda: backend.goodbye("w"),
        "workers": backend.workers,
        "lost_workers": backend.lost_workers,
        "runs": backend.runs,
        "running": backend.running,
        "send_control": lambda: backend.send_control("w", "x"),
        "add_history": lambda: backend.add_history(HistoryBatch([an_end("task")])),
        "ended": backend.ended,
        "counts": backend.counts,
        "product": backend.product,
        "tidy": backend.tidy,
        "wait_for_control": lambda: backend.wait_for_control("w", 0.01),
        "pause_queue": lambda: backend.pause_queue(QueuePause("q", "", 1.0, "host")),
        "resume_queue": lambda: backend.resume_queue("q"),
        "paused_queues": backend.paused_queues,
        "tell_withheld": lambda: backend.tell_withheld("run", Withheld(), token="t"),
    }


ONE_OF_EACH = pytest.mark.parametrize("kind", ["memory", "valkey", "postgres"])


def test_the_calls_are_all_that_there_are(bench: Bench) -> None:
    """Each method of the contract, so that the tests below forget none."""
    assert {*calls(bench), "shutdown", "identity"} == Backend.__abstractmethods__


@ONE_OF_EACH
def test_every_call_says_when_the_server_is_gone_and_works_when_it_is_back(kind: Kind) -> None:
    """With the address and without the password; no new connection has to be asked for."""
    with private_bench(kind, password=SECRET) as (server, bench):
        bench.open_run()

        async def make(call: Callable[[], Awaitable[Any]]) -> Any:
            return await call()

        server.kill()
        for call in calls(bench).values():
            with pytest.raises(UnreachableServerError) as caught:
                bench.call(make(call))
            assert SECRET not in str(caught.value)
            assert caught.value.address in str(caught.value)
        server.restart()
        for call in calls(bench).values():
            bench.call(make(call))


@ONE_OF_EACH
def test_a_frozen_server_is_unreachable_after_the_timeout(kind: Kind) -> None:
    """It accepts connections and answers nothing."""
    with private_bench(kind, timeout_seconds=1) as (server, bench):
        server.freeze()
        began = time.monotonic()
        with pytest.raises(UnreachableServerError):
            bench.claim(bench.new_claim())
        assert time.monotonic() - began < 10
        server.thaw()


# --- the epoch ---


@pytest.fixture
def private(kind: Kind) -> Iterator[tuple[PrivateHarness, Bench]]:
    """A server of the test's own, with an open run."""
    with private_bench(kind) as (server, bench):
        bench.open_run()
        yield server, bench


@pytest.fixture(params=["flush", "restart", "restart empty"])
def new_life(
    request: pytest.FixtureRequest, private: tuple[PrivateHarness, Bench]
) -> Callable[[], None]:
    """What ends the server's present life."""
    server, _ = private

    def restart_empty() -> None:
        server.restart()
        server.forget()

    lives = {"flush": server.forget, "restart": server.restart, "restart empty": restart_empty}
    return lives[request.param]


def test_the_epoch_stays_while_the_server_lives(bench: Bench) -> None:
    """Whoever asks, and however often."""
    other = bench.open()
    assert bench.renew_run() == bench.epoch
    assert bench.call(other.inspect("other", ["x"]))[0] == bench.epoch


def test_the_epoch_changes_with_the_servers_life(
    private: tuple[PrivateHarness, Bench], new_life: Callable[[], None]
) -> None:
    """Once, and everybody sees the same new one."""
    _, bench = private
    old = bench.epoch
    new_life()
    epoch = bench.renew_run()
    assert epoch not in (None, old)
    assert bench.renew_run() == epoch
    assert bench.call(bench.backend.inspect(bench.run_id, ["x"]))[0] == epoch
    assert bench.renew(bench.new_claim()).epoch == epoch


def test_a_task_of_an_older_epoch_is_not_claimed(
    private: tuple[PrivateHarness, Bench], new_life: Callable[[], None]
) -> None:
    """Its claim or its result may have been forgotten; the loop sends it again in the new one."""
    _, bench = private
    old = bench.new_claim()
    new_life()
    epoch = bench.renew_run()
    assert bench.claim(old) is ClaimAnswer.STALE
    assert bench.claim(replace(old, epoch=str(epoch))) is ClaimAnswer.GRANTED


def test_a_dropped_message_of_an_older_epoch_proves_nothing(
    private: tuple[PrivateHarness, Bench], new_life: Callable[[], None]
) -> None:
    """Somebody may hold the claim that the server has forgotten; who does asserts it again."""
    _, bench = private
    running, ended, gone = bench.claimed(), bench.claimed(), bench.new_claim()
    new_life()
    bench.renew_run()
    for claim in (running, ended, gone):
        copy = replace(bench.new_claim(claim.task_id), epoch=bench.epoch)
        assert bench.claim(copy) in (ClaimAnswer.STALE, ClaimAnswer.CLAIMED)
    assert bench.state(gone.task_id) is TaskState.EXPIRED
    assert bench.renew(running).is_held
    assert bench.state(running.task_id) is TaskState.CLAIMED
    assert bench.complete(ended, b"x")
    assert bench.state(ended.task_id) is TaskState.DONE


def test_a_live_worker_asserts_its_claim_again(
    private: tuple[PrivateHarness, Bench], new_life: Callable[[], None]
) -> None:
    """Its next renewal puts the claim back, and its result is taken."""
    _, bench = private
    claim = bench.claimed()
    new_life()
    assert bench.renew(claim).is_held
    bench.renew_run()
    report = bench.report(claim.task_id)
    assert (report.state, report.place) == (TaskState.CLAIMED, claim.place)
    assert bench.claim(bench.new_claim(claim.task_id)) is not ClaimAnswer.GRANTED
    assert bench.complete(claim, b"x")
    assert bench.results() == {claim.task_id: b"x"}


def test_a_result_of_a_forgotten_claim_is_taken(
    private: tuple[PrivateHarness, Bench], new_life: Callable[[], None]
) -> None:
    """The step ended between the server's new life and the next renewal."""
    _, bench = private
    claim = bench.claimed()
    new_life()
    assert bench.complete(claim, b"x")
    assert bench.results() == {claim.task_id: b"x"}


def test_a_judged_claim_is_not_asserted_again(
    private: tuple[PrivateHarness, Bench], new_life: Callable[[], None]
) -> None:
    """What was cancelled or condemned in the new epoch, or is another's, stays so."""
    _, bench = private
    condemned, cancelled, taken = bench.claimed(), bench.claimed(), bench.claimed()
    new_life()
    bench.open_run()
    for claim in (condemned, cancelled, taken):
        bench.expire(claim)
    assert bench.condemn(condemned.task_id)
    bench.reopen(cancelled.task_id)
    assert bench.cancel(cancelled.task_id) == [TaskState.CANCELLED]
    bench.reopen(taken.task_id)
    bench.claimed(taken.task_id)
    for claim in (condemned, cancelled, taken):
        assert not bench.renew(claim).is_held
        assert not bench.complete(claim)


def test_an_expired_claim_that_is_cancelled_in_a_new_epoch_is_told(
    private: tuple[PrivateHarness, Bench], new_life: Callable[[], None]
) -> None:
    """Its worker, if it lives, hears of it, and never goes on with the step."""
    _, bench = private
    claim = bench.claimed()
    new_life()
    bench.open_run()
    bench.expire(claim)
    bench.cancel(claim.task_id)
    renewal = bench.renew(claim)
    assert renewal.cancel_order == "enough" or not renewal.is_held


def test_the_loop_writes_its_record_again(
    private: tuple[PrivateHarness, Bench], new_life: Callable[[], None]
) -> None:
    """After a flush its next renewal makes the run live again, with all that is known of it."""
    _, bench = private
    new_life()
    bench.epoch = str(bench.renew_run())
    assert bench.claim(bench.new_claim()) is ClaimAnswer.GRANTED
    other = bench.open()
    with pytest.raises(SupersededLoopError):
        bench.call(
            other.open_run(
                bench.run_id, generation=0, token="x", is_resumable=False, lease_seconds=1
            )
        )


def test_an_old_loop_does_not_push_out_a_newer_one_after_a_flush(
    private: tuple[PrivateHarness, Bench],
) -> None:
    """The server has forgotten the numbers; whoever comes first, the newer loop goes on."""
    server, bench = private
    newer = bench.open()
    old, bench.backend = bench.backend, newer
    bench.open_run(token="new", generation=1)
    server.forget()
    bench.backend = old
    bench.renew_run("loop")
    bench.backend = newer
    assert bench.renew_run("new") is not None
    bench.backend = old
    assert bench.renew_run("loop") is None
    bench.backend = newer
    assert bench.renew_run("new") is not None


# --- one task's life ---


@dataclass
class Model:
    """What is known of one task.

    Attributes:
        holder: whose claim holds.
        winner: whose result is stored, of its end or of its refusal.
        result: that is stored.
        is_told: whether the holder was told to stop.
    """

    state: TaskState = TaskState.UNKNOWN
    holder: Claim | None = None
    winner: Claim | None = None
    result: bytes | None = None
    is_told: bool = False


class OneTask(RuleBasedStateMachine):
    """Three workers and a loop deal with one task in any order, each call perhaps repeated."""

    bench: Bench

    def __init__(self) -> None:
        super().__init__()
        # one connection for all examples; each has a run and a task of its own
        bench = type(self).bench
        bench.run_id = uuid.uuid4().hex
        bench.open_run()
        self.claims = [bench.new_claim("t" + bench.run_id) for _ in range(3)]
        self.task_id = self.claims[0].task_id
        self.model = Model()
        self.grants_since_reopened: set[str] = set()
        self.ends = 0

    def twice(self, call: Callable[[], T]) -> T:
        """Make a call as somebody does who lost the first answer; both must be the same."""
        first = call()
        if self.repeats:
            assert call() == first
        return first

    repeats = False

    @rule(repeats=st.booleans())
    def lose_answers(self, repeats: bool) -> None:
        self.repeats = repeats

    @rule(worker=st.integers(0, 2))
    def claim(self, worker: int) -> None:
        claim, model = self.claims[worker], self.model
        answer = self.twice(lambda: self.bench.claim(claim))
        if model.state is TaskState.UNKNOWN:
            assert answer is ClaimAnswer.GRANTED
            self.model = Model(TaskState.CLAIMED, claim)
        else:
            expected = {
                TaskState.CLAIMED: ClaimAnswer.CLAIMED,
                TaskState.EXPIRED: ClaimAnswer.CLAIMED,
                TaskState.DONE: ClaimAnswer.DONE,
                TaskState.REFUSED: ClaimAnswer.REFUSED,
                TaskState.CANCELLED: ClaimAnswer.CANCELLED,
                TaskState.LOST: ClaimAnswer.LOST,
            }[model.state]
            assert answer is (ClaimAnswer.GRANTED if model.holder is claim else expected)
        if answer is ClaimAnswer.GRANTED:
            self.grants_since_reopened.add(claim.token)
            assert len(self.grants_since_reopened) == 1, "granted twice"

    @precondition(lambda self: self.model.state is TaskState.CLAIMED)
    @rule()
    def expire(self) -> None:
        self.bench.expire(self.claims[0])
        self.model = Model(TaskState.EXPIRED, is_told=self.model.is_told)

    @rule(worker=st.integers(0, 2))
    def renew(self, worker: int) -> None:
        claim = self.claims[worker]
        renewal = self.twice(lambda: self.bench.renew(claim))
        assert renewal.is_held == (self.model.holder is claim)
        if renewal.is_held:
            assert renewal.cancel_order == ("enough" if self.model.is_told else None)

    @rule(worker=st.integers(0, 2), is_refused=st.booleans())
    def complete(self, worker: int, is_refused: bool) -> None:
        claim, result, model = self.claims[worker], uuid.uuid4().hex.encode(), self.model
        end = TaskState.REFUSED if is_refused else TaskState.DONE
        stored = self.twice(
            lambda: self.bench.call(
                self.bench.backend.complete(
                    claim, result, expires_seconds=600, is_refused=is_refused
                )
            )
        )
        if model.state is end and model.winner is claim:
            assert stored, "a repeated completion"
            return
        assert stored == (model.holder is claim)
        if stored:
            self.ends += end is TaskState.DONE
            self.model = Model(end, winner=claim, result=result)

    @rule()
    def cancel(self) -> None:
        (answer,) = self.twice(lambda: self.bench.cancel(self.task_id))
        if self.model.state in (TaskState.UNKNOWN, TaskState.REFUSED, TaskState.CANCELLED):
            assert answer is TaskState.CANCELLED
            self.model = Model(TaskState.CANCELLED, result=self.model.result)
        else:
            assert answer is self.model.state
            self.model.is_told = True

    @rule()
    def condemn(self) -> None:
        lost = self.twice(lambda: self.bench.condemn(self.task_id))
        has_end = self.model.state is TaskState.CLAIMED or self.model.result is not None
        assert lost == (not has_end)
        if lost:
            self.model = Model(TaskState.LOST)

    @rule()
    def reopen(self) -> None:
        is_open = self.twice(lambda: self.bench.reopen(self.task_id))
        model = self.model
        is_free = model.state in (TaskState.UNKNOWN, TaskState.REFUSED) or (
            model.state is TaskState.EXPIRED and not model.is_told
        )
        assert is_open == is_free
        if is_open:
            self.model = Model()
            self.grants_since_reopened.clear()

    @invariant()
    def the_backend_says_what_the_model_knows(self) -> None:
        report = self.bench.report(self.task_id)
        assert report.state is self.model.state
        assert report.place == (self.model.holder.place if self.model.holder else None)

    @invariant()
    def at_most_one_end_is_stored(self) -> None:
        assert self.ends <= 1
        assert self.bench.read(self.task_id) == self._results()

    def _results(self) -> dict[str, bytes]:
        return {} if self.model.result is None else {self.task_id: self.model.result}

    def teardown(self) -> None:
        assert self.bench.results(0.001) == self._results()


#: How many examples there are: on a server they take their time.
EXAMPLES: Mapping[Kind, int] = {"memory": 100, "redis": 10, "valkey": 10, "postgres": 10}


def test_one_tasks_life(kind: Kind) -> None:
    """At most one grant without a reopen, and no completion without the claim, in any order."""
    with shared_bench(kind) as bench:
        machine = type("OneTaskOnThisServer", (OneTask,), {"bench": bench})
        case = machine.TestCase  # type: ignore[attr-defined]
        case.settings = settings(
            max_examples=EXAMPLES[kind],
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        case("runTest").debug()
