"""An attempt claims, acks, executes and stores in the right order, whatever goes wrong."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any, cast

import pytest

from dagster_taskiq.backend import Claim, ClaimAnswer
from dagster_taskiq.errors import CopyOfStepError, NoProcessError, SlotError, UnreachableServerError
from dagster_taskiq.messages.control import OrderReader
from dagster_taskiq.messages.envelope import Envelope, TaskName
from dagster_taskiq.messages.results import Outcome, TaskResult
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.messages.time_limits import TimeLimits
from dagster_taskiq.worker import attempt as attempt_module
from dagster_taskiq.worker.answers import result_of
from dagster_taskiq.worker.attempt import Attempt, State
from dagster_taskiq.worker.child_messages import Execute, Executed, FailRun, Order
from dagster_taskiq.worker.leases import Lease, LeaseKeeper, StopReason
from dagster_taskiq.worker.run_watch import RunWatch
from dagster_taskiq.worker.slot_base import ChildDied
from dagster_taskiq.worker.tools import Tools
from dagster_taskiq_tests.messages import STEP_TASK
from dagster_taskiq_tests.unit.worker_stand_ins import (
    PLACE,
    Act,
    FakeBackend,
    FakeBroker,
    FakeGuard,
    FakeSlot,
    Witness,
    finished,
)

SECONDS = 30.0

#: A run that is launched, and one that is resumed.
RUN_TASK = replace(STEP_TASK, name=TaskName.EXECUTE_JOB, step_key=None, attempt=0)
RESUMED_TASK = replace(RUN_TASK, name=TaskName.RESUME_JOB)

AWAY = UnreachableServerError("memory://fake", "it is away")


class Scene:
    """An attempt with stand-ins for everything around it, which share one list of happenings."""

    def __init__(self, envelope: Envelope, signer: Signer | None = None) -> None:
        signer = signer or Signer()
        self.happened: list[str] = []
        self.slot = FakeSlot(1, self.happened)
        self.watch_slot = FakeSlot(0)
        self.backend = FakeBackend(self.happened)
        self.witness = Witness()
        self.leases = LeaseKeeper(
            self.backend.whole(),
            FakeGuard(),
            OrderReader(signer, "worker-id", "w@h"),
            self.witness,
        )
        self.envelope = envelope
        self.is_draining = False
        tools = Tools(
            self.backend.whole(),
            self.leases,
            RunWatch(self.watch_slot),
            PLACE,
            1.0,
            TimeLimits(),
            signer,
            self.witness,
        )
        delivery = FakeBroker(self.happened).deliver(b"", envelope)
        self.attempt = Attempt(delivery, self.slot, tools, lambda: self.is_draining)

    def lease(self) -> Lease:
        lease = self.leases.find(self.envelope.task_id)
        assert lease is not None
        return lease

    def result(self) -> TaskResult:
        return TaskResult.from_bytes(self.backend.results[self.envelope.task_id])

    @property
    def failed_runs(self) -> list[Order]:
        return [it for it in self.watch_slot.orders if isinstance(it, FailRun)]


def play(envelope: Envelope, arrange: Callable[[Scene], None] = lambda _: None) -> Scene:
    """Run an attempt to its end, with what a test has arranged."""

    async def scenario() -> Scene:
        scene = Scene(envelope)
        arrange(scene)
        await asyncio.wait_for(scene.attempt.run(), SECONDS)
        assert scene.leases.find(envelope.task_id) is None
        return scene

    return asyncio.run(scenario())


def acting(act: Callable[[Scene], Awaitable[Any]]) -> Callable[[Scene], None]:
    """Arrange what the child does."""

    def arrange(scene: Scene) -> None:
        def play(_slot: FakeSlot, _order: Order) -> Coroutine[Any, Any, Any]:
            return cast("Coroutine[Any, Any, Any]", act(scene))

        scene.slot.act = cast("Act", play)

    return arrange


def test_a_step_is_acked_beside_its_execution() -> None:
    """It has begun once it is claimed, and everybody hears of it in order."""
    states: list[State] = []

    async def act(scene: Scene) -> Executed:
        states.append(scene.attempt.state)
        return finished(events=("an event",))

    scene = play(STEP_TASK, acting(act))
    assert sorted(scene.happened) == ["ack", "claim granted", "complete"]
    assert states == [State.BEGUN]
    assert scene.attempt.state is State.OVER
    assert scene.witness.heard == ["claimed", "began", "ended", "completed", "released"]
    assert scene.result().events == ("an event",)
    assert scene.witness.details["size"] == len(scene.backend.results[STEP_TASK.task_id])
    order = scene.slot.orders[0]
    assert isinstance(order, Execute)
    assert (order.payload, order.place.pid) == (STEP_TASK.payload, scene.slot.pid)
    ending = scene.witness.details["ended"]
    assert ending.outcome is Outcome.FINISHED
    assert (ending.step_end, ending.stopped_by) == ("success", "")
    assert 0 <= ending.waited_seconds < SECONDS
    assert 0 <= ending.run_seconds < SECONDS


@pytest.mark.parametrize(("sent_ago", "waited"), [(7.5, 7.5), (-100.0, 0.0), (None, None)])
def test_the_child_is_told_how_long_its_task_has_waited(
    sent_ago: float | None, waited: float | None
) -> None:
    """By the clocks of two hosts, which may differ; not where the sender has not said when."""
    sent_at = 0.0 if sent_ago is None else time.time() - sent_ago
    scene = play(replace(STEP_TASK, sent_at=sent_at, attempt=3))
    (order,) = scene.slot.orders
    assert isinstance(order, Execute)
    assert (order.arrival.queue, order.arrival.attempt) == (STEP_TASK.queue, 3)
    seconds = order.arrival.waited_seconds
    assert seconds == waited if not waited else seconds == pytest.approx(waited, abs=SECONDS)


def test_a_launched_run_is_acked_when_it_has_begun() -> None:
    """Until then its message's broker alone would notice that it died."""
    states: list[State] = []

    async def act(scene: Scene) -> Executed:
        for _ in range(5):
            await asyncio.sleep(0)
        assert "ack" not in scene.happened
        states.append(scene.attempt.state)
        scene.slot.on_run_start_logged()
        states.append(scene.attempt.state)
        return finished()

    scene = play(RUN_TASK, acting(act))
    assert states == [State.CLAIMED, State.BEGUN]
    assert sorted(scene.happened) == ["ack", "begin", "claim granted", "complete"]
    assert scene.happened.index("begin") < scene.happened.index("ack")
    assert scene.failed_runs == []


def test_a_resumed_run_is_acked_once() -> None:
    """It had begun before; that it says so again changes nothing."""

    async def act(scene: Scene) -> Executed:
        assert scene.attempt.state is State.BEGUN
        scene.slot.on_run_start_logged()
        return finished()

    scene = play(RESUMED_TASK, acting(act))
    assert sorted(scene.happened) == ["ack", "claim granted", "complete"]


def test_a_run_that_could_not_start_is_failed_once_its_result_is_stored() -> None:
    """Until then another worker could take it over; its message is acked last."""

    async def act(scene: Scene) -> ChildDied:
        return ChildDied(3, scene.slot.pid)

    scene = play(RUN_TASK, acting(act))
    assert scene.happened == ["claim granted", "complete", "ack"]
    assert [it.reason for it in scene.failed_runs if isinstance(it, FailRun)] == [
        "its process ended with exit code 3."
    ]


def test_a_run_whose_result_is_refused_stays_for_another_worker() -> None:
    """Somebody else may have it by then: it is neither failed nor acked."""

    async def act(scene: Scene) -> ChildDied:
        scene.backend.is_held = False
        return ChildDied(3, scene.slot.pid)

    scene = play(RUN_TASK, acting(act))
    assert scene.happened == ["claim granted", "complete"]
    assert "completed" not in scene.witness.heard
    assert scene.failed_runs == []


def stopping(reason: StopReason) -> Callable[[Scene], Awaitable[ChildDied]]:
    """The keeper stops the task, and its child dies of that."""

    async def act(scene: Scene) -> ChildDied:
        scene.leases.stop(scene.lease(), reason)
        await scene.slot.told.wait()
        return ChildDied(-9, scene.slot.pid)

    return act


def test_a_run_that_is_stopped_before_it_began_goes_to_another_worker() -> None:
    """Its process is killed at once, since at a SIGTERM Dagster would fail the run."""
    scene = play(RUN_TASK, acting(stopping(StopReason.LEASE_LOST)))
    assert scene.happened == ["claim granted", "killed", "release"]
    assert scene.failed_runs == []


def test_a_run_that_is_cancelled_before_it_began_is_over() -> None:
    """It is stored and acked, so that nobody starts it, and not failed: Dagster knows."""
    scene = play(RUN_TASK, acting(stopping(StopReason.CANCELLED)))
    assert scene.happened == ["claim granted", "interrupted", "complete", "ack"]
    assert scene.result().is_cancelled
    assert scene.failed_runs == []


@pytest.mark.parametrize("reason", [StopReason.CANCELLED, StopReason.LEASE_LOST])
def test_a_stopped_step_gets_its_grace_and_is_killed_then(reason: StopReason) -> None:
    """SIGTERM at once; the reason is in its result."""
    envelope = replace(STEP_TASK, cancel_grace_seconds=0.01)

    async def act(scene: Scene) -> ChildDied:
        scene.leases.stop(scene.lease(), reason)
        await scene.slot.told.wait()
        scene.slot.told.clear()
        await scene.slot.told.wait()
        return ChildDied(-9, scene.slot.pid)

    scene = play(envelope, acting(act))
    assert scene.witness.details["ended"].stopped_by == reason.name
    assert [it for it in scene.happened if it in ("interrupted", "killed")] == [
        "interrupted",
        "killed",
    ]
    assert scene.result().reason == f"its process was killed by SIGKILL after {reason.value}."
    assert scene.witness.heard == ["claimed", "began", "stopped", "ended", "completed", "released"]
    is_cancelled = reason is StopReason.CANCELLED
    assert scene.witness.details["completed"] == (scene.result(), is_cancelled)


@pytest.mark.parametrize("answer", [ClaimAnswer.DONE, ClaimAnswer.STALE, ClaimAnswer.RUN_GONE])
def test_a_task_that_nobody_is_to_execute_is_dropped(answer: ClaimAnswer) -> None:
    """Acked and not executed."""
    scene = play(STEP_TASK, lambda scene: scene.backend.answers.append(answer))
    assert scene.happened == [f"claim {answer.value}", "ack"]
    assert scene.witness.heard == ["dropped"]
    assert scene.slot.orders == []


def test_a_task_that_cannot_be_claimed_now_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left unsettled, and the receiver gives it back."""
    monkeypatch.setattr(attempt_module, "RELEASE_PAUSE_SECONDS", 0.0)
    scene = play(STEP_TASK, lambda scene: scene.backend.answers.append(AWAY))
    assert scene.happened == []
    assert scene.witness.heard == []


def test_a_run_that_another_worker_holds_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is claimed again until the other one has begun or lost it; a draining worker gives up."""
    monkeypatch.setattr(attempt_module, "_PENDING_SECONDS", 0.0)
    pending = [ClaimAnswer.PENDING] * 2

    scene = play(RUN_TASK, lambda scene: scene.backend.answers.extend(pending))
    assert scene.happened[:3] == ["claim pending", "claim pending", "claim granted"]

    def arrange(scene: Scene) -> None:
        scene.is_draining = True
        scene.backend.answers.extend(pending)

    assert play(RUN_TASK, arrange).happened == ["claim pending"]


def test_a_slot_without_a_child_is_the_tasks_error() -> None:
    """It is claimed, so that its run hears the reason, and never begins."""

    def arrange(scene: Scene) -> None:
        scene.slot.failure = SlotError("slot 1: no such module")

    scene = play(STEP_TASK, arrange)
    assert (scene.result().outcome, scene.result().reason) == (
        Outcome.ERROR,
        "slot 1: no such module",
    )
    assert scene.witness.heard == ["claimed", "ended", "completed", "released"]
    assert scene.witness.details["ended"].run_seconds is None


def test_where_there_is_no_process_nothing_is_claimed() -> None:
    """The station hears of it, and the task is for another worker."""

    async def scenario() -> None:
        scene = Scene(STEP_TASK)
        scene.slot.failure = NoProcessError("slot 1: EMFILE")
        with pytest.raises(NoProcessError):
            await scene.attempt.run()
        assert scene.attempt.state is State.TAKEN
        assert scene.happened == []

    asyncio.run(scenario())


def played_with_an_error(
    envelope: Envelope, act: Callable[[Scene], Awaitable[Any]], error: type[Exception]
) -> Scene:
    """Run an attempt that ends with an error, which its station hears of."""

    async def scenario() -> Scene:
        scene = Scene(envelope)
        acting(act)(scene)
        with pytest.raises(error):
            await asyncio.wait_for(scene.attempt.run(), SECONDS)
        assert scene.leases.find(envelope.task_id) is None
        return scene

    return asyncio.run(scenario())


@pytest.mark.parametrize(
    ("envelope", "outcome"),
    [
        (STEP_TASK, Outcome.REFUSED),
        (RUN_TASK, None),
        (RESUMED_TASK, Outcome.ERROR),
    ],
    ids=["step", "run", "resumed run"],
)
def test_a_task_that_was_claimed_before_the_shortage_is_given_back(
    envelope: Envelope, outcome: Outcome | None
) -> None:
    """A step by its loop, a launched run by its message, which was not acked."""

    async def act(_: Scene) -> Executed:
        raise NoProcessError("slot 1: EMFILE")

    scene = played_with_an_error(envelope, act, NoProcessError)
    if outcome is None:
        assert scene.happened == ["claim granted", "release"]
    else:
        assert scene.result().outcome is outcome
        assert "EMFILE" in scene.result().reason
        assert scene.happened.count("ack") == 1
    completed = [] if outcome is None else ["completed"]
    assert scene.witness.heard == ["claimed", "began", "ended", *completed, "released"]
    assert scene.failed_runs == []


def test_of_a_copy_nothing_is_stored() -> None:
    """Dagster's log has the attempt as begun; the claim is left to end by itself."""

    async def act(_: Scene) -> Executed:
        copy = TaskResult(Outcome.COPY, PLACE, reason="It has begun before.")
        return Executed(copy.to_bytes().decode(), "", 1)

    scene = played_with_an_error(STEP_TASK, act, CopyOfStepError)
    assert sorted(scene.happened) == ["ack", "claim granted"]
    assert scene.backend.results == {}


@pytest.mark.parametrize("is_late", [False, True])
def test_a_result_is_offered_as_long_as_the_lease_holds(
    is_late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After that somebody else may have judged, and the log decides."""
    monkeypatch.setattr(attempt_module, "_RETRY_SECONDS", 0.0)

    async def act(scene: Scene) -> Executed:
        scene.backend.failures.extend([AWAY] * 3)
        if is_late:
            scene.lease().renewed_at -= 2 * STEP_TASK.lease_seconds
        return finished()

    scene = play(STEP_TASK, acting(act))
    assert ("complete" in scene.happened) is not is_late
    assert scene.witness.heard[-1] == "released"


def test_a_result_that_is_too_large_is_left_to_the_log_and_says_so() -> None:
    """It names the step, the size and the setting; what is stored instead is small and sealed.

    It is no error: a step whose success is in Dagster's log must not fail after it.
    """
    signer = Signer(["k" * 32], max_bytes=2000)
    envelope = replace(STEP_TASK, step_key="big")

    async def act(_: Scene) -> Executed:
        return finished(events=("x" * 3000,))

    async def scenario() -> bytes:
        scene = Scene(envelope, signer)
        acting(act)(scene)
        await scene.attempt.run()
        return scene.backend.results[envelope.task_id]

    stored = TaskResult.from_bytes(asyncio.run(scenario()), signer, envelope.task_id)
    assert stored.outcome is Outcome.DIED
    assert stored.events == ()
    for part in ("Step big of run run", "3,", "max_message_bytes allows 2,000"):
        assert part in stored.reason


def test_a_claim_that_was_answered_late_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that is most of a lease old would have its task stopped as soon as it begins."""
    now = 1000.0
    asked_at: list[float] = []
    delays = [STEP_TASK.lease_seconds * 0.7, STEP_TASK.lease_seconds * 0.1]
    counts_from: list[float] = []
    monkeypatch.setattr(attempt_module, "clock", lambda: now)

    async def claim(*_: object, **__: object) -> ClaimAnswer:
        nonlocal now
        asked_at.append(now)
        now += delays[len(asked_at) - 1]
        return ClaimAnswer.GRANTED

    async def act(scene: Scene) -> Executed:
        counts_from.append(scene.lease().renewed_at)
        return finished()

    def arrange(scene: Scene) -> None:
        scene.backend.claim = claim  # type: ignore[method-assign]
        acting(act)(scene)

    play(STEP_TASK, arrange)
    assert counts_from == asked_at[-1:]
    assert len(asked_at) == len(delays)


# --- what a child's answer means ---


@pytest.mark.parametrize("reason", [None, *StopReason])
def test_only_a_cancel_rules_out_a_retry(reason: StopReason | None) -> None:
    """An interrupt before the step's start may also be a lost lease, or a stranger's signal."""
    result = made_of(
        TaskResult(Outcome.FINISHED, PLACE, reason="Stopped.", is_cancelled=True), reason
    )
    assert result.is_cancelled == (reason is StopReason.CANCELLED)
    expected = "this" if reason else "a signal that its worker had not sent"
    assert result.reason == f"Stopped after {expected}."


def test_the_words_of_a_database_stay_as_they_are() -> None:
    """Of a step that was also interrupted: that was not why its events were refused."""
    result = made_of(
        TaskResult(Outcome.UNLOGGED, PLACE, reason="The disk is full.", is_cancelled=True),
        StopReason.CANCELLED,
    )
    assert result.is_cancelled
    assert result.reason == "The disk is full."


def made_of(said: TaskResult, reason: StopReason | None) -> TaskResult:
    """What is made of a child's result, where its worker has stopped the task for that reason."""
    claim = Claim("run", "task", "token", 30.0, "epoch", PLACE)
    lease = Lease(claim, 4711, 0.0, lambda: None, lambda: None, stop_reason=reason)
    lease.stop_cause = "this" if reason else ""
    return result_of(Executed(said.to_bytes().decode(), "", 1), lease, "")
