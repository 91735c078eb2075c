"""The orders in the worker's control mailbox: it takes them out and has them obeyed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from dagster_taskiq.backend import Backend
from dagster_taskiq.errors import ServerError, UntrustedError
from dagster_taskiq.messages.control import OrderReader
from dagster_taskiq.worker.leases import LeaseKeeper, StopReason
from dagster_taskiq.worker.observer import WorkerObserver

logger = logging.getLogger(__name__)

#: How long one wait for orders lasts before it is begun anew.
_WAIT_SECONDS = 15.0

#: Pause before a backend that was away is asked again.
_RETRY_SECONDS = 0.5


class ControlMailbox:
    """Obeys the orders to one worker; ``run`` is its background task.

    Args:
        backend: which has the mailbox.
        worker_id: whose it is.
        orders: verifies what is in it.
        leases: stop a task that is to be cancelled.
        observer: hears of each order, also of one that is refused.
        drain: called for an order to stop.
        reload: called for an order to take up new code.
        answer_ping: called with the id of a ping.
    """

    def __init__(
        self,
        backend: Backend,
        worker_id: str,
        orders: OrderReader,
        leases: LeaseKeeper,
        observer: WorkerObserver,
        drain: Callable[[], None],
        reload: Callable[[], None],
        answer_ping: Callable[[str], Awaitable[None]],
    ) -> None:
        self._backend = backend
        self._worker_id = worker_id
        self._orders = orders
        self._leases = leases
        self._observer = observer
        self._drain = drain
        self._reload = reload
        self._answer_ping = answer_ping

    async def run(self) -> None:
        """Obey until cancelled."""
        while True:
            try:
                messages = await self._backend.wait_for_control(self._worker_id, _WAIT_SECONDS)
            except ServerError:
                await asyncio.sleep(_RETRY_SECONDS)  # a cancel is also seen at the next renewal
                continue
            for message in messages:
                try:
                    order = self._orders.read(message)
                except UntrustedError as error:
                    self._observer.refused(self._backend.address, "an order", error)
                else:
                    self._observer.ordered(order)
                    await self._obey(order)

    async def _obey(self, order: Mapping[str, Any]) -> None:
        kind = order.get("kind")
        if kind == "cancel":
            lease = self._leases.find(str(order.get("task_id")))
            if lease is not None:
                self._leases.stop(lease, StopReason.CANCELLED)
        elif kind == "terminate":
            self._drain()
        elif kind == "reload":
            self._reload()
        elif kind == "ping":
            await self._answer_ping(str(order.get("ping_id")))
        else:
            logger.warning("Ignored a control message of an unknown kind: %r.", kind)
