"""Workers of a simulation: everything of a worker but its processes.

The product's ``Worker`` with stand-ins for its slots, which execute a step by sleeping, and for its
guard, which would be a process too.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from taskiq import BrokerMessage

from dagster_taskiq.backend import Claim, Renewal
from dagster_taskiq.backend.redis import RedisBackend
from dagster_taskiq.brokers import Admission, Delivery, TaskBroker, open_broker
from dagster_taskiq.brokers.base import Listener
from dagster_taskiq.connections import Servers
from dagster_taskiq.defaults import DEFAULT_QUEUE, DEFAULT_STEP_PRIORITY
from dagster_taskiq.errors import ServerError
from dagster_taskiq.messages.envelope import Envelope, QueueKind, TaskName
from dagster_taskiq.messages.results import Outcome, TaskResult
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.messages.worker_records import WorkerRecord
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq.worker.child_messages import Answer, Execute, Executed, Order, RunAnswer
from dagster_taskiq.worker.guard import kill_group
from dagster_taskiq.worker.guard_client import GuardClient
from dagster_taskiq.worker.observer import CountingObserver, Ending, LeaseRenewal
from dagster_taskiq.worker.options import WorkerOptions
from dagster_taskiq.worker.parts import WorkerParts
from dagster_taskiq.worker.slot_base import Slot
from dagster_taskiq.worker.worker import Worker

#: Process ids from here on are no process's on any system: the lease keeper finds none.
_NO_PID = 2**30

#: What a step's result is filled up to: about what ``measure`` finds for a step without metadata.
RESULT_BYTES = 7300


@dataclass
class Record:
    """What the workers of one process saw.

    Attributes:
        renewal_seconds: how long each renewal took, of all claims of a worker at once.
        worst_slack_share: the least that was left of a lease when its renewal had been answered,
            counted from when the renewal before it was sent; 1 is all of it.
        claims_renewed: how often a claim was renewed.
        lost: claims that a renewal found not to be held any more.
        errors: calls that the server did not answer, or refused.
        cancel_seconds: from an order to cancel to its arrival at the worker.
        steps: that have ended.
    """

    renewal_seconds: list[float] = field(default_factory=list)
    worst_slack_share: float = 1.0
    claims_renewed: int = 0
    lost: int = 0
    errors: int = 0
    cancel_seconds: list[float] = field(default_factory=list)
    steps: int = 0


class _Recorder(CountingObserver):
    """Writes what a worker does into the record of now."""

    def __init__(self, record: Callable[[], Record]) -> None:
        super().__init__()
        self._record_of_now = record

    def ended(self, envelope: Envelope, ending: Ending) -> None:
        """See ``WorkerObserver``."""
        self._record_of_now().steps += 1

    def ordered(self, order: Mapping[str, Any]) -> None:
        """See ``WorkerObserver``."""
        if order["kind"] == "cancel":
            self._record_of_now().cancel_seconds.append(time.time() - float(order["sent_at"]))

    def renewed(self, renewal: LeaseRenewal) -> None:
        """See ``WorkerObserver``."""
        record = self._record_of_now()
        record.renewal_seconds.append(renewal.seconds)
        record.claims_renewed += renewal.claims
        record.lost += renewal.lost
        record.worst_slack_share = min(record.worst_slack_share, renewal.least_left_share)


class _WatchedBackend(RedisBackend):
    """Counts the errors of what a worker does all the time and says nothing of."""

    def __init__(self, options: ServerOptions, record: Callable[[], Record]) -> None:
        super().__init__(options, Signer())
        self._record_of_now = record

    async def renew(self, claims: Sequence[Claim]) -> list[Renewal]:
        """See ``ClaimBackend``."""
        with self._counting():
            return await super().renew(claims)

    async def heartbeat(self, record: WorkerRecord, *, expires_seconds: float) -> None:
        """See ``ControlBackend``."""
        with self._counting():
            await super().heartbeat(record, expires_seconds=expires_seconds)

    async def wait_for_control(self, worker_id: str, timeout_seconds: float) -> list[bytes]:
        """See ``ControlBackend``."""
        with self._counting():
            return await super().wait_for_control(worker_id, timeout_seconds)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        try:
            yield
        except ServerError:
            self._record_of_now().errors += 1
            raise


class SimulatedSlot(Slot):
    """Executes a step by sleeping; whatever else a slot does with its child does nothing.

    Args:
        step_seconds: about how long a step sleeps; None is for ever, whoever interrupts it.
    """

    def __init__(self, number: int, step_seconds: float | None) -> None:
        self.number = number
        self._step_seconds = step_seconds
        self._is_interrupted = asyncio.Event()

    @property
    def pid(self) -> int:
        """A number that is no process's."""
        return _NO_PID + self.number

    async def prepare(self, location: str = "") -> None:
        """It is always ready."""

    def retire(self) -> None:
        """There is no child to replace."""

    async def run(
        self,
        order: Order,
        on_child: Callable[[int], None],
        on_order_taken: Callable[[], None] = lambda: None,
        on_run_start_logged: Callable[[], None] = lambda: None,
    ) -> Answer:
        """Sleep for the step's time, or until interrupted."""
        if not isinstance(order, Execute):
            return RunAnswer()
        self._is_interrupted.clear()
        on_child(self.pid)
        on_order_taken()
        if self._step_seconds is None:
            await asyncio.Event().wait()
        else:
            # not all at the same moment, as they were sent
            seconds = self._step_seconds * random.uniform(0.75, 1.25)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._is_interrupted.wait(), seconds)
        result = TaskResult(
            Outcome.FINISHED,
            order.place,
            events=("x" * RESULT_BYTES,),
            is_cancelled=self._is_interrupted.is_set(),
        )
        return Executed(result.to_bytes().decode(), "", 0)

    def interrupt(self) -> None:
        """End the step."""
        self._is_interrupted.set()

    def warn(self) -> None:
        """It has no soft time limit."""

    def kill(self) -> None:
        """There is nothing to kill."""

    async def stop(self) -> None:
        """There is nothing to stop."""


class _NoGuard(GuardClient):
    """There is nothing to guard."""

    def start(self) -> None:
        """It has no process."""

    async def monitor(self, on_unguarded: Callable[[int], None] = kill_group) -> None:
        """There is no process to look after."""
        await asyncio.Event().wait()

    def close(self) -> None:
        """There is nothing to kill."""


class _HeldSteps(TaskBroker, Listener):
    """Delivers the steps that a worker holds from its beginning, and is on no server."""

    address = "the simulation"

    def __init__(self, queue: str, held: Sequence[Envelope], admission: Admission) -> None:
        super().__init__()
        self.queues = (queue,)
        self.admission = admission
        self._left = [it.to_message(queue, Signer()).message for it in held]

    def listener(self) -> Listener:
        """See ``TaskBroker``."""
        return self

    async def look(self) -> Delivery | None:
        """See ``Listener``."""
        return Delivery(data=self._left.pop(), ack=_settle, release=_settle) if self._left else None

    async def wait(self) -> None:
        """See ``Listener``."""
        await asyncio.Event().wait()

    async def kick(self, message: BrokerMessage) -> None:
        """Nobody sends."""
        raise NotImplementedError

    async def kick_many(self, messages: Sequence[BrokerMessage]) -> None:
        """Nobody sends."""
        raise NotImplementedError

    async def withdraw(self, queue: str, task_ids: Collection[str]) -> set[str]:
        """See ``TaskBroker``."""
        return set()

    async def absent(self, queue: str, task_ids: Collection[str]) -> set[str]:
        """See ``TaskBroker``."""
        return set()

    async def depth(self, queue: str) -> int:
        """See ``TaskBroker``."""
        return len(self._left)


async def _settle() -> None:
    """Nobody keeps the message."""


class SimulatedWorker:
    """One worker, with a station of steps and one of runs that nobody sends.

    Args:
        slots: for steps.
        step_seconds: how long a step sleeps.
        record: where what it sees goes.
        held: by task, the run of steps that it holds from its start and never ends. It asks for
            no other steps then, like a worker all of whose slots are busy.
        lease_seconds: of these.
    """

    def __init__(
        self,
        servers: Servers,
        slots: int,
        step_seconds: float,
        record: Callable[[], Record],
        held: Mapping[str, str],
        lease_seconds: float,
    ) -> None:
        self._servers = servers
        self._slots = slots
        self._step_seconds = None if held else step_seconds
        self._held = held
        self._lease_seconds = lease_seconds
        self._recorder = _Recorder(record)
        self._backend = _WatchedBackend(servers.backend, record)
        self._running: asyncio.Task[bool] | None = None

    @property
    def busy_slots(self) -> int:
        """How many steps it executes."""
        return self._recorder.busy[QueueKind.STEPS]

    async def start(self) -> None:
        """Have it take tasks."""
        ready = asyncio.Event()
        steps = await self._held_steps()

        def open_station_broker(
            kind: QueueKind, queues: Sequence[str], admission: Admission
        ) -> TaskBroker:
            if steps and kind is QueueKind.STEPS:
                return _HeldSteps(queues[0], steps, admission)
            return open_broker(self._servers.broker, queues, admission)

        worker = Worker(
            self._servers,
            WorkerOptions(
                f"simulated-{uuid.uuid4().hex[:8]}", (DEFAULT_QUEUE,), self._slots, run_slots=1
            ),
            on_ready=ready.set,
            observer=self._recorder,
            parts=WorkerParts(
                self._backend,
                _NoGuard(),
                open_station_broker,
                lambda options, _: SimulatedSlot(options.child.slot, self._step_seconds),
            ),
        )
        self._running = asyncio.create_task(worker.run(), name="worker")
        waiting = asyncio.create_task(ready.wait(), name="ready")
        await asyncio.wait({self._running, waiting}, return_when=asyncio.FIRST_COMPLETED)
        self.check()

    def check(self) -> None:
        """Raise the error with which the worker has ended, if it has."""
        if self._running is not None and self._running.done():
            self._running.result()

    async def _held_steps(self) -> list[Envelope]:
        """The tasks of the steps that it holds."""
        if not self._held:
            return []
        await self._backend.startup()
        run_id = next(iter(self._held.values()))
        epoch, _ = await self._backend.inspect(run_id, [])
        return [
            Envelope(
                task_id=task_id,
                name=TaskName.EXECUTE_PLAN,
                run_id=run_id,
                step_key="held",
                attempt=1,
                queue=DEFAULT_QUEUE,
                priority=DEFAULT_STEP_PRIORITY,
                lease_seconds=self._lease_seconds,
                cancel_grace_seconds=0.0,
                epoch=epoch,
                payload="{}",
            )
            for task_id, run_id in self._held.items()
        ]
