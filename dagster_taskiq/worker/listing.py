"""The worker's entry in the list of workers, which it keeps up to date while it lives."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

import dagster

from dagster_taskiq._dagster.fingerprint import own_fingerprint
from dagster_taskiq.backend import Backend
from dagster_taskiq.connections import Servers
from dagster_taskiq.defaults import HEARTBEAT_SECONDS, WORKER_EXPIRES_SECONDS
from dagster_taskiq.errors import ConfigError, ServerError
from dagster_taskiq.messages.plain_text import plain_name
from dagster_taskiq.messages.queue_names import PROTOCOL, QueueKind
from dagster_taskiq.messages.results import Place
from dagster_taskiq.messages.worker_records import WorkerRecord
from dagster_taskiq.version import __version__
from dagster_taskiq.worker.memory_gauge import MemoryGauge
from dagster_taskiq.worker.observer import CountingObserver
from dagster_taskiq.worker.steering import Steering
from dagster_taskiq.worker.templates import CodeState

logger = logging.getLogger(__name__)

#: How often a worker has the backend tidy up, on average.
_TIDY_SECONDS = 60.0

#: How many answered pings a record names: as many commands may wait for an answer at once.
_REMEMBERED_PINGS = 8

#: Of how many code locations a record tells.
_MOST_CODE = 20


class Listing:
    """Lists one worker; ``run`` is its background task.

    Args:
        backend: which has the list.
        servers: the broker that the worker listens on, and the keys that it accepts.
        steering: its queues and slots, and whether it is paused.
        place: its name, id and host.
        counts: what it does just now.
        state: for the listing, see ``WorkerRecord``.
        code_states: how its children come to their code.
        on_outage: called when the backend has not answered.
    """

    def __init__(
        self,
        backend: Backend,
        servers: Servers,
        steering: Steering,
        place: Place,
        counts: CountingObserver,
        state: Callable[[], str],
        code_states: Callable[[], Sequence[CodeState]],
        on_outage: Callable[[], Awaitable[None]],
    ) -> None:
        self._backend = backend
        self._servers = servers
        self._steering = steering
        self._place = place
        self._counts = counts
        self._state = state
        self._code_states = code_states
        self._on_outage = on_outage
        self._started_at = time.time()
        self._pings: deque[str] = deque(maxlen=_REMEMBERED_PINGS)
        self._memory = MemoryGauge()
        self._storage = ""
        self._is_entered = False

    async def enter(self) -> None:
        """Put the worker into the list.

        Raises:
            ServerError: the backend is away, or refuses.
        """
        self._is_entered = True
        await self._send()

    async def run(self) -> None:
        """Send a heartbeat now and then, and have the backend tidied, until cancelled."""
        tidies_at = time.monotonic() + _TIDY_SECONDS * random.random()
        await self._find_storage()
        while True:
            self._memory.look()
            await asyncio.sleep(HEARTBEAT_SECONDS)
            await self.update()
            if time.monotonic() >= tidies_at:
                tidies_at = time.monotonic() + _TIDY_SECONDS * random.uniform(0.5, 1.5)
                await self._tidy()

    async def _find_storage(self) -> None:
        try:
            self._storage = await asyncio.to_thread(own_fingerprint)
        except (ConfigError, RuntimeError) as error:  # the latter without threads
            logger.debug("The listing does not say which Dagster instance this is: %s", error)
        else:
            await self.update()

    async def _tidy(self) -> None:
        try:
            await self._backend.tidy()
        except ServerError as error:
            # another worker will, or this one later
            logger.debug("What has expired was not removed: %s", error)

    async def update(self) -> None:
        """Send the present record, if the backend answers."""
        try:
            await self._send()
        except ServerError as error:
            logger.debug("No heartbeat: %s", error)  # the keeper and the broker say it aloud
            await self._on_outage()

    async def answer_ping(self, ping_id: str) -> None:
        """Say at once that the worker's event loop goes round."""
        self._pings.append(plain_name(ping_id))
        await self.update()

    async def leave(self) -> None:
        """Take the worker out of the list; without a word of ours its entry expires."""
        if not self._is_entered:
            return
        try:
            await self._backend.goodbye(self._place.worker_id)
        except ServerError as error:
            logger.warning("Could not sign off: %s The listing will show it for a while.", error)

    async def _send(self) -> None:
        steering, counts, code = self._steering, self._counts, self._code_states()[:_MOST_CODE]
        record = WorkerRecord(
            worker_id=self._place.worker_id,
            name=self._place.worker,
            host=self._place.host,
            pid=os.getpid(),
            queues=tuple(steering.queues),
            slots=steering.slots[QueueKind.STEPS],
            run_slots=steering.slots[QueueKind.RUNS],
            busy_slots=counts.busy[QueueKind.STEPS],
            busy_run_slots=counts.busy[QueueKind.RUNS],
            state=self._state(),
            pause_reason=steering.pause_reason,
            started_at=self._started_at,
            version=__version__,
            refused=counts.refused_count,
            key_ids=self._servers.signer.key_ids,
            protocol=PROTOCOL,
            other_backend=counts.other_backend,
            broker=self._servers.broker.address,
            pings=tuple(self._pings),
            done=counts.done_count,
            failed=counts.failed_count,
            memory_bytes=self._memory.found_bytes,
            dagster=dagster.__version__,
            python=platform.python_version(),
            storage=self._storage,
            warm_code=tuple(plain_name(it.title) for it in code if it.is_warm),
            cold_code=tuple(
                plain_name(f"{it.title}: {it.reason}") for it in code if not it.is_warm
            ),
            sent_at=time.time(),
        )
        running = list(counts.running.values())
        await self._backend.heartbeat(
            record, expires_seconds=WORKER_EXPIRES_SECONDS, running=running
        )
