"""The lease keeper: it renews the worker's claims, and stops what may not go on.

``StopReason`` has every reason why a task may not go on; the usual ones are a cancel, a run without
a loop, and a lease that cannot be renewed. In the last case the keeper interrupts the task after
two thirds of the lease if the last try has failed, and after three quarters if that try has had no
answer yet, so that its clean-up code can run. The guard, which the keeper tells of every renewal,
kills it after five sixths: before the lease has ended for everybody else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import psutil

from dagster_taskiq.aio.renewals import keep_renewing
from dagster_taskiq.aio.vigil import EpochWatch
from dagster_taskiq.backend import Backend, Claim, Renewal
from dagster_taskiq.defaults import (
    INTERRUPT_AFTER_LEASE_SHARE,
    INTERRUPT_AT_LATEST_LEASE_SHARE,
    KILL_AFTER_LEASE_SHARE,
    RENEWALS_PER_LEASE,
)
from dagster_taskiq.errors import ServerError, UntrustedError
from dagster_taskiq.messages.control import OrderReader
from dagster_taskiq.worker.guard import clock, kill_group
from dagster_taskiq.worker.guard_client import GuardClient
from dagster_taskiq.worker.observer import LeaseRenewal, WorkerObserver

logger = logging.getLogger(__name__)


class StopReason(str, Enum):
    """Why a running task is stopped, as its page in the UI says it."""

    HANDED_OVER = "its worker stops and the run is handed over"
    PROCESS_STOPPED = "its process had been stopped (SIGSTOP) for longer than its lease"

    CANCELLED = "it was cancelled"
    RUN_GONE = "the process of its run is gone"
    UNGUARDED = "its worker's guard did not answer and could not be replaced in time"
    LEASE_LOST = "its worker could not renew its lease on it"
    WORKER_STOPS = "its worker was told to stop"


@dataclass
class Lease:
    """One claim being kept.

    Attributes:
        claim: the claim.
        group: the process group of the child that executes it.
        renewed_at: when the last renewal that succeeded was sent, by ``guard.clock``.
        on_stop: called once, when the task may not go on.
        on_orphaned: called at each renewal while its run has no process but may get another one.
        is_step: whether it is of a step, which ends with its run's loop; False for a whole run.
        stop_reason: why it was stopped, if it was.
        stop_cause: the same for people, to follow "stopped after"; empty if it was not.
        is_lost: whether the backend has said that the claim is not ours any more.
        is_resumable: whether another process would take over a run.
        suspended_since: since when its process has been seen stopped.
        refused_order: to cancel it, which is found again at each renewal.
        is_executed: whether only its result is left to be stored, so that there is nothing to stop.
    """

    claim: Claim
    group: int
    renewed_at: float
    on_stop: Callable[[], None]
    on_orphaned: Callable[[], None]
    is_step: bool = True
    stop_reason: StopReason | None = None
    stop_cause: str = ""
    is_lost: bool = False
    is_resumable: bool = False
    suspended_since: float | None = None
    refused_order: str | None = None
    is_executed: bool = False

    @property
    def ends_at(self) -> float:
        """When others may think that the task is lost."""
        return self.renewed_at + self.claim.lease_seconds


class LeaseKeeper:
    """Keeps the claims of one worker; ``run`` is its background task.

    Args:
        backend: which holds them.
        guard: is told of every deadline.
        orders: verifies the orders to cancel that renewals find.
        observer: hears of renewals, of outages, and of what is stopped.
        now: the clock of the deadlines, in seconds; the guard's own, but for tests.
    """

    def __init__(
        self,
        backend: Backend,
        guard: GuardClient,
        orders: OrderReader,
        observer: WorkerObserver,
        now: Callable[[], float] = clock,
    ) -> None:
        self._observer = observer
        self._now = now
        self._backend = backend
        self._guard = guard
        self._orders = orders
        self._leases: dict[str, Lease] = {}
        self._watch = EpochWatch(backend.address)
        self._outage = ""
        self._answered_at = float("-inf")
        self._added = asyncio.Event()
        self._hands_over = False

    def keep(self, lease: Lease) -> None:
        """Renew a claim from now on."""
        self._leases[lease.claim.token] = lease
        self.guard_group(lease, lease.group)
        self._added.set()
        self._added = asyncio.Event()

    def guard_group(self, lease: Lease, group: int) -> None:
        """The task is executed by this process group (after all, if its first child died)."""
        lease.group = group
        if group != lease.claim.place.pid:  # the next renewal tells it to whoever asks
            lease.claim = replace(lease.claim, place=replace(lease.claim.place, pid=group))
        deadline = lease.renewed_at + lease.claim.lease_seconds * KILL_AFTER_LEASE_SHARE
        self._guard.set_deadline(group, deadline)

    def release(self, lease: Lease) -> None:
        """The claim needs no renewal any more; its child may live."""
        self._leases.pop(lease.claim.token, None)
        self._guard.lift_deadline(lease.group)

    def find(self, task_id: str) -> Lease | None:
        """The lease on a task, if this worker holds it."""
        return next((it for it in self._leases.values() if it.claim.task_id == task_id), None)

    async def run(self) -> None:
        """Renew until cancelled."""
        # apart, since a renewal that a frozen server does not answer must not hold up the other
        tasks = [
            asyncio.create_task(
                keep_renewing(
                    self._renew_and_ask,
                    self._pause_seconds,
                    self._change,
                ),
                name="renew",
            ),
            asyncio.create_task(self._watch_overdue(), name="overdue"),
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _pause_seconds(self) -> float | None:
        """Between renewals, which are for the shortest lease."""
        lengths = [lease.claim.lease_seconds for lease in self._leases.values()]
        return min(lengths) / RENEWALS_PER_LEASE if lengths else None

    def _change(self) -> Awaitable[object]:
        """Waits for a new lease, also for one that comes before anybody awaits this."""
        return self._added.wait()

    async def _wait_for_new(self, seconds: float | None) -> None:
        """Wait so long, or until there is a new lease."""
        # not wait_for, which before Python 3.12 loses a cancellation that meets a new lease
        added = asyncio.ensure_future(self._added.wait())
        try:
            await asyncio.wait({added}, timeout=seconds)
        finally:
            added.cancel()

    async def _watch_overdue(self) -> None:
        """Stop what a renewal that fails has not stopped, since it still waits for its answer."""
        while True:
            share = INTERRUPT_AT_LATEST_LEASE_SHARE
            due = [
                lease.renewed_at + lease.claim.lease_seconds * share
                for lease in self._leases.values()
                if lease.stop_reason is None and not lease.is_executed
            ]
            left = min(due) - self._now() if due else None
            if left is None or left > 0:
                await self._wait_for_new(left)
            else:
                self._stop_overdue(share, self._now())

    async def _renew_and_ask(self) -> bool:
        is_renewed = await self._renew_all(list(self._leases.values()))
        pause_seconds = self._pause_seconds()
        if pause_seconds is not None:
            # an idle worker has nothing to ask about
            self._guard.ask(pause_seconds)
        return is_renewed

    async def _renew_all(self, leases: list[Lease]) -> bool:
        """One try; whether the server answered. Others may be under way."""
        sent_at = self._now()
        try:
            renewals = await self._backend.renew([lease.claim for lease in leases])
        except ServerError as error:
            if sent_at > self._answered_at:
                self._note_outage(error)
                self._stop_overdue(INTERRUPT_AFTER_LEASE_SHARE, sent_at)
            return False
        if sent_at > self._answered_at:  # else a later try knows better
            self._answered_at = sent_at
            if self._outage:
                self._observer.outage_over(self._backend.address)
            self._outage = ""
            self._observer.renewed(self._renewal(leases, renewals, sent_at))
            for lease, renewal in zip(leases, renewals, strict=True):
                self._watch.note_epoch(renewal.epoch, sent_at)
                self._apply(lease, renewal, sent_at)
        return True

    def _renewal(
        self, leases: list[Lease], renewals: Sequence[Renewal], sent_at: float
    ) -> LeaseRenewal:
        """What an observer hears of a renewal that was answered just now."""
        now = self._now()
        kept = [
            (lease, renewal)
            for lease, renewal in zip(leases, renewals, strict=True)
            if lease.claim.token in self._leases and not lease.is_executed
        ]
        left = [1 - (now - lease.renewed_at) / lease.claim.lease_seconds for lease, _ in kept]
        return LeaseRenewal(
            claims=len(kept),
            lost=sum(not renewal.is_held for _, renewal in kept),
            seconds=now - sent_at,
            least_left_share=min(left, default=1.0),
        )

    def _note_outage(self, error: ServerError) -> None:
        if not self._outage:
            self._observer.outage(self._backend.address, error)
        self._outage = str(error)

    def _apply(self, lease: Lease, renewal: Renewal, sent_at: float) -> None:
        if not renewal.is_held:
            lease.is_lost = True
            self.stop(lease, StopReason.LEASE_LOST)
            return
        lease.renewed_at = sent_at
        lease.is_resumable = renewal.is_resumable
        if lease.claim.token in self._leases:
            self.guard_group(lease, lease.group)
        why = self._why_to_cancel(lease, renewal.cancel_order)
        if why is not None:
            self.cancel(lease, why)
        elif not lease.is_step and self._hands_over and lease.is_resumable:
            self.stop(lease, StopReason.HANDED_OVER)
        elif lease.is_step and not renewal.is_run_alive and self._is_steady(lease):
            if renewal.is_resumable:
                lease.on_orphaned()
            else:
                self.stop(lease, StopReason.RUN_GONE)
        if not lease.is_executed:
            self._look_at_process(lease)

    def _why_to_cancel(self, lease: Lease, order: str | None) -> str | None:
        """What an order in the run's record says; None without one that is to be obeyed."""
        if order is None or order == lease.refused_order:
            return None
        try:
            return self._orders.check_cancel(lease.claim.task_id, order)
        except UntrustedError as error:
            lease.refused_order = order
            self._observer.refused(self._backend.address, "an order to cancel", error)
            return None

    def _is_steady(self, lease: Lease) -> bool:
        """Whether the run's loop has had the time to say, in this epoch, that it lives."""
        return (
            self._watch.epoch == lease.claim.epoch
            or self._watch.epoch_seconds(self._now()) >= lease.claim.lease_seconds
        )

    def _stop_overdue(self, share: float, when: float) -> None:
        """Stop what had not been renewed for that share of its lease at that moment."""
        for lease in list(self._leases.values()):
            if when >= lease.renewed_at + lease.claim.lease_seconds * share:
                outage = self._outage or f"{self._backend.address} does not answer."
                cause = f"{StopReason.LEASE_LOST.value}: {outage.removesuffix('.')}"
                self.stop(lease, StopReason.LEASE_LOST, cause)

    def stop(self, lease: Lease, reason: StopReason, cause: str = "") -> None:
        """Stop a task, once.

        Args:
            cause: for people, where more is known than the reason's own text.
        """
        if lease.stop_reason is not None or lease.claim.token not in self._leases:
            return
        # a renewal that the server answers after it has stored the result finds no claim
        if lease.is_executed:
            return
        lease.stop_reason = reason
        lease.stop_cause = cause or reason.value
        self._observer.stopped(lease.claim, lease.stop_cause)
        lease.on_stop()

    def cancel(self, lease: Lease, why: str) -> None:
        """Stop a task for an order; ``why`` is a sentence of who has given it, or empty."""
        cause = f"{StopReason.CANCELLED.value}: {why.removesuffix('.')}" if why else ""
        self.stop(lease, StopReason.CANCELLED, cause)

    def stop_unguarded(self, group: int) -> None:
        """Kill a process group that no guard would kill in time, and stop its task."""
        for lease in list(self._leases.values()):
            if lease.group == group:
                self.stop(lease, StopReason.UNGUARDED)
        kill_group(group)

    def _look_at_process(self, lease: Lease) -> None:
        """A process that is stopped would hold its claim for ever, since we renew it.

        One that a debugger holds is traced, not stopped, and may take its time.
        """
        if not _is_suspended(lease.group):
            lease.suspended_since = None
        elif lease.suspended_since is None:
            lease.suspended_since = self._now()
        elif self._now() - lease.suspended_since >= lease.claim.lease_seconds:
            self.stop(lease, StopReason.PROCESS_STOPPED)
            kill_group(lease.group)  # it cannot act on a SIGTERM

    def hand_over_runs(self) -> None:
        """Stop the runs that go on elsewhere; say which ones are waited for."""
        for lease in list(self._leases.values()):
            if lease.is_step:
                continue
            if lease.is_resumable:
                self.stop(lease, StopReason.HANDED_OVER)
            else:
                logger.info("Waiting for run %s: it cannot be resumed.", lease.claim.run_id)
        self._hands_over = True  # also one whose code is still being loaded, as soon as it can be

    def stop_all(self, reason: StopReason, cause: str = "") -> None:
        """Stop every task; see ``stop``."""
        for lease in list(self._leases.values()):
            self.stop(lease, reason, cause)

    def __len__(self) -> int:
        return len(self._leases)


def _is_suspended(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except (psutil.Error, OSError):  # the latter without descriptors
        return False
