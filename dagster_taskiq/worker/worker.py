"""The worker: it takes tasks, claims them, has its slots execute them and stores what came of it.

    receiver --message--> claim --> ack --> slot --result--> complete
                                             |
    lease keeper: renews the claim, stops the slot       guard: kills it if the worker cannot

Background tasks, each with a name: ``receiver``, ``leases``, ``heartbeat``, ``control``,
``guard``. When one of them fails the worker stops loudly. Stopping is one ordered list, ``_stop``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from taskiq import Context, TaskiqDepends

from dagster_taskiq.backend import Backend, Claim, ClaimAnswer, WorkerRecord, open_backend
from dagster_taskiq.brokers import TaskBroker, open_broker
from dagster_taskiq.connections import Servers
from dagster_taskiq.defaults import (
    HEARTBEAT_SECONDS,
    RESULT_EXPIRES_SECONDS,
    WORKER_EXPIRES_SECONDS,
)
from dagster_taskiq.envelope import PROTOCOL, Envelope, QueueKind, TaskName, physical_queue
from dagster_taskiq.errors import DagsterTaskiqError, ServerError, SlotError
from dagster_taskiq.results import Outcome, Place, TaskResult
from dagster_taskiq.version import __version__
from dagster_taskiq.worker.child import ChildOptions
from dagster_taskiq.worker.guard import clock
from dagster_taskiq.worker.guard_client import GuardClient
from dagster_taskiq.worker.leases import Lease, LeaseKeeper, StopReason
from dagster_taskiq.worker.receiver import RELEASE_PAUSE_SECONDS, SettlingReceiver
from dagster_taskiq.worker.slot import ChildDied, Slot, fork_server

logger = logging.getLogger(__name__)

#: Pause before a server that was away is tried again.
_RETRY_SECONDS = 0.5

#: How long one wait for control messages lasts before it is begun anew.
_CONTROL_WAIT_SECONDS = 15.0


@dataclass(frozen=True)
class WorkerOptions:
    """How a worker is started.

    Attributes:
        name: without the host.
        queues: as people name them, in no order.
        slots: how many steps run at once.
        include: modules that every child imports first.
        log_level: a name.
        max_tasks_per_child, max_memory_per_child_kib: see ``Slot``; 0 is never.
        drain_timeout_seconds: how long running steps may finish when the worker is told to stop.
        result_expires_seconds: how long an unread result is kept.
    """

    name: str
    queues: tuple[str, ...]
    slots: int
    include: tuple[str, ...] = ()
    log_level: str = "INFO"
    max_tasks_per_child: int = 0
    max_memory_per_child_kib: int = 0
    drain_timeout_seconds: float = 3600.0
    result_expires_seconds: float = RESULT_EXPIRES_SECONDS


class WorkerFailedError(DagsterTaskiqError):
    """A part of the worker ended that must not end; the message names it."""


class Worker:
    """One worker process; ``run`` is its whole life.

    Args:
        servers: broker and backend.
        options: see ``WorkerOptions``.
        on_ready: called when it takes tasks.
    """

    def __init__(
        self,
        servers: Servers,
        options: WorkerOptions,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_ready = on_ready
        self._options = options
        self._host = socket.gethostname()
        self.name = f"{options.name}@{self._host}"
        self._worker_id = uuid.uuid4().hex
        self._started_at = time.time()
        self._backend: Backend = open_backend(servers.backend)
        prefix = servers.broker.key_prefix
        queues = [physical_queue(prefix, QueueKind.STEPS, name) for name in options.queues]
        self._broker: TaskBroker = open_broker(servers.broker, queues)
        self._broker.is_worker_process = True
        self._broker.admit = Envelope.from_bytes
        self._register_tasks()
        self._guard = GuardClient()
        self._leases = LeaseKeeper(self._backend, self._guard)
        self._slots: list[Slot] = []
        self._idle: list[Slot] = []
        self._drain = asyncio.Event()
        self._cancel_now = asyncio.Event()
        self._was_cut_short = False

    # --- life ---

    async def run(self) -> bool:
        """Work until told to stop.

        Returns:
            whether every step that it had begun could finish.

        Raises:
            ServerError: broker or backend cannot be reached, or refuse.
            SlotError: the children cannot be started.
            WorkerFailedError: a background task failed.
        """
        try:
            await self._start()
            await self._work()
        finally:
            await self._stop()
        return not self._was_cut_short

    def drain(self) -> None:
        """Take no more tasks; what runs may finish. A second call cancels what runs."""
        if self._drain.is_set():
            logger.warning("Told to stop again: cancelling the running steps.")
            self._cancel_now.set()
        else:
            logger.info(
                "Stopping: no new steps; %d running may finish within %g seconds.",
                len(self._leases),
                self._options.drain_timeout_seconds,
            )
        self._drain.set()

    async def _start(self) -> None:
        await self._backend.startup()
        await self._broker.startup()
        self._guard.start()
        context = fork_server()
        for number in range(1, self._options.slots + 1):
            child = ChildOptions(self._options.include, self._options.log_level, number)
            self._slots.append(
                Slot(
                    context,
                    self._guard,
                    child,
                    max_tasks=self._options.max_tasks_per_child,
                    max_memory_kib=self._options.max_memory_per_child_kib,
                )
            )
        outcomes = await asyncio.gather(
            *(slot.prepare() for slot in self._slots), return_exceptions=True
        )
        for outcome in outcomes:
            if outcome is not None:
                raise outcome
        self._idle = list(reversed(self._slots))
        await self._send_heartbeat()
        logger.info(
            "Worker %s is ready: %d slots, queues %s, broker %s, backend %s.",
            self.name,
            self._options.slots,
            ", ".join(self._options.queues),
            self._broker.address,
            self._backend.address,
        )
        self._on_ready()

    async def _work(self) -> None:
        receiver = SettlingReceiver(self._broker, self._options.slots)
        receiving = asyncio.create_task(receiver.listen(self._drain), name="receiver")
        others = [
            asyncio.create_task(self._leases.run(), name="leases"),
            asyncio.create_task(self._heartbeats(), name="heartbeat"),
            asyncio.create_task(self._obey_control(), name="control"),
            asyncio.create_task(self._guard.monitor(), name="guard"),
        ]
        draining = asyncio.create_task(self._drain.wait(), name="drain")
        try:
            await self._until_one_ends([receiving, draining, *others])
            await self._finish_running(receiving, others)
        finally:
            await _cancel({receiving, draining, *others})

    async def _until_one_ends(self, tasks: list[asyncio.Task[Any]]) -> None:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if task.get_name() != "drain" and not self._drain.is_set():
                error = task.exception()
                raise WorkerFailedError(
                    f"The worker's task {task.get_name()!r} ended: {error!r}. It stops, since it "
                    "cannot keep its promises without it."
                ) from error

    async def _finish_running(
        self, receiving: asyncio.Task[None], others: list[asyncio.Task[None]]
    ) -> None:
        """Drain: wait for what runs, then cancel it."""
        await self._send_heartbeat_quietly()
        cancelling = asyncio.create_task(self._cancel_now.wait(), name="cancel-now")
        try:
            await asyncio.wait(
                {receiving, cancelling, *others},
                timeout=self._options.drain_timeout_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            cancelling.cancel()
        if not receiving.done():
            self._was_cut_short = len(self._leases) > 0
            self._leases.stop_all(StopReason.WORKER_STOPS)
        await receiving

    async def _stop(self) -> None:
        """Stop in order: first what others rely on, last what protects them from us."""
        # children first: nothing of ours may run when the list of workers says we are gone
        for slot in self._slots:
            await slot.stop()
        try:
            await self._backend.goodbye(self._worker_id)
        except ServerError as error:
            logger.warning("Could not sign off: %s The listing will show it for a while.", error)
        await self._broker.shutdown()
        await self._backend.shutdown()
        # last, since it kills whatever the lines above have left
        self._guard.close()

    # --- one task ---

    def _register_tasks(self) -> None:
        async def execute_plan(
            header: dict[str, Any],
            payload: dict[str, Any],
            context: Context = TaskiqDepends(),  # noqa: B008 - Taskiq's way to ask for it
        ) -> None:
            await self._execute_plan(header, payload, context)

        self._broker.register_task(execute_plan, task_name=TaskName.EXECUTE_PLAN.value)

    async def _execute_plan(
        self, header: dict[str, Any], payload: dict[str, Any], context: Context
    ) -> None:
        """Execute a message that ``admit`` has let through."""
        envelope = Envelope.from_header(header, payload)
        if self._drain.is_set():
            return  # unclaimed: the receiver gives it back
        slot = self._idle.pop()
        try:
            await self._execute_in(slot, envelope, context)
        finally:
            # warm again before the next message is taken, so that none waits for it in our hands
            failure = await _prepare(slot)
            if failure:
                logger.error("No child: %s. The next step fails with that reason.", failure)
            self._idle.append(slot)

    async def _execute_in(self, slot: Slot, envelope: Envelope, context: Context) -> None:
        failure = _foreign_protocol(envelope) or await _prepare(slot)
        place = Place(self.name, self._worker_id, self._host, slot.pid, slot.number)
        claim = Claim(
            run_id=envelope.run_id,
            task_id=envelope.task_id,
            token=uuid.uuid4().hex,
            lease_seconds=envelope.lease_seconds,
            epoch=envelope.epoch,
            place=place,
        )
        claimed_at = clock()
        try:
            answer = await self._backend.claim(claim, needs_live_run=True)
        except ServerError as error:
            logger.warning("Cannot claim task %s: %s It goes back.", envelope.task_id, error)
            await asyncio.sleep(RELEASE_PAUSE_SECONDS)
            return
        await self._ack(envelope, context)
        if answer is not ClaimAnswer.GRANTED:
            logger.info("Dropped task %s: it is %s.", envelope.task_id, answer.value)
            return
        lease = Lease(claim, slot.pid, claimed_at, lambda: self._stop_task(slot, envelope))
        self._leases.keep(lease)
        try:
            result = failure and TaskResult(Outcome.ERROR, place, reason=failure)
            await self._store(lease, result or await self._run_in(slot, envelope, lease))
        finally:
            self._leases.release(lease)

    async def _ack(self, envelope: Envelope, context: Context) -> None:
        try:
            await context.ack()
        except ServerError as error:
            # it will be delivered again, and dropped at the claim
            logger.warning("Could not acknowledge task %s: %s", envelope.task_id, error)

    async def _run_in(self, slot: Slot, envelope: Envelope, lease: Lease) -> TaskResult:
        logger.info(
            "Step %s of run %s, attempt %d: starting in slot %d.",
            envelope.step_key,
            envelope.run_id,
            envelope.attempt,
            slot.number,
        )
        task = {
            "payload": dict(envelope.payload),
            "place": vars(lease.claim.place),
            "queue": envelope.queue,
        }
        started_at = time.monotonic()
        try:
            answer = await slot.run(task, lambda pid: self._leases.guard_group(lease, pid))
        except SlotError as error:
            return TaskResult(Outcome.ERROR, lease.claim.place, reason=str(error))
        logger.info(
            "Step %s of run %s, attempt %d: ended after %.3f s.",
            envelope.step_key,
            envelope.run_id,
            envelope.attempt,
            time.monotonic() - started_at,
        )
        return self._result_of(answer, lease)

    def _result_of(self, answer: Mapping[str, Any] | ChildDied, lease: Lease) -> TaskResult:
        if isinstance(answer, ChildDied):
            why = f" after {lease.stop_reason.value}" if lease.stop_reason else ""
            return TaskResult(
                Outcome.DIED,
                lease.claim.place,
                reason=f"{answer}{why}.",
                exit_code=answer.exit_code,
                is_cancelled=lease.stop_reason is StopReason.CANCELLED,
            )
        return TaskResult.from_bytes(answer["result"].encode())

    async def _store(self, lease: Lease, result: TaskResult) -> None:
        """Store a result as long as the lease may hold."""
        while True:
            try:
                is_stored = await self._backend.complete(
                    lease.claim,
                    result.to_bytes(),
                    expires_seconds=self._options.result_expires_seconds,
                )
            except ServerError as error:
                if clock() >= lease.ends_at:
                    logger.error(
                        "The result of task %s is lost with its lease: %s",
                        lease.claim.task_id,
                        error,
                    )
                    return
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            if not is_stored:
                logger.error(
                    "The result of task %s was refused: its lease had ended.", lease.claim.task_id
                )
            return

    def _stop_task(self, slot: Slot, envelope: Envelope) -> None:
        """SIGTERM now, SIGKILL after the grace period unless it has ended by then."""
        slot.interrupt()
        pid = slot.pid
        loop = asyncio.get_running_loop()

        def kill() -> None:
            if slot.pid == pid:
                slot.kill()

        loop.call_later(envelope.cancel_grace_seconds, kill)

    # --- background ---

    async def _heartbeats(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            await self._send_heartbeat_quietly()

    async def _send_heartbeat_quietly(self) -> None:
        try:
            await self._send_heartbeat()
        except ServerError as error:
            logger.debug("No heartbeat: %s", error)  # the keeper and the broker say it aloud

    async def _send_heartbeat(self) -> None:
        record = WorkerRecord(
            worker_id=self._worker_id,
            name=self.name,
            host=self._host,
            pid=os.getpid(),
            queues=self._options.queues,
            slots=self._options.slots,
            busy_slots=len(self._leases),
            state="draining" if self._drain.is_set() else "running",
            started_at=self._started_at,
            version=__version__,
        )
        await self._backend.heartbeat(record, expires_seconds=WORKER_EXPIRES_SECONDS)

    async def _obey_control(self) -> None:
        while True:
            try:
                messages = await self._backend.wait_for_control(
                    self._worker_id, _CONTROL_WAIT_SECONDS
                )
            except ServerError:
                await asyncio.sleep(_RETRY_SECONDS)  # a cancel is also seen at the next renewal
                continue
            for message in messages:
                self._obey(message)

    def _obey(self, message: Mapping[str, Any]) -> None:
        kind = message.get("kind")
        if kind == "cancel":
            lease = self._leases.find(str(message.get("task_id")))
            if lease is not None:
                self._leases.stop(lease, StopReason.CANCELLED)
        elif kind == "terminate":
            self.drain()
        else:
            logger.warning("Ignored a control message of an unknown kind: %r.", kind)


def _foreign_protocol(envelope: Envelope) -> str:
    """Why a task of another version cannot be executed here; empty for one of ours."""
    if envelope.protocol == PROTOCOL:
        return ""
    return (
        f"the worker has dagster-taskiq {__version__}, which speaks version {PROTOCOL} of the "
        f"protocol, and the run version {envelope.protocol}: install the same on both sides"
    )


async def _prepare(slot: Slot) -> str:
    """Have the slot ready; the reason when it cannot be."""
    try:
        await slot.prepare()
    except SlotError as error:
        return str(error)
    return ""


async def _cancel(tasks: set[asyncio.Task[Any]]) -> None:
    """Cancel until all have ended: redis-py loses a cancellation that meets it connecting."""
    while tasks:
        for task in tasks:
            task.cancel()
        done, tasks = await asyncio.wait(tasks, timeout=_RETRY_SECONDS)
        await asyncio.gather(*done, return_exceptions=True)  # who started them has seen errors
