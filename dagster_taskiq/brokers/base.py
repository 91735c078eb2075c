"""What a broker must do: the contract that one test suite checks for all of them.

A broker is a Taskiq ``AsyncBroker`` whose listener only takes a message when it is asked for one,
and which can say more about a queue than Taskiq's own can.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from typing import Any

from taskiq import AckableMessage, AsyncBroker, BrokerMessage
from taskiq.utils import maybe_awaitable

from dagster_taskiq.errors import MalformedTaskError

logger = logging.getLogger(__name__)


class Delivery(AckableMessage):
    """A message in this worker's hands, to be settled once.

    ``ack`` makes the server forget it. ``release`` gives it back at once, to the place in its
    queue that it was taken from. Whichever succeeds first settles it; later calls do nothing.
    """

    release: Callable[[], Awaitable[None]]
    settled: bool = False

    def model_post_init(self, context: Any, /) -> None:
        """Let the first of the two actions settle the delivery."""
        self.ack = self._settling(self.ack)
        self.release = self._settling(self.release)

    def _settling(self, action: Callable[[], Awaitable[None] | None]) -> Callable[[], Any]:
        async def settle() -> None:
            if not self.settled:
                await maybe_awaitable(action())
                self.settled = True

        return settle


class TaskBroker(AsyncBroker):
    """A broker with queues, priorities, release and withdrawal.

    What every implementation keeps:

    * A message that ``kick`` or ``kick_many`` has returned for is on the server, durable, in the
      queue of its label ``queue_name``, whether or not anybody listens there yet.
    * Within a queue, the higher label ``priority`` (0..10) comes first, and of equal ones the one
      sent first. A listener with several queues looks at them in turn.
    * ``listen`` takes a message only when its consumer asks for the next one, so that a busy
      worker never holds one that an idle worker could run.
    * A delivery that was neither acked nor released when its worker died goes back to its queue.
    * A lost connection is restored by the broker; ``listen`` goes on by itself.

    Args of every implementation: ``options``, how to reach the server, and ``queues``, the
    physical queues to listen on (none for a sender).

    Errors: ``UnreachableServerError`` or ``RefusedByServerError`` with the address and without
    the password, from ``startup`` and every method that talks to the server.
    """

    #: URL without its password, for messages and logs.
    address: str

    #: Called with the bytes of each message before it is handed on; raises ``MalformedTaskError``
    #: for what is no task of ours, which is then acked, counted and dropped here, since Taskiq's
    #: receiver would neither ack it nor give its place free.
    admit: Callable[[bytes], object] | None = None

    #: How many messages ``admit`` has refused.
    refused_count: int = 0

    async def listen(self) -> AsyncGenerator[AckableMessage, None]:
        """A ``Delivery`` of one of the queues, each time the consumer asks."""
        async for delivery in self.deliveries():
            if await self._is_admitted(delivery):
                yield delivery

    async def _is_admitted(self, delivery: Delivery) -> bool:
        try:
            if self.admit is not None:
                self.admit(delivery.data)
        except MalformedTaskError as error:
            self.refused_count += 1
            logger.error("Refused a message from %s: %s.", self.address, error)  # noqa: TRY400
            await maybe_awaitable(delivery.ack())
            return False
        return True

    @abstractmethod
    def deliveries(self) -> AsyncGenerator[Delivery, None]:
        """The implementation's source of messages; see ``listen``."""

    @abstractmethod
    async def kick_many(self, messages: Sequence[BrokerMessage]) -> None:
        """Send several messages in one go, in their order; all are durable on return."""

    @abstractmethod
    async def withdraw(self, queue: str, task_ids: Collection[str]) -> set[str]:
        """Take waiting tasks out of a physical queue.

        Returns:
            the ids that were taken out; a broker that cannot withdraw returns none, and a task
            in a worker's hands is never taken out.
        """

    @abstractmethod
    async def absent(self, queue: str, task_ids: Collection[str]) -> set[str]:
        """Which of the tasks the server certainly does not hold, waiting or in a worker's hands.

        A broker that cannot look into its queue answers with all of them when the queue is empty
        and with none otherwise; it may not see a message in a worker's hands, so ask again after
        ``IN_HAND_SECONDS`` before acting on it.
        """

    @abstractmethod
    async def depth(self, queue: str) -> int:
        """How many tasks wait in a physical queue; 0 for one that does not exist."""
