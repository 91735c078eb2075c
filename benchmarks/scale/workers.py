"""Workers of a simulation: everything of a worker but its processes.

Stations, receivers, lease keepers, brokers and backends are the product's. Only the slots are
stand-ins, which execute a step by sleeping, and the guards are never started.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from dagster_taskiq.backend import Claim, ClaimAnswer, Renewal
from dagster_taskiq.backend.redis import RedisBackend
from dagster_taskiq.brokers import open_broker
from dagster_taskiq.connections import Servers
from dagster_taskiq.defaults import (
    DEFAULT_QUEUE,
    HEARTBEAT_SECONDS,
    RESULT_EXPIRES_SECONDS,
    WORKER_EXPIRES_SECONDS,
)
from dagster_taskiq.errors import ServerError, UntrustedError
from dagster_taskiq.messages.control import OrderReader
from dagster_taskiq.messages.envelope import QueueKind
from dagster_taskiq.messages.refusals import Refusals
from dagster_taskiq.messages.results import Outcome, Place, TaskResult
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.messages.time_limits import TimeLimits
from dagster_taskiq.messages.worker_records import WorkerRecord
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq.version import __version__
from dagster_taskiq.worker.guard import clock
from dagster_taskiq.worker.guard_client import GuardClient
from dagster_taskiq.worker.leases import Lease, LeaseKeeper, StopReason
from dagster_taskiq.worker.run_watch import RunWatch
from dagster_taskiq.worker.slot import Slot
from dagster_taskiq.worker.station import Station

#: How long one wait for control messages lasts, as in ``worker.py``.
_CONTROL_WAIT_SECONDS = 15.0

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
        steps: that were completed.
    """

    renewal_seconds: list[float] = field(default_factory=list)
    worst_slack_share: float = 1.0
    claims_renewed: int = 0
    lost: int = 0
    errors: int = 0
    cancel_seconds: list[float] = field(default_factory=list)
    steps: int = 0


class WatchedBackend(RedisBackend):
    """The backend of a worker, which notes how its renewals fare."""

    def __init__(self, options: ServerOptions, record: Callable[[], Record]) -> None:
        super().__init__(options, Signer())
        self._record_of_now = record
        self._sent_at: dict[str, float] = {}

    async def claim(
        self, claim: Claim, *, needs_live_run: bool, until_begun: bool = False
    ) -> ClaimAnswer:
        """See ``ClaimBackend``."""
        sent_at = clock()
        answer = await super().claim(claim, needs_live_run=needs_live_run, until_begun=until_begun)
        if answer is ClaimAnswer.GRANTED:
            self._sent_at[claim.token] = sent_at
        return answer

    async def renew(self, claims: Sequence[Claim]) -> list[Renewal]:
        """See ``ClaimBackend``."""
        sent_at = clock()
        record = self._record_of_now()
        try:
            renewals = await super().renew(claims)
        except ServerError:
            record.errors += 1
            raise
        answered_at = clock()
        record.renewal_seconds.append(answered_at - sent_at)
        for claim, renewal in zip(claims, renewals, strict=True):
            before = self._sent_at.get(claim.token)
            if before is None:
                continue  # it was completed meanwhile
            record.claims_renewed += 1
            record.lost += not renewal.is_held
            left = 1 - (answered_at - before) / claim.lease_seconds
            record.worst_slack_share = min(record.worst_slack_share, left)
            self._sent_at[claim.token] = sent_at
        return renewals

    async def complete(
        self, claim: Claim, result: bytes, *, expires_seconds: float, is_refused: bool = False
    ) -> bool:
        """See ``ClaimBackend``."""
        is_stored = await super().complete(
            claim, result, expires_seconds=expires_seconds, is_refused=is_refused
        )
        self._sent_at.pop(claim.token, None)
        self._record_of_now().steps += is_stored
        return is_stored


class SimulatedSlot(Slot):
    """Executes a step by sleeping; whatever else a slot does with its child does nothing."""

    def __init__(self, number: int, step_seconds: float) -> None:
        self.number = number
        self.location = ""
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
        task: dict[str, Any],
        on_child: Callable[[int], None],
        on_started: Callable[[], None] = lambda: None,
        on_begun: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """Sleep for the step's time, or until interrupted."""
        self._is_interrupted.clear()
        on_child(self.pid)
        on_started()
        # not all at the same moment, as they were sent
        seconds = self._step_seconds * random.uniform(0.75, 1.25)
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._is_interrupted.wait(), seconds)
        result = TaskResult(
            Outcome.FINISHED,
            Place.from_dict(task["place"]),
            events=("x" * RESULT_BYTES,),
            is_cancelled=self._is_interrupted.is_set(),
        )
        return {"result": result.to_bytes().decode()}

    def interrupt(self) -> None:
        """End the step."""
        self._is_interrupted.set()

    def warn(self) -> None:
        """It has no soft time limit."""

    def kill(self) -> None:
        """There is nothing to kill."""

    async def stop(self) -> None:
        """There is nothing to stop."""


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
        self._record = record
        self._worker_id = uuid.uuid4().hex
        self._host = socket.gethostname()
        self._name = f"simulated-{self._worker_id[:8]}@{self._host}"
        self._slots = slots
        self._held = held
        self._lease_seconds = lease_seconds
        self._started_at = time.time()
        self._backend = WatchedBackend(servers.backend, record)
        self._orders = OrderReader(servers.signer, self._worker_id, self._name)
        refusals = Refusals(self._backend.address)
        self._leases = LeaseKeeper(self._backend, GuardClient(), self._orders, refusals)
        self._stations = [
            self._station(servers, kind, count, step_seconds)
            for kind, count in ((QueueKind.STEPS, 0 if held else slots), (QueueKind.RUNS, 1))
            if count
        ]
        self._drain = asyncio.Event()
        self._background: asyncio.Future[list[None]] | None = None

    def _station(
        self, servers: Servers, kind: QueueKind, slots: int, step_seconds: float
    ) -> Station:
        queue = servers.physical_queue(kind, DEFAULT_QUEUE)
        return Station(
            kind,
            open_broker(servers.broker, [queue]),
            self._backend,
            self._leases,
            [SimulatedSlot(number, step_seconds) for number in range(1, slots + 1)],
            RunWatch(SimulatedSlot(0, 0.0)),
            Place(self._name, self._worker_id, self._host, pid=0, slot=0),
            RESULT_EXPIRES_SECONDS,
            TimeLimits(),
            servers.signer,
            (DEFAULT_QUEUE,),
        )

    @property
    def busy_slots(self) -> int:
        """How many steps it executes."""
        return self._leases.count(runs=False)

    async def start(self) -> None:
        """Connect, and begin everything that a worker does in the background."""
        await self._backend.startup()
        for station in self._stations:
            await station.start()
        await self._send_heartbeat()
        work = [station.work(self._drain) for station in self._stations]
        others = [self._leases.run(), self._send_heartbeats(), self._obey_control()]
        self._background = asyncio.gather(*work, *others)
        epoch = ""
        for number, (task_id, run_id) in enumerate(self._held.items(), start=1):
            epoch = epoch or (await self._backend.inspect(run_id, []))[0]
            await self._hold(run_id, task_id, number, epoch)

    def check(self) -> None:
        """Raise the error of what it does in the background, which would end a worker."""
        if self._background is not None and self._background.done():
            self._background.result()

    async def _hold(self, run_id: str, task_id: str, number: int, epoch: str) -> None:
        """Claim a step and keep the claim, as a station does."""
        place = Place(self._name, self._worker_id, self._host, pid=0, slot=number)
        claim = Claim(run_id, task_id, uuid.uuid4().hex, self._lease_seconds, epoch, place)
        claimed_at = clock()
        answer = await self._backend.claim(claim, needs_live_run=True)
        assert answer is ClaimAnswer.GRANTED, answer
        # a step that takes no notice of being stopped
        self._leases.keep(Lease(claim, _NO_PID + number, claimed_at, lambda: None, lambda: None))

    async def _send_heartbeats(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            try:
                await self._send_heartbeat()
            except ServerError:
                self._record().errors += 1

    async def _send_heartbeat(self) -> None:
        record = WorkerRecord(
            worker_id=self._worker_id,
            name=self._name,
            host=self._host,
            pid=os.getpid(),
            queues=(DEFAULT_QUEUE,),
            slots=self._slots,
            busy_slots=self.busy_slots,
            run_slots=1,
            started_at=self._started_at,
            version=__version__,
        )
        await self._backend.heartbeat(record, expires_seconds=WORKER_EXPIRES_SECONDS)

    async def _obey_control(self) -> None:
        while True:
            try:
                orders = await self._backend.wait_for_control(
                    self._worker_id, _CONTROL_WAIT_SECONDS
                )
            except ServerError:
                self._record().errors += 1
                await asyncio.sleep(0.5)
                continue
            for data in orders:
                with suppress(UntrustedError):
                    self._obey(self._orders.read(data))

    def _obey(self, order: dict[str, Any]) -> None:
        lease = self._leases.find(str(order.get("task_id")))
        if lease is not None:
            self._record().cancel_seconds.append(time.time() - float(order["sent_at"]))
            self._leases.stop(lease, StopReason.CANCELLED)
