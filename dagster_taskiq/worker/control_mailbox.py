"""The orders in the worker's control mailbox: it takes them out and has them obeyed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from dagster_taskiq.backend import Backend
from dagster_taskiq.errors import ServerError, UntrustedError
from dagster_taskiq.messages.control import OrderKind, OrderReader, reason_of
from dagster_taskiq.worker.leases import LeaseKeeper
from dagster_taskiq.worker.observer import WorkerObserver

logger = logging.getLogger(__name__)

#: How long one wait for orders lasts before it is begun anew.
_WAIT_SECONDS = 15.0

#: Pause before a backend that was away is asked again.
_RETRY_SECONDS = 0.5


def told(act: Callable[[], None]) -> Callable[[Mapping[str, Any]], Awaitable[None]]:
    """What obeys an order that says nothing but its kind."""

    async def obey(_order: Mapping[str, Any]) -> None:
        act()

    return obey


class ControlMailbox:
    """Obeys the orders to one worker; ``run`` is its background task.

    Args:
        backend: which has the mailbox.
        worker_id: whose it is.
        orders: verifies what is in it.
        leases: stop a task that is to be cancelled.
        observer: hears of each order, also of one that is refused.
        obey: what obeys an order of each kind but cancels and pings; it raises ``UntrustedError``
            for one that it cannot read, and ``ServerError`` where it cannot obey.
        answer_ping: called with the id of a ping.
    """

    def __init__(
        self,
        backend: Backend,
        worker_id: str,
        orders: OrderReader,
        leases: LeaseKeeper,
        observer: WorkerObserver,
        obey: Mapping[str, Callable[[Mapping[str, Any]], Awaitable[None]]],
        answer_ping: Callable[[str], Awaitable[None]],
    ) -> None:
        self._backend = backend
        self._worker_id = worker_id
        self._orders = orders
        self._leases = leases
        self._observer = observer
        self._handlers = obey
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
                    self._observer.ordered(order)
                    await self._obey(order)
                except UntrustedError as error:
                    self._observer.refused(self._backend.address, "an order", error)
                except ServerError as error:
                    logger.warning("An order was not obeyed: %s", error)

    async def _obey(self, order: Mapping[str, Any]) -> None:
        kind = str(order.get("kind"))
        if kind == OrderKind.CANCEL:
            lease = self._leases.find(str(order.get("task_id")))
            if lease is not None:
                self._leases.cancel(lease, reason_of(order))
        elif kind in self._handlers:
            await self._handlers[kind](order)
        elif kind != OrderKind.PING:
            logger.warning("Ignored a control message of an unknown kind: %r.", kind)
            return
        if "ping_id" in order:
            await self._answer_ping(str(order["ping_id"]))
