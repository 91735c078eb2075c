"""Workers of a simulation: everything of a worker but its processes.

The product's ``Worker``, with the tests' stand-ins for its slots, which execute a step by sleeping,
and for its guard. Steps that a worker holds from its beginning come by a broker in memory.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from benchmarks.scale.crowd import Share
from benchmarks.scale.records import Record
from dagster_taskiq.backend import Claim, Renewal
from dagster_taskiq.backend.redis import RedisBackend
from dagster_taskiq.brokers import Admission, TaskBroker, open_broker
from dagster_taskiq.brokers.memory import MemoryBroker, MemoryQueues
from dagster_taskiq.defaults import DEFAULT_QUEUE
from dagster_taskiq.errors import ServerError
from dagster_taskiq.messages.envelope import Envelope, QueueKind
from dagster_taskiq.messages.results import Outcome, TaskResult
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.messages.worker_records import RunningTask, WorkerRecord
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq.worker.child_messages import Answer, Execute, Executed, Order, RunAnswer
from dagster_taskiq.worker.observer import CountingObserver, Ending, LeaseRenewal
from dagster_taskiq.worker.options import WorkerOptions
from dagster_taskiq.worker.parts import WorkerParts
from dagster_taskiq.worker.worker import Worker
from dagster_taskiq_tests.messages import STEP_TASK
from dagster_taskiq_tests.unit.worker_stand_ins import FakeGuard, FakeSlot

#: Process ids from here on are no process's on any system: the lease keeper finds none.
_NO_PID = 2**30

#: What a step's result is filled up to: about what ``measure`` finds for a step without metadata.
RESULT_BYTES = 7300


class _Recorder(CountingObserver):
    """Writes what a worker does into the record of now."""

    def __init__(self, record: Callable[[], Record]) -> None:
        super().__init__()
        self._record_of_now = record

    def ended(self, envelope: Envelope, ending: Ending) -> None:
        self._record_of_now().steps += 1

    def ordered(self, order: Mapping[str, Any]) -> None:
        if order["kind"] == "cancel":
            self._record_of_now().cancel_seconds.append(time.time() - float(order["sent_at"]))

    def renewed(self, renewal: LeaseRenewal) -> None:
        self._record_of_now().renewed(renewal)


class _WatchedBackend(RedisBackend):
    """Counts the errors of what a worker does all the time and says nothing of."""

    def __init__(self, options: ServerOptions, record: Callable[[], Record]) -> None:
        super().__init__(options, Signer())
        self._record_of_now = record

    async def renew(self, claims: Sequence[Claim]) -> list[Renewal]:
        with self._counting():
            return await super().renew(claims)

    async def heartbeat(
        self,
        record: WorkerRecord,
        *,
        expires_seconds: float,
        running: Sequence[RunningTask] = (),
    ) -> None:
        with self._counting():
            await super().heartbeat(record, expires_seconds=expires_seconds, running=running)

    async def wait_for_control(self, worker_id: str, timeout_seconds: float) -> list[bytes]:
        with self._counting():
            return await super().wait_for_control(worker_id, timeout_seconds)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        try:
            yield
        except ServerError:
            self._record_of_now().errors += 1
            raise


class SimulatedSlot(FakeSlot):
    """Executes a step by sleeping.

    Args:
        step_seconds: about how long a step sleeps; None is for ever, whoever interrupts it.
    """

    def __init__(self, number: int, step_seconds: float | None) -> None:
        super().__init__(number)
        self.act = self._sleep
        self._step_seconds = step_seconds

    @property
    def pid(self) -> int:
        """A number that is no process's."""
        return _NO_PID + self.number

    async def _sleep(self, _: FakeSlot, order: Order) -> Answer:
        """Sleep for the step's time, or until interrupted."""
        if not isinstance(order, Execute):
            return RunAnswer()
        self.told.clear()
        if self._step_seconds is None:
            await asyncio.Event().wait()
        else:
            # not all at the same moment, as they were sent
            seconds = self._step_seconds * random.uniform(0.75, 1.25)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.told.wait(), seconds)
        result = TaskResult(
            Outcome.FINISHED,
            order.place,
            events=("x" * RESULT_BYTES,),
            is_cancelled=self.told.is_set(),
        )
        return Executed(result.to_bytes().decode(), "", 0)


class SimulatedWorker:
    """One worker, with a station of steps and one of runs that nobody sends.

    A worker that holds steps from its start asks for no others, like one whose slots are all busy.

    Args:
        number: of the worker among those of the simulation.
        record: where what it sees goes.
    """

    def __init__(self, share: Share, number: int, record: Callable[[], Record]) -> None:
        self._crowd = share.crowd
        self._servers = share.servers
        self._held = share.held_by(number)
        self._recorder = _Recorder(record)
        self._backend = _WatchedBackend(share.options, record)
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
            if not steps or kind is not QueueKind.STEPS:
                return open_broker(self._servers.broker, queues, admission)
            held = MemoryQueues("simulation")
            for step in steps:
                held.put(step.to_message(queues[0], self._servers.signer))
            return MemoryBroker(held, queues, admission)

        name = f"simulated-{uuid.uuid4().hex[:8]}"
        worker = Worker(
            self._servers,
            WorkerOptions(name, (DEFAULT_QUEUE,), self._crowd.slots, run_slots=1),
            on_ready=ready.set,
            observer=self._recorder,
            parts=WorkerParts(
                self._backend,
                FakeGuard(),
                open_station_broker,
                lambda options, _: SimulatedSlot(options.child.slot, self._crowd.step_seconds),
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
        held = replace(
            STEP_TASK,
            lease_seconds=self._crowd.lease_seconds,
            cancel_grace_seconds=0.0,
            epoch=epoch,
        )
        return [replace(held, task_id=it, run_id=self._held[it]) for it in self._held]
