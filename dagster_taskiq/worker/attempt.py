"""An attempt of this worker to execute one task, from its message to its stored result.

    TAKEN --claim--> CLAIMED --begin--> BEGUN --its end--> EXECUTED --store--> OVER
                        '------------its end------------> UNBEGUN --store, ack--> OVER

An attempt also ends as OVER from TAKEN, when the task is not granted; from EXECUTED without store,
when it is a copy; and from UNBEGUN without store and ack, when another worker is to start the run.

A step, or a run that is resumed, has begun once it is claimed: its message is acked then, since its
run's loop looks after the claim. A launched run has begun when its start is in Dagster's log: until
then nobody but its message's broker would notice that it died with its worker, since Dagster does
not look after a run that is STARTING.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from enum import Enum

from dagster_taskiq.backend import Claim, ClaimAnswer
from dagster_taskiq.brokers import Delivery
from dagster_taskiq.defaults import INTERRUPT_AFTER_LEASE_SHARE, ORPHAN_GRACE_SECONDS
from dagster_taskiq.errors import (
    CopyOfStepError,
    NoProcessError,
    ServerError,
    SlotError,
)
from dagster_taskiq.execution.arrivals import Arrival
from dagster_taskiq.messages.envelope import Envelope, QueueKind, TaskName
from dagster_taskiq.messages.results import Outcome, Place, TaskResult
from dagster_taskiq.worker.answers import cause_of, has_failed, result_of, sealed
from dagster_taskiq.worker.child_messages import Execute, Executed
from dagster_taskiq.worker.guard import clock
from dagster_taskiq.worker.leases import Lease, StopReason
from dagster_taskiq.worker.limit_timers import LimitTimers
from dagster_taskiq.worker.observer import Ending
from dagster_taskiq.worker.receiver import RELEASE_PAUSE_SECONDS
from dagster_taskiq.worker.slot_base import Slot
from dagster_taskiq.worker.slot_pool import prepare
from dagster_taskiq.worker.tools import Tools

logger = logging.getLogger(__name__)

#: Pause before a run is claimed again that another worker has claimed and not begun.
_PENDING_SECONDS = 0.5

#: Share of a lease within which its claim must be answered: the first renewal comes another sixth
#: later, and must be answered before the task is stopped as one that is not renewed.
_LATEST_ANSWER_SHARE = INTERRUPT_AFTER_LEASE_SHARE / 2

#: Pause before a result is offered again to a backend that was away.
_RETRY_SECONDS = 0.5


class State(Enum):
    """How far an attempt is; see the module."""

    #: It has a slot and no claim. When it ends here its message goes back to its queue, or is acked
    #: if nobody may execute the task.
    TAKEN = "taken"
    #: Its claim is kept; another worker gets the message if this one dies.
    CLAIMED = "claimed"
    #: Nobody else may have it: its message is acked, or about to be.
    BEGUN = "begun"
    #: Only its result is left to be stored.
    EXECUTED = "executed"
    #: A launched run that has ended, or failed to start, before its start was in the log.
    UNBEGUN = "unbegun"
    #: Its slot is free.
    OVER = "over"


class Attempt:
    """Executes one task in one slot; ``run`` is its whole life.

    Args:
        delivery: of the task's message, which was admitted.
        slot: that nobody else uses meanwhile.
        tools: see ``Tools``.
        is_draining: whether the worker takes no more tasks.
    """

    def __init__(
        self, delivery: Delivery, slot: Slot, tools: Tools, is_draining: Callable[[], bool]
    ) -> None:
        self.state = State.TAKEN
        self._delivery = delivery
        self._envelope: Envelope = delivery.content
        self._slot = slot
        self._tools = tools
        self._is_draining = is_draining
        self._taken_at = time.monotonic()
        self._acking: asyncio.Task[None] | None = None
        self._shortage: NoProcessError | None = None

    async def run(self) -> None:
        """Execute the task, drop it, or leave its message unsettled for another worker.

        Raises:
            NoProcessError: the slot can have no child now. The task is unclaimed, was given back,
                or is a resumed run whose failure is stored.
            CopyOfStepError: Dagster's log has the step's attempt as begun. No code ran and no
                result is stored; the message is acked, and the claim is left to end.
        """
        failure = await prepare(self._slot, self._envelope.code_location)
        claim = self._new_claim()
        claimed_at = await self._claim(claim)
        if claimed_at is None:
            self.state = State.OVER
            return
        lease = self._keep(claim, claimed_at)
        try:
            if not self._is_launched_run:
                self._begin(claim)
            result = self._fail(claim, failure) if failure else await self._execute(lease)
            await self._settle(lease, result)
        finally:
            self._tools.leases.release(lease)
            self.state = State.OVER
            self._tools.observer.released(self._envelope)
            if self._acking is not None:
                await self._acking
        if self._shortage is not None:
            raise self._shortage

    @property
    def _is_launched_run(self) -> bool:
        """Whether the task is a launched run: its expired claim does not count before it has begun.

        A run that is resumed is STARTED, so Dagster looks after it.
        """
        return self._envelope.name is TaskName.EXECUTE_JOB

    # --- claim ---

    def _new_claim(self) -> Claim:
        envelope, slot = self._envelope, self._slot
        return Claim(
            run_id=envelope.run_id,
            task_id=envelope.task_id,
            token=uuid.uuid4().hex,
            lease_seconds=envelope.lease_seconds,
            epoch=envelope.epoch,
            place=replace(self._tools.place, pid=slot.pid, slot=slot.number),
        )

    async def _claim(self, claim: Claim) -> float | None:
        """Claim the task; the time that its lease counts from, or None if it is not for us.

        What is only for now not for us is left unacked, and goes back to its queue.
        """
        while True:
            claimed_at = clock()
            try:
                answer = await self._tools.backend.claim(
                    claim,
                    needs_live_run=self._envelope.kind is QueueKind.STEPS,
                    until_begun=self._is_launched_run,
                )
            except ServerError as error:
                logger.warning("Cannot claim task %s: %s It goes back.", claim.task_id, error)
                await asyncio.sleep(RELEASE_PAUSE_SECONDS)
                return None
            if answer is ClaimAnswer.GRANTED:
                if clock() - claimed_at <= claim.lease_seconds * _LATEST_ANSWER_SHARE:
                    return claimed_at
                # it may have waited long for the server, and the task would be stopped at once
                continue
            if answer is not ClaimAnswer.PENDING:
                await self._ack()
                self._tools.observer.dropped(self._envelope, answer)
                return None
            if self._is_draining():
                return None
            await asyncio.sleep(_PENDING_SECONDS)

    def _keep(self, claim: Claim, claimed_at: float) -> Lease:
        lease = Lease(
            claim,
            self._slot.pid,
            claimed_at,
            lambda: self._stop(lease),
            lambda: self._look_at_run(lease),
            is_step=self._envelope.kind is QueueKind.STEPS,
        )
        self.state = State.CLAIMED
        self._arrival = Arrival.of(self._envelope, claimed_at=time.time())
        self._tools.leases.keep(lease)
        self._tools.observer.claimed(self._envelope)
        return lease

    # --- begin ---

    def _begin(self, claim: Claim) -> None:
        """Nobody else is to have the task any more."""
        self.state = State.BEGUN
        # beside the task, which is protected by the claim and need not wait for the servers
        self._acking = asyncio.create_task(self._note_begun(claim), name="ack")

    async def _note_begun(self, claim: Claim) -> None:
        if self._is_launched_run:
            try:
                await self._tools.backend.begin(claim)
            except ServerError as error:
                # should it be delivered again, Dagster's status of the run keeps it from starting
                logger.warning("Could not note that run %s began: %s", claim.run_id, error)
        await self._ack()

    async def _ack(self) -> None:
        try:
            await self._delivery.ack()
        except ServerError as error:
            # it will be delivered again, and dropped at the claim
            task_id = self._envelope.task_id
            logger.warning("Could not acknowledge task %s: %s", task_id, error)

    # --- execute ---

    def _fail(self, claim: Claim, failure: str) -> TaskResult:
        """The result of a task whose slot cannot be had ready."""
        result = TaskResult(Outcome.ERROR, claim.place, reason=failure)
        waited_seconds = time.monotonic() - self._taken_at
        ending = Ending(result.outcome, waited_seconds, None, cause_of(result), has_failed=True)
        self._tools.observer.ended(self._envelope, ending)
        return result

    async def _execute(self, lease: Lease) -> TaskResult:
        envelope, slot, place = self._envelope, self._slot, lease.claim.place
        self._tools.observer.began(envelope, place)
        timers = LimitTimers(slot, envelope.limits.or_else(self._tools.limits))
        order = Execute(
            envelope.name,
            envelope.payload,
            place,
            self._arrival,
            envelope.code_location,
            timers.limits.soft_seconds,
            envelope.run_id,
        )
        started_at = time.monotonic()
        left_behind = step_end = ""
        try:
            answer = await slot.run(
                order,
                lambda pid: self._tools.leases.guard_group(lease, pid),
                timers.start,
                lambda: self._note_start(lease.claim),
            )
            result = result_of(answer, lease, timers.verdict)
            if isinstance(answer, Executed):
                left_behind, step_end = answer.left_behind, answer.step_end
        except SlotError as error:
            result = self._result_without_child(place, error)
        finally:
            timers.cancel()
        waited_seconds = started_at - self._taken_at
        run_seconds = time.monotonic() - started_at
        ending = Ending(
            result.outcome,
            waited_seconds,
            run_seconds,
            cause_of(result),
            left_behind,
            has_failed(result, step_end),
            step_end,
            lease.stop_reason.name if lease.stop_reason else "",
        )
        self._tools.observer.ended(envelope, ending)
        return result

    def _result_without_child(self, place: Place, error: SlotError) -> TaskResult:
        """The result of a task whose child died before it began, and has no successor.

        The loop sends a step again that no process could be had for. Nobody would send a resumed
        run again: it ends, and Dagster's run monitoring decides.
        """
        if isinstance(error, NoProcessError):
            self._shortage = error
            if self._envelope.kind is QueueKind.STEPS:
                return TaskResult(Outcome.REFUSED, place, reason=f"{error}.")
        return TaskResult(Outcome.ERROR, place, reason=str(error))

    def _note_start(self, claim: Claim) -> None:
        """The start of a run is in Dagster's log; a run that is resumed had begun before."""
        if self.state is State.CLAIMED:
            self._begin(claim)

    # --- settle ---

    async def _settle(self, lease: Lease, result: TaskResult) -> None:
        """Store the result, and have everybody know of a launched run that has not begun."""
        lease.is_executed = True
        has_begun = self.state is State.BEGUN
        self.state = State.EXECUTED if has_begun else State.UNBEGUN
        if result.outcome is Outcome.COPY:
            # the claim is kept from everybody for a lease: by then the attempt that was begun has
            # ended, or its worker has stopped it, and the loop judges it by Dagster's log
            raise CopyOfStepError(result.reason.removesuffix("."))
        is_stopped = lease.stop_reason not in (None, StopReason.CANCELLED)
        if not has_begun and (is_stopped or self._shortage is not None):
            await self._let_go(lease.claim)
            return  # as it is neither acked nor completed, another worker starts it
        if await self._store(lease, result) and not has_begun:
            await self._end_unbegun(lease, result)
            await self._ack()

    async def _let_go(self, claim: Claim) -> None:
        """Let another worker have a run at once whose process is gone and had not begun."""
        try:
            await self._tools.backend.release(claim)
        except ServerError as error:
            logger.debug("The claim on run %s ends by itself: %s", claim.run_id, error)

    async def _store(self, lease: Lease, result: TaskResult) -> bool:
        """Store a result as long as the lease may hold; whether it is stored."""
        task_id = lease.claim.task_id
        data = sealed(result, self._envelope, self._tools.signer)
        while True:
            try:
                is_stored = await self._tools.backend.complete(
                    lease.claim,
                    data,
                    expires_seconds=self._tools.result_expires_seconds,
                    is_refused=result.outcome is Outcome.REFUSED,
                )
            except ServerError as error:
                if clock() >= lease.ends_at:
                    logger.error("The result of task %s is lost: %s", task_id, error)
                    return False
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            if not is_stored:
                logger.error("The result of task %s was refused: its lease had ended.", task_id)
                return False
            is_cancelled = lease.stop_reason is StopReason.CANCELLED
            self._tools.observer.completed(
                self._envelope, result, is_cancelled=is_cancelled, size_bytes=len(data)
            )
            return True

    async def _end_unbegun(self, lease: Lease, result: TaskResult) -> None:
        """Have Dagster know of a launched run that could not start.

        Only once its result is stored: until then another worker could take the run over.
        """
        reason = cause_of(result)
        is_refused = result.outcome is Outcome.REFUSED  # another worker may start it
        if reason and lease.stop_reason is None and not is_refused:
            await self._tools.run_watch.fail(self._envelope.payload, reason)

    # --- what the lease keeper calls ---

    def _stop(self, lease: Lease) -> None:
        """SIGTERM now, SIGKILL after the grace period unless it has ended by then.

        SIGKILL at once for a run that has not begun and is to start on another worker: it has
        nothing to clean up, and at a SIGTERM Dagster would fail it.
        """
        slot = self._slot
        if self.state is State.CLAIMED and lease.stop_reason is not StopReason.CANCELLED:
            slot.kill()
            return
        slot.interrupt()
        pid = slot.pid
        grace_seconds = self._envelope.cancel_grace_seconds
        if lease.stop_reason is StopReason.RUN_GONE:
            grace_seconds = min(grace_seconds, ORPHAN_GRACE_SECONDS)

        def kill() -> None:
            if slot.pid == pid:
                slot.kill()

        asyncio.get_running_loop().call_later(grace_seconds, kill)

    def _look_at_run(self, lease: Lease) -> None:
        """Stop a step whose run has no process, once Dagster has given the run up."""
        self._tools.run_watch.look(
            lease.claim.token,
            self._envelope.payload,
            lambda: self._tools.leases.stop(lease, StopReason.RUN_GONE),
        )
