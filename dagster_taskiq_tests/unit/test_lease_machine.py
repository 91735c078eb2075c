"""The lease keeper against a model, whatever happens to its claims, in virtual time.

Claims on steps and on runs come and go; the server is away, freezes, loses answers, forgets,
enters a new epoch, cancels; runs lose their loops; the worker drains. After each event time
passes, and then what was stopped, when and why must be what the rules of the house say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from dagster_taskiq.defaults import (
    INTERRUPT_AFTER_LEASE_SHARE,
    KILL_AFTER_LEASE_SHARE,
    RENEWALS_PER_LEASE,
)
from dagster_taskiq.worker.leases import Lease, StopReason
from dagster_taskiq_tests.unit.test_leases import LEASE, TINY, FakeBackend, Scene, VirtualLoop

pytestmark = pytest.mark.once

#: How long it takes at most until the keeper hears of something, with the server well.
SOON = LEASE / RENEWALS_PER_LEASE + 0.5


class Keeping(RuleBasedStateMachine):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualLoop()
        self.failure: str | None = None
        self.backend = FakeBackend(failure=lambda _: self.failure, timeout_seconds=5.0)
        self.scene: Scene = self.call(self._make())
        self.task = self.loop.create_task(self.scene.keeper.run())
        self.kept: list[Lease] = []
        self.released: dict[str, float] = {}
        self.well_since = 0.0
        self.gone_since: float | None = None
        self.is_draining = False
        self.epoch_since = 0.0
        self.claimed_at: dict[str, float] = {}
        self.judged_at: dict[str, float] = {}

    async def _make(self) -> Scene:
        return Scene(self.backend)

    def call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(coroutine)

    @property
    def now(self) -> float:
        return self.loop.time()

    def living(self) -> list[Lease]:
        return [it for it in self.kept if it.claim.token not in self.released]

    # --- what happens ---

    @precondition(lambda self: len(self.living()) < 4 and self.failure is None)
    @rule(is_run=st.booleans())
    def claim(self, is_run: bool) -> None:
        async def keep() -> Lease:
            lease = self.scene.keep()
            lease.is_step = not is_run
            lease.claim = replace(lease.claim, epoch=self.backend.epoch)
            note = lease.on_stop

            def on_stop() -> None:
                note()
                self._check_reason(lease)

            lease.on_stop = on_stop
            return lease

        self.kept.append(self.call(keep()))
        self.claimed_at[self.kept[-1].claim.token] = self.now

    @precondition(lambda self: self.living())
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        """Its result is stored: it is the keeper's affair no more."""
        lease = data.draw(st.sampled_from(self.living()))
        self.scene.keeper.release(lease)
        self.released[lease.claim.token] = self.now

    @precondition(lambda self: self.living())
    @rule(data=st.data(), how=st.sampled_from(["cancel", "forget"]))
    def judge(self, data: st.DataObject, how: str) -> None:
        token = data.draw(st.sampled_from(self.living())).claim.token
        if how == "cancel":
            self.backend.orders[token] = "the order to cancel"
        else:
            self.backend.not_held.add(token)
        self.judged_at.setdefault(token, self.now)

    @rule(failure=st.sampled_from([None, None, "refuse", "freeze", "vanish", "lose"]))
    def server(self, failure: str | None) -> None:
        if failure is None and self.failure is not None:
            self.well_since = self.now
        self.failure = failure

    @rule(is_alive=st.booleans(), is_resumable=st.booleans())
    def run_changes(self, is_alive: bool, is_resumable: bool) -> None:
        """Its loop dies or is back; it may be resumed or may not."""
        self.backend.is_run_alive, self.backend.is_resumable = is_alive, is_resumable
        is_gone = not is_alive and not is_resumable
        if not is_gone:
            self.gone_since = None
        elif self.gone_since is None:
            self.gone_since = self.now

    @rule()
    def new_epoch(self) -> None:
        self.backend.epoch += "'"
        self.epoch_since = self.now

    @rule()
    def drain(self) -> None:
        """Runs that can be resumed are handed over, and nothing else is stopped by it.

        One that can be later is handed over then.
        """
        before = set(self.scene.stopped_at)
        self.is_draining = True

        async def hand_over() -> None:
            self.scene.keeper.hand_over_runs()

        self.call(hand_over())
        for lease in self.living():
            if lease.claim.token in before:
                continue
            is_handed_over = lease.stop_reason is StopReason.HANDED_OVER
            assert is_handed_over == (not lease.is_step and lease.is_resumable)

    @rule(seconds=st.sampled_from([0.1, SOON, LEASE / 2, LEASE, 2 * LEASE]))
    def time_passes(self, seconds: float) -> None:
        """Whatever passed its deadline was killed by the guard, and so is over."""
        until = self.now + seconds
        while self.now < until:
            self.call(asyncio.sleep(min(0.25, max(TINY, until - self.now))))
            assert not self.task.done(), f"the keeper ended: {self.task}"
            for lease in self.living():
                self._check(lease)

    # --- what must hold ---

    def _check(self, lease: Lease) -> None:
        token = lease.claim.token
        stopped_at = self.scene.stopped_at.get(token)
        deadline = self.scene.guard.deadlines[lease.group]
        ends_at = self.backend.ends[token]
        assert deadline <= lease.renewed_at + LEASE * KILL_AFTER_LEASE_SHARE + TINY
        if token not in self.backend.not_held:
            assert deadline < ends_at, "the guard kills too late"
        if stopped_at is None and self.failure is None and self.now - self.well_since > LEASE:
            self._check_alive(lease)
        if self.now >= deadline:
            assert stopped_at is not None, "killed without a chance to clean up"
            assert stopped_at < deadline
            self.scene.keeper.release(lease)
            self.released[token] = self.now

    def _check_reason(self, lease: Lease) -> None:
        """At the moment of the stop: the reason is true, and no stop comes after the end."""
        token, reason = lease.claim.token, lease.stop_reason
        assert token not in self.released, "stopped after its end"
        if reason is StopReason.CANCELLED:
            assert token in self.backend.orders
        elif reason is StopReason.RUN_GONE:
            assert lease.is_step
            assert self.gone_since is not None, "its run lives, or may be resumed"
        elif reason is StopReason.LEASE_LOST:
            silent_for = self.now - lease.renewed_at
            assert lease.is_lost or silent_for >= LEASE * INTERRUPT_AFTER_LEASE_SHARE - TINY
        else:
            assert reason is StopReason.HANDED_OVER
            assert self.is_draining
            assert not lease.is_step
            assert lease.is_resumable

    def _check_alive(self, lease: Lease) -> None:
        """With the server well for a lease, what must stop has been stopped by now, or soon is."""
        assert self.now - lease.renewed_at < SOON, "it is not renewed"
        judged_at = self.judged_at.get(lease.claim.token, self.now)
        assert self.now - judged_at < SOON, "what was judged goes on"
        gone_since = self.now if self.gone_since is None else self.gone_since
        gone_for = self.now - max(gone_since, self.claimed_at[lease.claim.token])
        # an epoch that has just begun gives the run a lease to come back
        steady_for = self.now - max(self.epoch_since, self.well_since)
        if lease.is_step and steady_for > LEASE + SOON:
            assert gone_for < SOON, "a step outlives its run"
        may_stay = lease.is_step or not self.is_draining or not lease.is_resumable
        assert may_stay, "a run stays on a worker that stops"

    def teardown(self) -> None:
        self.task.cancel()
        self.call(asyncio.gather(self.task, return_exceptions=True))
        self.loop.close()


TestKeeping = Keeping.TestCase
TestKeeping.settings = settings(
    max_examples=75,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
