"""The lease keeper renews in time, and stops what may not go on before others may judge.

In virtual time: the event loop's clock jumps to whatever it would wait for, so that hours of
outages take milliseconds and every moment is exact.
"""

from __future__ import annotations

import asyncio
import itertools
import selectors
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dagster_taskiq.backend import Backend, Claim, Renewal
from dagster_taskiq.errors import ServerError, UnreachableServerError
from dagster_taskiq.messages.control import OrderReader, cancel_order
from dagster_taskiq.messages.results import Place
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.worker import leases as leases_module
from dagster_taskiq.worker.guard_client import GuardClient
from dagster_taskiq.worker.leases import Lease, LeaseKeeper, StopReason
from dagster_taskiq.worker.observer import CountingObserver, LoggingObserver, Observers

UNSIGNED = Signer()

#: Of leases, unless a test says otherwise.
LEASE = 30.0

#: What floating point makes of exact moments.
TINY = 1e-3


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of waiting, the time passes."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        self.now += 1e-7  # a clock that stands still would make rounding errors last for ever
        if not ready:
            assert timeout is not None, "everything waits for something that never comes"
            self.now += max(0.0, timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in which time passes only when everything waits."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def now() -> float:
    return asyncio.get_running_loop().time()


class FakeGuard:
    """Notes the deadlines; whoever is past one has been killed."""

    def __init__(self) -> None:
        self.deadlines: dict[int, float] = {}
        self.asked: list[float] = []

    def set_deadline(self, group: int, when: float) -> None:
        self.deadlines[group] = when

    def lift_deadline(self, group: int) -> None:
        self.deadlines.pop(group, None)

    def ask(self, patience_seconds: float) -> None:
        self.asked.append(patience_seconds)


@dataclass
class FakeBackend:
    """A server that can be away, be frozen, lose its answers, and forget.

    Attributes:
        latency_seconds: half on the way there, half on the way back.
        failure: what a call does at a moment: None answers; "refuse" fails at once; "vanish"
            fails after the timeout; "freeze" answers when it is over, or fails after the timeout;
            "lose" does what it is asked and then fails.
        orders: to cancel, by the claim's token, as the record of the run has them.
        ends: when each token's lease ends, as the server sees it.
    """

    latency_seconds: float = 0.0
    timeout_seconds: float = 10.0
    failure: Callable[[float], str | None] = lambda _: None
    address: str = "redis://fake"
    epoch: str = "e1"
    is_run_alive: bool = True
    is_resumable: bool = False
    not_held: set[str] = field(default_factory=set)
    orders: dict[str, str] = field(default_factory=dict)
    ends: dict[str, float] = field(default_factory=dict)
    calls: list[tuple[float, tuple[str, ...]]] = field(default_factory=list)

    async def renew(self, claims: Sequence[Claim]) -> list[Renewal]:
        self.calls.append((now(), tuple(claim.token for claim in claims)))
        failure = self.failure(now())
        if failure == "refuse":
            raise UnreachableServerError(self.address, "refused")
        timeout_at = now() + self.timeout_seconds
        while failure in ("freeze", "vanish"):
            await asyncio.sleep(0.1)
            if now() >= timeout_at:
                raise UnreachableServerError(self.address, "timed out")
            failure = self.failure(now()) if failure == "freeze" else failure
        await asyncio.sleep(self.latency_seconds / 2)
        answers = [self._renew(claim) for claim in claims]
        await asyncio.sleep(self.latency_seconds / 2)
        if failure == "lose":
            raise UnreachableServerError(self.address, "the answer was lost")
        return answers

    def _renew(self, claim: Claim) -> Renewal:
        held = claim.token not in self.not_held and self.ends.get(claim.token, 0) > now()
        if held:
            self.ends[claim.token] = now() + claim.lease_seconds
        return Renewal(
            is_held=held,
            cancel_order=self.orders.get(claim.token),
            is_run_alive=self.is_run_alive,
            is_resumable=self.is_resumable,
            epoch=self.epoch,
        )


class Scene:
    """A keeper with its backend and guard, in virtual time."""

    def __init__(self, backend: FakeBackend, signer: Signer = UNSIGNED) -> None:
        self.backend = backend
        self.counts = CountingObserver()
        self.guard = FakeGuard()
        self.keeper = LeaseKeeper(
            cast("Backend", backend),
            cast("GuardClient", self.guard),
            OrderReader(signer, "worker", "worker@host"),
            Observers(LoggingObserver(), self.counts),
            now,
        )
        self.stopped_at: dict[str, float] = {}
        self.orphaned = 0
        self._numbers = itertools.count(1)

    def keep(self, lease_seconds: float = LEASE) -> Lease:
        """Claim a task and have the keeper keep it."""
        number = next(self._numbers)
        token = f"token-{number}"
        claim = Claim("run", f"task-{number}", token, lease_seconds, "e1", Place("", "", "", 0, 0))
        self.backend.ends[token] = now() + lease_seconds
        lease = Lease(claim, number, now(), lambda: self._note_stop(token), self._note_orphan)
        self.keeper.keep(lease)
        return lease

    def _note_stop(self, token: str) -> None:
        assert token not in self.stopped_at, "stopped twice"
        self.stopped_at[token] = now()

    def _note_orphan(self) -> None:
        self.orphaned += 1

    def stop_of(self, lease: Lease) -> float | None:
        return self.stopped_at.get(lease.claim.token)

    def check(self) -> None:
        """The guard kills before the server's lease is over."""
        for lease in self.keeper._leases.values():
            assert self.guard.deadlines[lease.group] < self.backend.ends[lease.claim.token]


def play(
    scenario: Callable[[Scene], Coroutine[Any, Any, None]],
    backend: FakeBackend | None = None,
    signer: Signer = UNSIGNED,
) -> Scene:
    """Run a scenario beside the keeper's background task."""

    async def run() -> Scene:
        scene = Scene(backend or FakeBackend(), signer)
        keeping = asyncio.create_task(scene.keeper.run())
        playing = asyncio.create_task(scenario(scene))
        await asyncio.wait({keeping, playing}, return_when=asyncio.FIRST_COMPLETED)
        assert playing.done(), f"the keeper ended: {keeping}"
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        playing.result()
        return scene

    loop = VirtualLoop()
    try:
        return loop.run_until_complete(run())
    finally:
        loop.close()


def during(*spans: tuple[float, float, str]) -> Callable[[float], str | None]:
    """Failures from one moment to another."""

    def failure(moment: float) -> str | None:
        return next((kind for start, end, kind in spans if start <= moment < end), None)

    return failure


# --- renewing ---


def test_claims_are_renewed_every_sixth_of_the_lease() -> None:
    """And the guard's deadline moves to five sixths after each renewal."""

    async def scenario(scene: Scene) -> None:
        lease = scene.keep()
        for sixths in range(1, 13):
            await asyncio.sleep(LEASE / 6)
            await asyncio.sleep(TINY)
            assert lease.renewed_at == pytest.approx(sixths * LEASE / 6, abs=0.01)
            deadline = scene.guard.deadlines[lease.group]
            assert deadline == pytest.approx(lease.renewed_at + LEASE * 5 / 6)
            assert lease.ends_at == pytest.approx(lease.renewed_at + LEASE)

    assert len(play(scenario).backend.calls) == 12


def test_all_claims_are_renewed_in_one_call() -> None:
    """However many there are."""

    async def scenario(scene: Scene) -> None:
        tokens = tuple(scene.keep().claim.token for _ in range(5))
        await asyncio.sleep(LEASE)
        assert all(claims == tokens for _, claims in scene.backend.calls)
        assert 5 <= len(scene.backend.calls) <= 6

    play(scenario)


def test_nothing_is_renewed_when_there_is_nothing() -> None:
    """An idle worker asks the server nothing."""

    async def scenario(scene: Scene) -> None:
        await asyncio.sleep(1000)
        lease = scene.keep()
        scene.keeper.release(lease)
        await asyncio.sleep(1000)

    assert play(scenario).backend.calls == []


@pytest.mark.parametrize("waited", [0.0, 0.1, 3.0, 300.0])
def test_a_short_lease_beside_a_long_one_is_renewed_in_time(waited: float) -> None:
    """Runs with different leases share a worker; the shortest sets the pace from its first."""

    async def scenario(scene: Scene) -> None:
        long = scene.keep(3600)
        await asyncio.sleep(waited)
        short = scene.keep(1.0)
        for _ in range(100):
            await asyncio.sleep(0.05)
            scene.check()
            assert scene.guard.deadlines[short.group] > now()
        assert scene.stopped_at == {}
        assert now() - short.renewed_at <= 1 / 6 + 0.06
        scene.keeper.release(short)
        scene.keeper.release(long)

    play(scenario)


def test_frequent_new_leases_do_not_put_off_renewals() -> None:
    """A worker of many short steps renews its long one all the same."""

    async def scenario(scene: Scene) -> None:
        lasting = scene.keep()
        for _ in range(200):
            scene.keeper.release(scene.keep())
            await asyncio.sleep(LEASE / 30)
            assert scene.guard.deadlines[lasting.group] > now()
            assert now() - lasting.renewed_at < LEASE / 3

    play(scenario)


def test_a_released_claim_is_left_alone() -> None:
    """Not renewed, its child without a deadline, never stopped; found no more."""

    async def scenario(scene: Scene) -> None:
        lease = scene.keep()
        assert scene.keeper.find(lease.claim.task_id) is lease
        assert len(scene.keeper) == 1
        scene.keeper.release(lease)
        assert scene.keeper.find(lease.claim.task_id) is None
        assert len(scene.keeper) == 0
        assert scene.guard.deadlines == {}
        await asyncio.sleep(10 * LEASE)
        scene.keeper.stop(lease, StopReason.CANCELLED)
        scene.keeper.release(lease)

    scene = play(scenario)
    assert scene.backend.calls == []
    assert scene.stopped_at == {}


def test_a_claim_that_is_released_during_its_renewal_gets_no_deadline() -> None:
    """Its child may be at another task by then."""

    async def scenario(scene: Scene) -> None:
        lease = scene.keep()
        await asyncio.sleep(LEASE / 6 + 0.5)
        assert scene.backend.calls
        scene.keeper.release(lease)
        await asyncio.sleep(5)
        assert scene.guard.deadlines == {}

    assert play(scenario, FakeBackend(latency_seconds=2)).stopped_at == {}


def test_the_deadline_follows_the_child() -> None:
    """When the first child has died before the task began, the second one is guarded."""

    async def scenario(scene: Scene) -> None:
        lease = scene.keep()
        scene.keeper.guard_group(lease, 77)
        assert scene.guard.deadlines[77] == lease.renewed_at + LEASE * 5 / 6
        await asyncio.sleep(LEASE)
        assert scene.guard.deadlines[77] > now()

    play(scenario)


# --- stopping ---


def test_a_forged_order_to_cancel_stops_nothing() -> None:
    """With a key an order must be signed, for this task; a refused one counts once."""
    key = Signer(["k" * 32])

    async def scenario(scene: Scene) -> None:
        unsigned, foreign, ordered = scene.keep(), scene.keep(), scene.keep()
        order = cancel_order(key, ordered.claim.task_id, "enough")
        scene.backend.orders = {
            unsigned.claim.token: "enough",
            foreign.claim.token: order,
            ordered.claim.token: order,
        }
        await asyncio.sleep(LEASE)
        assert unsigned.stop_reason is foreign.stop_reason is None
        assert ordered.stop_reason is StopReason.CANCELLED

    assert play(scenario, signer=key).counts.refused_count == 2


def test_a_cancelled_task_is_stopped_once() -> None:
    """At the next renewal; its lease is kept, since its result is wanted."""

    async def scenario(scene: Scene) -> None:
        lease, other = scene.keep(), scene.keep()
        scene.backend.orders[lease.claim.token] = "enough"
        await asyncio.sleep(LEASE / 5)
        assert lease.stop_reason is StopReason.CANCELLED
        await asyncio.sleep(10 * LEASE)
        assert lease.stop_reason is StopReason.CANCELLED
        assert scene.guard.deadlines[lease.group] > now()
        assert other.stop_reason is None

    assert list(play(scenario).stopped_at) == ["token-1"]


def test_the_first_reason_stays() -> None:
    """A task that is stopped twice says why it was stopped."""

    async def scenario(scene: Scene) -> None:
        lease = scene.keep()
        scene.keeper.stop(lease, StopReason.WORKER_STOPS)
        scene.keeper.stop_all(StopReason.CANCELLED)
        assert lease.stop_reason is StopReason.WORKER_STOPS

    play(scenario)


def test_a_claim_that_is_not_held_stops_its_task() -> None:
    """Others may have judged; the guard's deadline is not moved any more."""

    async def scenario(scene: Scene) -> None:
        lease = scene.keep()
        await asyncio.sleep(LEASE / 5)
        deadline = scene.guard.deadlines[lease.group]
        scene.backend.not_held.add(lease.claim.token)
        await asyncio.sleep(LEASE)
        assert lease.is_lost
        assert lease.stop_reason is StopReason.LEASE_LOST
        assert scene.guard.deadlines[lease.group] == deadline
        stop = scene.stop_of(lease)
        assert stop
        assert stop < deadline

    play(scenario)


def test_what_is_executed_is_not_stopped() -> None:
    """The server may answer a renewal when it has stored the result, and before we know it."""

    async def scenario(scene: Scene) -> None:
        lease = scene.keep()
        await asyncio.sleep(LEASE / 5)
        lease.is_executed = True
        scene.backend.not_held.add(lease.claim.token)
        await asyncio.sleep(LEASE)
        assert lease.stop_reason is None
        assert not scene.stop_of(lease)

    play(scenario)


def test_the_end_of_a_run_stops_its_tasks() -> None:
    """When its loop is gone and nobody will resume it."""

    async def scenario(scene: Scene) -> None:
        lease = scene.keep()
        scene.backend.is_resumable = True
        scene.backend.is_run_alive = False
        await asyncio.sleep(10 * LEASE)
        assert lease.stop_reason is None
        assert scene.orphaned >= 10  # Dagster is asked after the run meanwhile
        scene.backend.is_resumable = False
        await asyncio.sleep(LEASE / 5)
        assert lease.stop_reason is StopReason.RUN_GONE

    play(scenario)


def test_in_a_new_epoch_the_run_has_a_lease_to_come_back() -> None:
    """The server has forgotten the loop's lease, which may live all the same."""

    async def scenario(scene: Scene) -> None:
        lease = scene.keep()
        await asyncio.sleep(LEASE)
        scene.backend.epoch = "e2"
        scene.backend.is_run_alive = False
        changed_at = now()
        await asyncio.sleep(LEASE - 0.1)
        assert lease.stop_reason is None
        await asyncio.sleep(LEASE / 2)
        assert lease.stop_reason is StopReason.RUN_GONE
        stop = scene.stop_of(lease)
        assert stop
        assert stop >= changed_at + LEASE

    play(scenario)


# --- outages ---


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    gaps=st.lists(st.floats(LEASE / 4, LEASE), min_size=1, max_size=4),
    away=st.floats(0, 0.49 * LEASE),
    kind=st.sampled_from(["refuse", "freeze", "vanish", "lose"]),
)
@example(gaps=[9.99], away=0.49 * LEASE, kind="refuse")
@example(gaps=[9.99], away=0.49 * LEASE, kind="freeze")
@example(gaps=[9.99], away=0.49 * LEASE, kind="vanish")
def test_a_short_outage_is_not_noticed(gaps: list[float], away: float, kind: str) -> None:
    """Shorter than half a lease, whenever it begins: nothing is stopped, nothing is killed."""

    async def scenario(scene: Scene) -> None:
        lease = scene.keep()
        while now() < moment + LEASE:
            await asyncio.sleep(0.5)
            scene.check()
            assert scene.guard.deadlines[lease.group] > now()

    failures, moment = [], 0.0
    for gap in gaps:
        failures.append((moment + gap, moment + gap + away, kind))
        moment += gap + away
    assert play(scenario, FakeBackend(failure=during(*failures))).stopped_at == {}


@pytest.mark.parametrize("kind", ["refuse", "freeze", "vanish"])
@pytest.mark.parametrize("lease_seconds", [1.0, 3.0, LEASE, 600.0])
def test_an_outage_interrupts_at_two_thirds_and_kills_at_five_sixths(
    kind: str, lease_seconds: float
) -> None:
    """So that clean-up code runs before the guard kills, also where the server does not answer."""

    async def scenario(scene: Scene) -> None:
        lease = scene.keep(lease_seconds)
        await asyncio.sleep(1.5 * lease_seconds)
        since = lease.renewed_at
        await asyncio.sleep(2 * lease_seconds)
        assert lease.renewed_at == since
        stop = scene.stop_of(lease)
        assert stop is not None
        assert lease.stop_reason is StopReason.LEASE_LOST
        share = (stop - since) / lease_seconds
        assert 4 / 6 - TINY <= share <= 9 / 12 + TINY
        deadline = scene.guard.deadlines[lease.group]
        assert (deadline - since) / lease_seconds == pytest.approx(5 / 6)

    play(scenario, FakeBackend(failure=during((lease_seconds, 1e9, kind))))


def test_lost_answers_interrupt_too() -> None:
    """Nobody here can know that the lease was renewed."""

    async def scenario(scene: Scene) -> None:
        lease = scene.keep()
        await asyncio.sleep(2 * LEASE)
        assert lease.stop_reason is StopReason.LEASE_LOST
        scene.check()

    play(scenario, FakeBackend(failure=during((0, 1e9, "lose"))))


def test_the_guard_is_asked_whenever_leases_are_renewed() -> None:
    """It must answer before the next renewal; an idle worker asks nothing."""

    async def scenario(scene: Scene) -> None:
        await asyncio.sleep(10 * LEASE)
        assert scene.guard.asked == []
        scene.keep()
        await asyncio.sleep(LEASE + TINY)

    assert play(scenario).guard.asked == [LEASE / 6] * 6


def test_a_task_that_no_guard_watches_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process is killed, and the task's end says why."""
    killed: list[int] = []
    monkeypatch.setattr(leases_module, "kill_group", killed.append)

    async def scenario(scene: Scene) -> None:
        lease, other = scene.keep(), scene.keep()
        scene.keeper.stop_unguarded(lease.group)
        assert killed == [lease.group]
        assert lease.stop_reason is StopReason.UNGUARDED
        assert other.stop_reason is None

    play(scenario)


@pytest.mark.parametrize("is_step", [True, False])
def test_a_process_that_is_stopped_for_a_lease_is_killed(
    is_step: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else would notice, since its claim is renewed; a shorter stop has no effect."""
    stopped: set[int] = set()
    killed: list[int] = []
    monkeypatch.setattr(leases_module, "_is_suspended", stopped.__contains__)
    monkeypatch.setattr(leases_module, "kill_group", killed.append)

    async def scenario(scene: Scene) -> None:
        lease, other, executed = (scene.keep() for _ in range(3))
        lease.is_step = other.is_step = is_step
        executed.is_executed = True
        stopped.update({lease.group, other.group, executed.group})
        await asyncio.sleep(LEASE / 2)
        stopped.remove(other.group)
        assert not killed
        await asyncio.sleep(LEASE)
        assert set(killed) == {lease.group}
        assert lease.stop_reason is StopReason.PROCESS_STOPPED
        assert other.stop_reason is executed.stop_reason is None

    play(scenario)


def test_an_outage_and_its_end_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """Not at every try."""

    async def scenario(scene: Scene) -> None:
        scene.keep(600)
        await asyncio.sleep(1000)

    caplog.set_level("INFO")
    play(scenario, FakeBackend(failure=during((150, 480, "refuse"))))
    assert caplog.text.count("Cannot renew") == 1
    assert caplog.text.count("is back") == 1


def test_other_errors_end_the_keeper_loudly() -> None:
    """Only an absent server is ridden out: the worker must not go on without its keeper."""

    class Broken(FakeBackend):
        async def renew(self, claims: Sequence[Claim]) -> list[Renewal]:
            raise ZeroDivisionError

    async def run() -> None:
        scene = Scene(Broken())
        scene.keep()
        with pytest.raises(ZeroDivisionError):
            await scene.keeper.run()

    loop = VirtualLoop()
    loop.run_until_complete(run())
    assert not asyncio.all_tasks(loop)
    loop.close()


def test_errors_of_the_server_other_than_absence_are_ridden_out_too() -> None:
    """A server out of memory refuses; it may take renewals again."""

    class Full(FakeBackend):
        async def renew(self, claims: Sequence[Claim]) -> list[Renewal]:
            if now() < LEASE / 2:
                raise ServerError(self.address, "out of memory")
            return await super().renew(claims)

    async def scenario(scene: Scene) -> None:
        lease = scene.keep()
        await asyncio.sleep(2 * LEASE)
        assert lease.stop_reason is None

    play(scenario, Full())


SPANS = st.lists(
    st.tuples(
        st.floats(0, 3 * LEASE),  # up
        st.floats(0, 3 * LEASE),  # away
        st.sampled_from(["refuse", "freeze", "vanish", "lose"]),
    ),
    max_size=6,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    spans=SPANS,
    latency=st.floats(0, LEASE / 3),
    timeout=st.floats(0.1, LEASE / 2),
    lengths=st.lists(st.sampled_from([1.0, 2.5, LEASE, 100.0]), min_size=1, max_size=3),
    pauses=st.lists(st.floats(0, LEASE), min_size=3, max_size=3),
)
def test_the_guard_kills_before_others_may_judge(
    spans: list[tuple[float, float, str]],
    latency: float,
    timeout: float,
    lengths: list[float],
    pauses: list[float],
) -> None:
    """After any outages, the guard's deadline lies before the lease's end at the server.

    And where a deadline passes, the task had been interrupted before it.
    """
    failures, moment = [], 0.0
    for up, away, kind in spans:
        failures.append((moment + up, moment + up + away, kind))
        moment += up + away
    backend = FakeBackend(latency, timeout, during(*failures))

    async def scenario(scene: Scene) -> None:
        kept: list[Lease] = []
        for length, pause in zip(lengths, pauses, strict=False):
            kept.append(scene.keep(length))
            await asyncio.sleep(pause)
        while now() < min(moment, 400) + LEASE:
            await asyncio.sleep(0.31)
            scene.check()
            for lease in list(scene.keeper._leases.values()):
                deadline = scene.guard.deadlines[lease.group]
                if now() >= deadline:
                    stop = scene.stop_of(lease)
                    assert stop is not None, "killed without a chance to clean up"
                    assert stop < deadline
                    scene.keeper.release(lease)

    play(scenario, replace(backend))
