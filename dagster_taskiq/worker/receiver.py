"""Taskiq's receiver, with every delivery settled, and no message parsed twice."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextvars import ContextVar

from dagster_taskiq._taskiq import (
    AckableMessage,
    AcknowledgeType,
    BrokerMessage,
    Receiver,
    TaskiqFormatter,
    TaskiqMessage,
)
from dagster_taskiq.brokers import Delivery, TaskBroker
from dagster_taskiq.errors import ServerError
from dagster_taskiq.messages.envelope import Envelope

logger = logging.getLogger(__name__)

#: Pause before a task that could not be begun goes back to its queue, so that a worker does not
#: take and return it as fast as it can.
RELEASE_PAUSE_SECONDS = 1.0


#: The delivery that a callback of the receiver is about: Taskiq's formatter is shown only bytes.
_in_work: ContextVar[Delivery] = ContextVar("delivery")


class DeliveryFormatter(TaskiqFormatter):
    """Makes a call of an admitted delivery, whose content is its envelope."""

    def loads(self, message: bytes) -> TaskiqMessage:
        """The call of a task function with the delivery that the receiver has in work."""
        delivery = _in_work.get()
        envelope: Envelope = delivery.content
        return TaskiqMessage(
            task_id=envelope.task_id,
            task_name=envelope.name.value,
            labels={},
            args=[delivery],
            kwargs={},
        )

    def dumps(self, message: TaskiqMessage) -> BrokerMessage:
        """Refuse to write a task: Taskiq's own ``kiq`` would neither sign nor bound it.

        Raises:
            TypeError: always; ``Envelope.to_message`` writes tasks.
        """
        raise TypeError(
            f"Task {message.task_id} cannot be sent by Taskiq's kiq(): Envelope.to_message writes "
            "the tasks, and signs them."
        )


class SettlingReceiver(Receiver):
    """Takes a message when a slot is free; what its task does not ack goes back to the queue.

    Args:
        broker: with its tasks registered, functions of a ``Delivery``; its ``admission``
            makes envelopes.
        slots: how many messages may be in work at once.
        recover: called after each message, when it is settled; no other one is taken in its place
            before it returns.
    """

    def __init__(
        self, broker: TaskBroker, slots: int, recover: Callable[[], Awaitable[None]]
    ) -> None:
        super().__init__(
            broker,
            validate_params=False,  # the envelope has been checked, and payloads can be large
            max_async_tasks=slots,
            max_prefetch=0,
            run_startup=False,
            ack_type=AcknowledgeType.MANUAL,
        )
        broker.formatter = DeliveryFormatter()
        self._recover = recover

    def grow(self) -> None:
        """Have one more message in work at once."""
        self._semaphore.release()
        self.sem_prefetch.release()

    async def shrink(self) -> None:
        """Have one less; returns when a place is free, which stays so from then on."""
        await self.sem_prefetch.acquire()
        try:
            await self._semaphore.acquire()
        except asyncio.CancelledError:
            self.sem_prefetch.release()
            raise

    @property
    def _semaphore(self) -> asyncio.Semaphore:
        assert self.sem is not None  # as the number of messages is limited
        return self.sem

    async def callback(self, message: bytes | AckableMessage, raise_err: bool = False) -> None:
        """Run one message's task, then settle the message if the task has not."""
        assert isinstance(message, Delivery)
        _in_work.set(message)
        try:
            await super().callback(message, raise_err)
        except Exception:
            # a middleware or Taskiq itself failed before our task function was called
            logger.exception("A message could not be handed to its task; it goes back.")
            await asyncio.sleep(RELEASE_PAUSE_SECONDS)
        finally:
            if not message.settled:
                await self._release(message)
        await self._recover()

    async def _release(self, delivery: Delivery) -> None:
        try:
            await delivery.release()
        except ServerError as error:
            logger.warning("Could not give a message back: %s The server will do it.", error)
