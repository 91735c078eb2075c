"""What a worker takes at present: its queues, its slots, and whether it or a queue is paused.

It begins as the worker was started, and orders change it while the worker lives; nothing that runs
is stopped by a change. Pauses of queues are kept by the backend and hold for all workers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from dagster_taskiq.backend import Backend
from dagster_taskiq.connections import Servers
from dagster_taskiq.errors import ServerError, UntrustedError
from dagster_taskiq.messages.control import OrderKind
from dagster_taskiq.messages.plain_text import plain_name, plain_reason
from dagster_taskiq.messages.queue_names import QueueKind
from dagster_taskiq.worker.options import WorkerOptions
from dagster_taskiq.worker.station import Station

logger = logging.getLogger(__name__)

#: How often a worker asks which queues are paused, beside the orders to do so: one may be lost.
_LOOK_SECONDS = 30.0

#: The most slots of a kind that an order may give a worker: a slip of the finger is no fork bomb.
MOST_SLOTS = 1000


class Steering:
    """Steers one worker's stations; ``run`` is its background task.

    Args:
        servers: which have names for its queues.
        backend: that keeps the pauses of queues.
        options: what it begins with.

    Attributes:
        queues: that it serves, as people name them.
        ever_served: those and the ones that were taken from it: a task of theirs may be on its way.
        slots: how many tasks of each kind it takes at a time.
        is_paused: whether it takes no new tasks.
        pause_reason: of who has paused it; may be empty.
    """

    def __init__(self, servers: Servers, backend: Backend, options: WorkerOptions) -> None:
        self._servers = servers
        self._backend = backend
        self.queues = list(options.queues)
        self.ever_served = set(options.queues)
        self.slots = {QueueKind.STEPS: options.slots, QueueKind.RUNS: options.run_slots}
        self.is_paused = False
        self.pause_reason = ""
        self._paused_queues: set[str] = set()
        self._looking = asyncio.Lock()
        self._stations: Sequence[Station] = ()

    @property
    def orders(self) -> Mapping[str, Callable[[Mapping[str, Any]], Awaitable[None]]]:
        """What obeys an order of each kind.

        It raises ``UntrustedError`` for one that is none, and ``ServerError`` where it cannot obey.
        """
        return {
            OrderKind.PAUSE: self._pause,
            OrderKind.RESUME: self._resume,
            OrderKind.SLOTS: self._set_slots,
            OrderKind.ADD_QUEUES: self._add_queues,
            OrderKind.REMOVE_QUEUES: self._remove_queues,
            OrderKind.LOOK_AT_QUEUES: self._look_for_order,
        }

    async def start(self, stations: Sequence[Station]) -> None:
        """Have the stations take what they may, before they begin.

        Raises:
            ServerError: the backend is away or refuses.
        """
        self._stations = stations
        await self._look()
        self._turn()

    async def run(self) -> None:
        """Ask now and then which queues are paused, until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                await self._look()
            except ServerError as error:
                logger.debug("Which queues are paused is not known anew: %s", error)

    async def _look(self) -> None:
        async with self._looking:  # of two answers the one to the earlier question may come last
            self._learn(set(await self._backend.paused_queues()))

    def _learn(self, paused: set[str]) -> None:
        for queue in sorted(paused ^ self._paused_queues):
            if queue in self.queues:
                state = "is paused: no task is taken from it" if queue in paused else "is resumed"
                logger.info("Queue %s %s.", queue, state)
        if paused != self._paused_queues:
            self._paused_queues = paused
            self._turn()

    def _turn(self) -> None:
        """Have the stations listen on what they may take from now."""
        taken = [it for it in self.queues if not self.is_paused and it not in self._paused_queues]
        for station in self._stations:
            station.listen_on([self._servers.physical_queue(station.kind, it) for it in taken])

    # --- orders ---

    async def _look_for_order(self, _order: Mapping[str, Any]) -> None:
        await self._look()

    async def _pause(self, order: Mapping[str, Any]) -> None:
        self.is_paused, self.pause_reason = True, plain_reason(str(order.get("reason", "")))
        logger.info("Paused: no new tasks; what runs may finish. %s", self.pause_reason)
        self._turn()

    async def _resume(self, _order: Mapping[str, Any]) -> None:
        self.is_paused, self.pause_reason = False, ""
        logger.info("Resumed: takes tasks again.")
        self._turn()

    async def _set_slots(self, order: Mapping[str, Any]) -> None:
        kind, count = order.get("queue_kind"), order.get("slots")
        if not isinstance(count, int) or not 0 < count <= MOST_SLOTS:
            raise UntrustedError(f"it names no number of slots between 1 and {MOST_SLOTS}")
        for station in self._stations:
            if station.kind.value == kind:
                self.slots[station.kind] = count
                station.resize(count)
                logger.info("Told to have %d slots for %s.", count, station.kind.value)

    async def _add_queues(self, order: Mapping[str, Any]) -> None:
        self._serve([*self.queues, *_names(order)])

    async def _remove_queues(self, order: Mapping[str, Any]) -> None:
        removed = _names(order)
        self._serve([it for it in self.queues if it not in removed])

    def _serve(self, queues: Sequence[str]) -> None:
        self.queues = list(dict.fromkeys(queues))
        self.ever_served |= set(queues)
        logger.info("Listens on: %s.", ", ".join(self.queues) or "no queue")
        self._turn()


def _names(order: Mapping[str, Any]) -> list[str]:
    names = order.get("queues")
    if not isinstance(names, list) or not all(isinstance(it, str) and it for it in names):
        raise UntrustedError("it names no queues")
    return [plain_name(it) for it in names]
