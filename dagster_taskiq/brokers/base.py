"""The contract of brokers, which one test suite checks for all of them.

A broker is a Taskiq ``AsyncBroker`` whose listener only takes a message when it is asked for one,
and which can say more about a queue than Taskiq's own can.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import aclosing, suppress
from typing import Any

from dagster_taskiq._taskiq import AckableMessage, AsyncBroker, BrokerMessage
from dagster_taskiq.aio.loop_thread import to_its_end
from dagster_taskiq.brokers.looks import Looks
from dagster_taskiq.brokers.outage import Outage
from dagster_taskiq.brokers.parking import Parking
from dagster_taskiq.errors import (
    ConfigError,
    MalformedTaskError,
    OtherBackendError,
    ServerError,
    UntrustedError,
)

#: How long a note for a run is kept.
NOTE_EXPIRES_SECONDS = 60


class Delivery(AckableMessage):
    """A message in this worker's hands, to be settled once.

    ``ack`` makes the server forget it. ``release`` gives it back at once, to the place in its
    queue that it was taken from. The first call that succeeds settles it; later ones do nothing.

    ``content`` is what the broker's ``Admission`` has made of the message.
    """

    ack: Callable[[], Awaitable[None]]
    release: Callable[[], Awaitable[None]]
    settled: bool = False
    content: Any = None
    #: Why it is refused whatever its data says, in words; empty where its data decides.
    flaw: str = ""

    def model_post_init(self, _context: Any, /) -> None:
        """Let the first of the two actions settle the delivery."""
        turn = asyncio.Lock()  # both at once would be an error to RabbitMQ, which closes on it
        self.ack = self._settling(self.ack, turn)
        self.release = self._settling(self.release, turn)

    def _settling(
        self, action: Callable[[], Awaitable[None]], turn: asyncio.Lock
    ) -> Callable[[], Awaitable[None]]:
        async def settle() -> None:
            async with turn:
                if not self.settled:
                    await action()
                    self.settled = True

        return settle


class Listener(ABC):
    """One consumer's view of its queues: what a broker implements for ``TaskBroker.listen``.

    Both methods raise ``ServerError`` when the server is away; they are called again until it is
    back.
    """

    @abstractmethod
    async def look(self) -> Delivery | None:
        """Take the next message if there is one; never cancelled halfway."""

    @abstractmethod
    async def wait(self) -> None:
        """Return when another look may find something; leaves nothing behind when cancelled."""

    @abstractmethod
    async def turn_to(self, queues: Sequence[str]) -> None:
        """Look at these queues from now on; a message that a wait has brought goes back."""


class Admission(ABC):
    """Decides which messages a broker hands on."""

    @abstractmethod
    def admit(self, data: bytes) -> object:
        """What a ``Delivery`` has as its ``content``, made of the message's bytes.

        Raises:
            MalformedTaskError, UntrustedError: it is no task of ours. The broker acks, counts and
                drops it, since Taskiq's receiver would neither ack it nor give its place free.
            OtherBackendError: it is for another worker. The broker gives it back when it has seen
                what waits behind it, and leaves the error's note for its run.
        """

    @abstractmethod
    def refused(self, address: str, error: Exception) -> None:
        """Count a message that was refused, and say why.

        Args:
            address: of its broker.
        """

    def outage(self, error: ServerError | None) -> None:
        """Hear once that the queues cannot be listened to, and with None that they can again."""
        del error


class TaskBroker(AsyncBroker, Looks):
    """A broker with queues, priorities, release and withdrawal.

    What every implementation keeps:

    * A message that ``kick`` or ``kick_many`` has returned for is on the server, durable, in the
      queue of its label ``queue_name``, whether or not anybody listens there yet.
    * Within a queue, the higher label ``priority`` (0..10) comes first, and of equal ones the one
      sent first. A listener with several queues looks at them in turn.
    * ``listen`` takes a message only when its consumer asks for the next one, so that a busy
      worker never holds one that an idle worker could run.
    * A delivery that was neither acked nor released when its worker died goes back to its place in
      the queue. One of a worker that lives stays in hand until it is settled.
    * A lost connection is restored by the broker; ``listen`` goes on by itself. So each call
      connects where need be; ``startup`` says early that the server is away or refuses.

    Where servers differ, so that callers rely on neither:

    * A searchable queue, on Redis, Valkey or PostgreSQL, finds tasks by their ids. A queue of
      RabbitMQ is not searchable: see ``withdraw`` and ``absent``.
    * A task that is sent again while it waits or is in hand keeps its place in a searchable queue;
      otherwise it comes twice. A task's claim is what lets only one of the two execute.
    * What a dead worker had in hand goes back when the server sees that the connection is gone,
      or, on Redis and PostgreSQL, after ``IN_HAND_SECONDS``; the same holds for ``shutdown``.
    * An ``ack`` may come when the delivery went back already. A searchable queue then forgets the
      task wherever it is, since its worker has claimed it. Otherwise the ``ack`` raises
      ``UnreachableServerError`` and the task comes again. A late ``release`` changes nothing.

    ``memory`` is the executable text of all this, with searchable queues or without.

    Args of every implementation: ``options``, how to reach the server; ``queues``, the physical
    queues to listen on (none for a sender); and ``admission``.

    Errors: ``UnreachableServerError`` or ``RefusedByServerError`` with the address and without
    the password, from ``startup`` and every method that talks to the server.
    """

    #: URL without its password, for messages and logs.
    address: str

    #: The physical queues to listen on; ``listen_on`` changes them.
    queues: Sequence[str]

    #: Decides which messages are handed on, and hears of the others; None for all.
    admission: Admission | None = None

    _is_shut_down: bool = False

    #: Done when listeners have other queues to listen on; only while one waits.
    _turned: asyncio.Future[None] | None = None

    #: Whether it may have no queues to listen on only for now.
    _has_turned = False

    async def shutdown(self) -> None:
        """Close the connections; listeners end, and unsettled messages go back to their queues.

        On Redis and PostgreSQL they go back only after ``IN_HAND_SECONDS``.
        """
        self._is_shut_down = True
        self._end_waits()
        await super().shutdown()

    def listen_on(self, queues: Sequence[str]) -> None:
        """Have listeners listen on these queues from now on, also while they wait; on none: rest.

        A message that was handed on is not affected; one that is just being taken goes back. Called
        in the broker's event loop.
        """
        self.queues = tuple(queues)
        self._has_turned = True
        self._end_waits()

    def _end_waits(self) -> None:
        turned, self._turned = self._turned, None
        if turned is not None:
            turned.set_result(None)

    async def listen(self) -> AsyncGenerator[AckableMessage, None]:
        """A ``Delivery`` of one of the queues, each time the consumer asks."""
        parking = Parking()
        try:
            # aclosing, since a generator that is closed does not close the one it iterates over
            async with aclosing(self.deliveries(parking)) as deliveries:
                async for delivery in deliveries:
                    if await self._is_admitted(delivery, parking):
                        await parking.give_back()
                        yield delivery
        finally:
            await parking.give_back()

    async def _is_admitted(self, delivery: Delivery, parking: Parking) -> bool:
        if self.admission is None:
            return True
        try:
            if delivery.flaw:
                raise MalformedTaskError(delivery.flaw)
            delivery.content = self.admission.admit(delivery.data)
        except (MalformedTaskError, UntrustedError) as error:
            self.admission.refused(self.address, error)
            with suppress(ServerError):  # it comes again, and is refused again
                await to_its_end(delivery.ack())
            return False
        except OtherBackendError as error:
            if parking.put(delivery.release, error.run_id):
                with suppress(ServerError):  # its worker says it, too
                    await to_its_end(self.leave_note(error.run_id, error.note))
            return False
        return True

    async def deliveries(self, parking: Parking | None = None) -> AsyncGenerator[Delivery, None]:
        """Every message of the queues, one at a time, through outages; see ``listen``.

        Args:
            parking: of those that are for other workers, where there are any.

        Raises:
            ConfigError: the broker has no queues to listen on.
        """
        if not self.queues and not self._has_turned:
            raise ConfigError(f"The broker at {self.address} was opened without queues, to send.")
        listener, parking = self.listener(), parking or Parking()
        outage = Outage(self.address, self.admission.outage if self.admission else None)
        queues = self.queues
        while not self._is_shut_down:
            try:
                if queues != self.queues:
                    await to_its_end(listener.turn_to(self.queues))
                    queues = self.queues
                delivery = None if parking.is_full else await self._look(listener)
                if delivery is not None and queues != self.queues:
                    await to_its_end(delivery.release())  # who has turned us relies on it
                    continue
                if delivery is None and not parking.is_empty:
                    await parking.look_away()
                elif delivery is None:
                    await self._wait(listener)
                outage.over()  # not after the look alone: the wait may be what is refused
            except ServerError as error:
                if not self._is_shut_down:
                    await asyncio.sleep(outage.pause_seconds(error))
                continue
            if delivery is not None:
                yield delivery

    async def _look(self, listener: Listener) -> Delivery | None:
        return await _uninterrupted(listener.look()) if self.queues else None

    async def _wait(self, listener: Listener) -> None:
        """Wait as the listener does, or until there are other queues to listen on."""
        if self._turned is None:
            self._turned = asyncio.get_running_loop().create_future()
        turned = self._turned
        if not self.queues:
            await asyncio.wait({turned})
            return
        waiting = asyncio.ensure_future(listener.wait())
        try:
            await asyncio.wait({waiting, turned}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # cancelled once: it gives back what it has been brought meanwhile
            waiting.cancel()
            await asyncio.wait({waiting})
        if not waiting.cancelled():
            waiting.result()

    @abstractmethod
    def listener(self) -> Listener:
        """A new listener to the broker's queues."""

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

    @abstractmethod
    async def product(self) -> str:
        """Name and version of the server, as it says them: ``Valkey 8.1.1``."""

    @abstractmethod
    async def leave_note(self, run_id: str, note: bytes) -> None:
        """Leave a note where a run's loop may find it, which cannot be reached otherwise.

        The newest note of a run counts, and no note is kept for long.
        """

    @abstractmethod
    async def take_note(self, run_id: str) -> bytes | None:
        """The note that was left for a run; the first question may only make the place for it."""


async def _uninterrupted(look: Awaitable[Delivery | None]) -> Delivery | None:
    """Take a message, or when cancelled, none: one that the server has handed out is given back.

    Taskiq cancels the pending read when it stops; the task that was just being taken would wait
    for ``IN_HAND_SECONDS``.
    """
    task = asyncio.ensure_future(look)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        with suppress(ServerError):
            delivery = await task
            if delivery is not None:
                await delivery.release()
        raise
