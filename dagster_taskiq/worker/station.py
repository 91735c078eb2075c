"""A station: the slots of one kind, steps or runs, and what they take their tasks from.

    message --> claim --> ack --> slot --result--> complete

A launched run is acked when it has begun: until then nobody but its message's broker would notice
that it died with its worker, since Dagster does not look after a run that is STARTING.

Steps and runs have separate stations with separate physical queues, so that runs, which wait for
their steps, never take the slots that those need.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from taskiq import Context, TaskiqDepends

from dagster_taskiq.aio.loop_thread import end_tasks
from dagster_taskiq.backend import Backend, Claim, ClaimAnswer
from dagster_taskiq.brokers import TaskBroker
from dagster_taskiq.defaults import INTERRUPT_AFTER_LEASE_SHARE, ORPHAN_GRACE_SECONDS
from dagster_taskiq.errors import (
    NoProcessError,
    ServerError,
    SlotError,
    TooLargeError,
    UntrustedError,
)
from dagster_taskiq.messages.envelope import Envelope, QueueKind, TaskFormatter, TaskName
from dagster_taskiq.messages.results import Outcome, Place, TaskResult
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.messages.time_limits import TimeLimits
from dagster_taskiq.worker.guard import clock
from dagster_taskiq.worker.leases import Lease, LeaseKeeper, StopReason
from dagster_taskiq.worker.limit_timers import LimitTimers
from dagster_taskiq.worker.receiver import RELEASE_PAUSE_SECONDS, SettlingReceiver
from dagster_taskiq.worker.run_watch import RunWatch
from dagster_taskiq.worker.slot import ChildDied, Slot
from dagster_taskiq.worker.slot_pool import SlotPool

logger = logging.getLogger(__name__)

#: Pause before a run is claimed again that another worker has claimed and not begun.
_PENDING_SECONDS = 0.5

#: Share of a lease within which its claim must be answered: the first renewal comes another sixth
#: later, and must be answered before the task is stopped as one that is not renewed.
_LATEST_ANSWER_SHARE = INTERRUPT_AFTER_LEASE_SHARE / 2

#: Pause before a result is offered again to a backend that was away.
_RETRY_SECONDS = 0.5

_TASK_NAMES = {
    QueueKind.STEPS: (TaskName.EXECUTE_PLAN,),
    QueueKind.RUNS: (TaskName.EXECUTE_JOB, TaskName.RESUME_JOB),
}


class Station:
    """Takes tasks of one kind and has its slots execute them.

    Args:
        kind: of its tasks.
        broker: with the physical queues to listen on; not yet started.
        backend: where tasks are claimed.
        leases: keeps the claims.
        slots: not yet prepared.
        run_watch: speaks with Dagster about runs whose process is gone.
        place: of the worker; pid and slot are filled in for each task.
        result_expires_seconds: how long an unread result is kept.
        limits: of steps whose tags say nothing.
        signer: verifies tasks and signs results.
        queues: that it listens on, as people name them.
    """

    def __init__(
        self,
        kind: QueueKind,
        broker: TaskBroker,
        backend: Backend,
        leases: LeaseKeeper,
        slots: list[Slot],
        run_watch: RunWatch,
        place: Place,
        result_expires_seconds: float,
        limits: TimeLimits,
        signer: Signer,
        queues: Collection[str],
    ) -> None:
        self.kind = kind
        self._broker = broker
        self._backend = backend
        self._leases = leases
        self._slots = SlotPool(slots, kind.value)
        self._run_watch = run_watch
        self._looks: dict[str, asyncio.Task[None]] = {}
        self._place = place
        self._result_expires_seconds = result_expires_seconds
        self._limits = limits
        self._is_draining: Callable[[], bool] = lambda: False
        broker.is_worker_process = True
        self._signer = signer
        self._queues = queues
        broker.admit = self._admit
        broker.formatter = TaskFormatter()
        for name in _TASK_NAMES[kind]:
            self._register(name)

    async def reach(self) -> None:
        """Reach the broker.

        Raises:
            ServerError: it cannot be reached, or refuses.
        """
        await self._broker.startup()

    async def start(self) -> None:
        """Warm the slots.

        Raises:
            SlotError: a child cannot be started.
        """
        await self._slots.start()

    async def work(self, drain: asyncio.Event) -> None:
        """Take and execute tasks until told to drain; returns when the last one is done."""
        self._is_draining = drain.is_set

        async def recover() -> None:
            await self._slots.end_shortage(self._is_draining)

        await SettlingReceiver(self._broker, len(self._slots), recover).listen(drain)

    async def reload(self) -> None:
        """Give every slot a fresh child: at once where it is idle, else after its task."""
        await self._slots.reload()

    async def stop(self) -> None:
        """Kill what still runs, and leave the broker."""
        await self._slots.stop()
        await end_tasks(self._looks.values())
        await self._run_watch.stop()
        await self._broker.shutdown()

    @property
    def refused_count(self) -> int:
        """How many messages were refused."""
        return self._broker.refused_count

    @property
    def is_short(self) -> bool:
        """Whether it takes no tasks, since it cannot start processes for them."""
        return self._slots.is_short

    def _admit(self, data: bytes) -> None:
        """Raises UntrustedError or MalformedTaskError for what must not be executed here."""
        envelope = Envelope.from_bytes(data, self._signer)
        is_ours = envelope.kind is self.kind and envelope.queue in self._queues
        if self._signer.is_active and not is_ours:
            raise UntrustedError(f"it was sent to the {envelope.kind.value} of {envelope.queue!r}")

    # --- one task ---

    def _register(self, name: TaskName) -> None:
        async def execute(
            header: dict[str, Any],
            payload: str,
            context: Context = TaskiqDepends(),  # noqa: B008 - Taskiq's way to ask for it
        ) -> None:
            await self._execute(Envelope.from_header(header, payload), context)

        self._broker.register_task(execute, task_name=name.value)

    async def _execute(self, envelope: Envelope, context: Context) -> None:
        """Execute a message that ``admit`` has let through."""
        if self._is_draining():
            return  # unclaimed: the receiver gives it back
        slot = self._slots.take(envelope.code_location)
        try:
            await self._execute_in(slot, envelope, context)
        except NoProcessError as error:
            # the receiver gives back what was not acked
            self._slots.note_shortage(slot, error)
        finally:
            await self._slots.put_back(slot, is_needed=not self._is_draining())

    async def _execute_in(self, slot: Slot, envelope: Envelope, context: Context) -> None:
        failure = await self._slots.prepare(slot, envelope.code_location)
        claim = Claim(
            run_id=envelope.run_id,
            task_id=envelope.task_id,
            token=uuid.uuid4().hex,
            lease_seconds=envelope.lease_seconds,
            epoch=envelope.epoch,
            place=replace(self._place, pid=slot.pid, slot=slot.number),
        )
        claimed_at = await self._claim(claim, envelope, context)
        if claimed_at is None:
            return
        acking: list[asyncio.Task[None]] = []
        lease = Lease(
            claim,
            slot.pid,
            claimed_at,
            lambda: self._stop_task(slot, envelope, lease, has_begun=bool(acking)),
            lambda: self._look_after_orphan(lease, envelope),
            needs_live_run=self.kind is QueueKind.STEPS,
        )
        self._leases.keep(lease)

        def begin() -> None:
            # beside the task, which is protected by the claim and need not wait for the servers
            acking.append(asyncio.create_task(self._begin(claim, envelope, context), name="ack"))

        if not _is_until_begun(envelope):
            begin()
        try:
            result = failure and TaskResult(Outcome.ERROR, claim.place, reason=failure)
            result = result or await self._run_in(slot, envelope, lease, begin)
            lease.is_executed = True
            if result.outcome is Outcome.COPY:
                # the claim is kept from everybody for a lease: by then the attempt that was begun
                # has ended, or its worker has stopped it, and the loop judges it by Dagster's log
                self._broker.note_refused(UntrustedError(result.reason.removesuffix(".")))
                return
            if not acking and lease.stop_reason not in (None, StopReason.CANCELLED):
                return  # it has not begun: as it is neither acked nor completed, another starts it
            if await self._store(lease, envelope, result) and not acking:
                await self._end_unbegun(lease, envelope, result)
                await self._ack(envelope, context)
        except NoProcessError as error:
            if acking:
                await self._give_back(lease, envelope, error)
            raise
        finally:
            self._leases.release(lease)
            await asyncio.gather(*acking)

    async def _claim(self, claim: Claim, envelope: Envelope, context: Context) -> float | None:
        """Claim the task; the time that its lease counts from, or None if it is not for us.

        What is only for now not for us is left unacked, and goes back to its queue.
        """
        while True:
            claimed_at = clock()
            try:
                answer = await self._backend.claim(
                    claim,
                    needs_live_run=self.kind is QueueKind.STEPS,
                    until_begun=_is_until_begun(envelope),
                )
            except ServerError as error:
                logger.warning("Cannot claim task %s: %s It goes back.", envelope.task_id, error)
                await asyncio.sleep(RELEASE_PAUSE_SECONDS)
                return None
            if answer is ClaimAnswer.GRANTED:
                if clock() - claimed_at <= claim.lease_seconds * _LATEST_ANSWER_SHARE:
                    return claimed_at
                # it may have waited long for the server, and the task would be stopped at once
                continue
            if answer is not ClaimAnswer.PENDING:
                await self._ack(envelope, context)
                logger.info("Dropped task %s: it is %s.", envelope.task_id, answer.value)
                return None
            if self._is_draining():
                return None
            await asyncio.sleep(_PENDING_SECONDS)

    async def _begin(self, claim: Claim, envelope: Envelope, context: Context) -> None:
        """Nobody else is to have the task any more."""
        if _is_until_begun(envelope):
            try:
                await self._backend.begin(claim)
            except ServerError as error:
                # should it be delivered again, Dagster's status of the run keeps it from starting
                logger.warning("Could not note that run %s began: %s", envelope.run_id, error)
        await self._ack(envelope, context)

    async def _end_unbegun(self, lease: Lease, envelope: Envelope, result: TaskResult) -> None:
        """Have Dagster know of a launched run that could not start.

        Only once its result is stored: until then another worker could take the run over.
        """
        reason = _cause(result)
        is_refused = result.outcome is Outcome.REFUSED  # another worker may start it
        if reason and lease.stop_reason is None and not is_refused:
            await self._run_watch.fail(envelope.payload, reason)

    async def _give_back(self, lease: Lease, envelope: Envelope, error: NoProcessError) -> None:
        """Have the loop send a step again whose child died, and has no successor, before it began.

        Nobody would send a resumed run again: it ends, and Dagster's run monitoring decides.
        """
        is_step = envelope.name is TaskName.EXECUTE_PLAN
        outcome = Outcome.REFUSED if is_step else Outcome.ERROR
        lease.is_executed = True
        await self._store(
            lease, envelope, TaskResult(outcome, lease.claim.place, reason=f"{error}.")
        )

    async def _ack(self, envelope: Envelope, context: Context) -> None:
        try:
            await context.ack()
        except ServerError as error:
            # it will be delivered again, and dropped at the claim
            logger.warning("Could not acknowledge task %s: %s", envelope.task_id, error)

    async def _run_in(
        self, slot: Slot, envelope: Envelope, lease: Lease, on_begun: Callable[[], None]
    ) -> TaskResult:
        title = envelope.title
        logger.info("%s: starting in slot %d.", title, slot.number)
        task: dict[str, Any] = {
            "name": envelope.name.value,
            "payload": envelope.payload,
            "code_location": envelope.code_location,
            "place": vars(lease.claim.place),
            "queue": envelope.queue,
        }
        started_at = time.monotonic()
        timers = LimitTimers(slot, envelope.limits.or_else(self._limits))
        task["soft_timeout_seconds"] = timers.limits.soft_seconds
        try:
            answer = await slot.run(
                task, lambda pid: self._leases.guard_group(lease, pid), timers.start, on_begun
            )
            result = _result_of(answer, lease, timers.verdict)
            _say_what_is_left(title, answer)
        except NoProcessError:
            raise
        except SlotError as error:
            result = TaskResult(Outcome.ERROR, lease.claim.place, reason=str(error))
        finally:
            timers.cancel()
        level = logging.INFO if result.outcome is Outcome.FINISHED else logging.WARNING
        seconds = time.monotonic() - started_at
        logger.log(level, "%s: ended after %.3f s. %s", title, seconds, _cause(result))
        return result

    def _sealed(self, envelope: Envelope, result: TaskResult) -> bytes:
        """The result as it is stored; of one that is too large only the reason why it is not sent.

        The loop then reads in Dagster's log, which has all of the step's events, how it ended.
        """
        try:
            return result.to_bytes(self._signer, envelope.task_id)
        except TooLargeError as error:
            reason = str(error.of(f"{envelope.title} returned too much"))
            logger.error("%s", reason)
            unsent = TaskResult(Outcome.DIED, result.place, reason=reason)
            return unsent.to_bytes(self._signer, envelope.task_id)

    async def _store(self, lease: Lease, envelope: Envelope, result: TaskResult) -> bool:
        """Store a result as long as the lease may hold; whether it is stored."""
        data = self._sealed(envelope, result)
        while True:
            try:
                is_stored = await self._backend.complete(
                    lease.claim,
                    data,
                    expires_seconds=self._result_expires_seconds,
                    is_refused=result.outcome is Outcome.REFUSED,
                )
            except ServerError as error:
                if clock() >= lease.ends_at:
                    task_id = lease.claim.task_id
                    logger.error("The result of task %s is lost: %s", task_id, error)
                    return False
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            if not is_stored:
                logger.error(
                    "The result of task %s was refused: its lease had ended.", lease.claim.task_id
                )
            return is_stored

    def _stop_task(self, slot: Slot, envelope: Envelope, lease: Lease, *, has_begun: bool) -> None:
        """SIGTERM now, SIGKILL after the grace period unless it has ended by then.

        SIGKILL at once for a run that has not begun and is to start on another worker: it has
        nothing to clean up, and at a SIGTERM Dagster would fail it.
        """
        if not has_begun and lease.stop_reason is not StopReason.CANCELLED:
            slot.kill()
            return
        slot.interrupt()
        pid = slot.pid
        grace_seconds = envelope.cancel_grace_seconds
        if lease.stop_reason is StopReason.RUN_GONE:
            grace_seconds = min(grace_seconds, ORPHAN_GRACE_SECONDS)

        def kill() -> None:
            if slot.pid == pid:
                slot.kill()

        asyncio.get_running_loop().call_later(grace_seconds, kill)

    def _look_after_orphan(self, lease: Lease, envelope: Envelope) -> None:
        """Stop a step whose run has no process, once Dagster has given the run up."""
        token = lease.claim.token

        async def look() -> None:
            try:
                if await self._run_watch.is_over(envelope.payload):
                    self._leases.stop(lease, StopReason.RUN_GONE)
            finally:
                del self._looks[token]

        if token not in self._looks:
            self._looks[token] = asyncio.create_task(look(), name=f"look after {envelope.run_id}")


def _is_until_begun(envelope: Envelope) -> bool:
    """Whether a claim on the task counts only while it is held, until the task has begun.

    Not that of a run that is resumed: it is STARTED, so Dagster looks after it.
    """
    return envelope.name is TaskName.EXECUTE_JOB


def _result_of(answer: Mapping[str, Any] | ChildDied, lease: Lease, verdict: str) -> TaskResult:
    if isinstance(answer, ChildDied):
        why = lease.stop_cause or verdict
        why = why and f" after {why}"
        return TaskResult(
            Outcome.DIED,
            lease.claim.place,
            reason=f"{answer}{why}.",
            exit_code=answer.exit_code,
            is_cancelled=lease.stop_reason is StopReason.CANCELLED,
        )
    result = TaskResult.from_bytes(answer["result"].encode())
    if not result.is_cancelled:
        return result
    # the child knows that it was interrupted, but not by whom: only a cancel rules out a retry
    result = replace(result, is_cancelled=lease.stop_reason is StopReason.CANCELLED)
    if result.outcome is Outcome.UNLOGGED:
        return result  # its reason is what the database said
    why = lease.stop_cause or "a signal that its worker had not sent"
    return replace(result, reason=f"{result.reason.removesuffix('.')} after {why}.")


def _say_what_is_left(title: str, answer: Mapping[str, Any] | ChildDied) -> None:
    if not isinstance(answer, ChildDied) and answer.get("left_behind"):
        logger.warning("%s left behind %s: its process is replaced.", title, answer["left_behind"])


def _cause(result: TaskResult) -> str:
    """Why a task ended other than by its own end; empty where there is nothing to say."""
    return result.reason or str((result.error or {}).get("message", ""))
