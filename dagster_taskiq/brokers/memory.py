"""The broker in memory: the whole contract in one process, for tests.

``MemoryQueues`` is what a Redis or RabbitMQ is to other brokers: it keeps the tasks, and each
process of a test, or what stands for one, has a ``MemoryBroker`` of its own on it, in any thread::

    queues = MemoryQueues()
    sender, worker = MemoryBroker(queues), MemoryBroker(queues, ["steps"])
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from dagster_taskiq._taskiq import BrokerMessage
from dagster_taskiq.aio.remote_event import RemoteEvent
from dagster_taskiq.brokers.base import (
    Admission,
    Delivery,
    Listener,
    TaskBroker,
)
from dagster_taskiq.brokers.looks import PriorityGroup, WaitingTask
from dagster_taskiq.brokers.memory_queue import Hold, MemoryQueue, MemoryTask
from dagster_taskiq.brokers.outgoing import priority_of, queue_of
from dagster_taskiq.errors import UnreachableServerError

__all__ = ["MemoryBroker", "MemoryQueues"]


class MemoryQueues:
    """What several ``MemoryBroker`` share, with the accidents that a real server has.

    Args:
        name: of its address, ``memory://<name>``.
        is_searchable: whether tasks can be found in a queue by their ids, as on Redis. Otherwise
            it is as RabbitMQ: nothing can be withdrawn, a task that is sent again comes twice, and
            an ``ack`` of a task that went back to its queue raises.
    """

    def __init__(self, name: str = "test", *, is_searchable: bool = True) -> None:
        self.address = f"memory://{name}"
        self.is_searchable = is_searchable
        self._lock = threading.RLock()
        self._queues: dict[str, MemoryQueue] = {}
        #: By run.
        self.notes: dict[str, bytes] = {}
        self._numbers = itertools.count()
        self._is_frozen = False
        self._listeners: dict[RemoteEvent, Collection[str]] = {}

    # --- accidents ---

    def forget(self) -> None:
        """Lose all tasks, also those in hand."""
        with self._lock:
            self._queues.clear()

    def freeze(self) -> None:
        """Be unreachable for every broker, until ``thaw``; what is in hand stays there."""
        with self._lock:
            self._is_frozen = True
            self.wake()

    def thaw(self) -> None:
        """Undo ``freeze``."""
        with self._lock:
            self._is_frozen = False

    # --- for ``MemoryBroker`` ---

    @contextmanager
    def reached(self, broker: MemoryBroker) -> Iterator[None]:
        """One atomic step.

        Raises:
            UnreachableServerError: the server is frozen, or the broker without a connection.
        """
        with self._lock:
            if self._is_frozen:
                self._raise_unreachable("it is frozen. Call its thaw().")
            if not broker.is_connected:
                self._raise_unreachable("this broker is disconnected. Call its connect().")
            yield

    def _raise_unreachable(self, why: str) -> None:
        raise UnreachableServerError(self.address, f"Cannot reach {self.address}: {why}")

    def queue(self, name: str) -> MemoryQueue:
        """A queue, which is there as soon as somebody speaks of it."""
        return self._queues.setdefault(name, MemoryQueue(self.is_searchable))

    def queues_with_tasks(self) -> set[str]:
        """The queues in which tasks wait."""
        return {name for name, queue in self._queues.items() if queue.depth}

    def put(self, message: BrokerMessage) -> None:
        """Add a task to its queue and wake who waits for it."""
        place = (-priority_of(message), next(self._numbers))
        queue = queue_of(message)
        self.queue(queue).put(MemoryTask(place, message.task_id, message.message))
        self.wake(queue)

    def give_back(self, hold: Hold) -> None:
        """Let a task in hand wait again; nothing where that delivery is over."""
        if self.queue(hold.queue).give_back(hold):
            self.wake(hold.queue)

    def end(self, hold: Hold) -> None:
        """Forget a task.

        Raises:
            UnreachableServerError: it went back to its queue, where it cannot be found.
        """
        if not self.queue(hold.queue).end(hold):
            self._raise_unreachable(
                "the connection over which the task came is lost. The task was not acked and will "
                "be delivered again."
            )

    def lose(self, broker: MemoryBroker) -> None:
        """Give back all that a broker has in hand, and let its listeners notice."""
        with self._lock:
            for queue in self._queues.values():
                for hold in queue.holds_of(broker):
                    self.give_back(hold)
            self.wake()

    async def wait(self, broker: MemoryBroker) -> None:
        """Return when there may be a task in the broker's queues, or the server be lost."""
        event = RemoteEvent()
        with self._lock:
            self._listeners[event] = broker.queues
        try:
            with self.reached(broker):
                if any(self.queue(queue).depth for queue in broker.queues):
                    return
            await event.wait()
        finally:
            with self._lock:
                del self._listeners[event]

    def wake(self, queue: str | None = None) -> None:
        """Let the listeners of a queue look again; of all queues for None."""
        for event, queues in self._listeners.items():
            if queue is None or queue in queues:
                event.set()


class MemoryBroker(TaskBroker):
    """See ``TaskBroker``.

    Args:
        server: that keeps the tasks.
        queues: the physical queues to listen on; none for a sender.
        admission: decides which messages are handed on; None for all.
    """

    def __init__(
        self,
        server: MemoryQueues,
        queues: Sequence[str] = (),
        admission: Admission | None = None,
    ) -> None:
        super().__init__()
        self.address = server.address
        self.queues = tuple(queues)
        self.admission = admission
        #: Whether it can reach its server, which may be frozen beside that.
        self.is_connected = True
        self._server = server

    # --- accidents ---

    def disconnect(self) -> None:
        """Lose the connection, as if the process or the network died, until ``connect``.

        What the broker has in hand goes back to its queues.
        """
        self.is_connected = False
        self._server.lose(self)

    def connect(self) -> None:
        """Undo ``disconnect``; nothing comes back into its hands."""
        self.is_connected = True

    # --- the contract ---

    async def startup(self) -> None:
        """See ``TaskBroker``."""
        with self._server.reached(self):
            self._is_shut_down = False
        await super().startup()

    async def shutdown(self) -> None:
        """End the listeners; what is in hand goes back at once."""
        await super().shutdown()
        self._server.lose(self)

    async def leave_note(self, run_id: str, note: bytes) -> None:
        """See ``TaskBroker``: here it stays."""
        with self._server.reached(self):
            self._server.notes[run_id] = note

    async def take_note(self, run_id: str) -> bytes | None:
        """See ``TaskBroker``."""
        with self._server.reached(self):
            return self._server.notes.get(run_id)

    async def kick(self, message: BrokerMessage) -> None:
        """Send one message; see ``TaskBroker``."""
        await self.kick_many([message])

    async def kick_many(self, messages: Sequence[BrokerMessage]) -> None:
        """Send several messages, all or none."""
        for message in messages:
            queue_of(message)  # raises before anything is sent
        with self._server.reached(self):
            for message in messages:
                self._server.put(message)

    async def withdraw(self, queue: str, task_ids: Collection[str]) -> set[str]:
        """Take waiting tasks out, from searchable queues; exact. See ``TaskBroker``."""
        with self._server.reached(self):
            return self._server.queue(queue).withdraw(task_ids)

    async def absent(self, queue: str, task_ids: Collection[str]) -> set[str]:
        """Which tasks are not there; exact for searchable queues. See ``TaskBroker``."""
        with self._server.reached(self):
            return self._server.queue(queue).absent(task_ids)

    async def depth(self, queue: str) -> int:
        """How many tasks wait in a queue."""
        with self._server.reached(self):
            return self._server.queue(queue).depth

    async def queues_with_tasks(self) -> set[str] | None:
        """See ``TaskBroker``; None where its queues are not searchable, as with RabbitMQ."""
        with self._server.reached(self):
            return self._server.queues_with_tasks() if self._server.is_searchable else None

    async def peek(self, queue: str, limit: int) -> list[WaitingTask] | None:
        """See ``TaskBroker``; None where its queues are not searchable."""
        with self._server.reached(self):
            return self._server.queue(queue).peek(limit) if self._server.is_searchable else None

    async def places(self, queue: str, task_ids: Collection[str]) -> dict[str, int] | None:
        """See ``TaskBroker``; None where its queues are not searchable."""
        with self._server.reached(self):
            known = self._server.queue(queue)
            return known.places(task_ids) if self._server.is_searchable else None

    async def by_priority(self, queue: str) -> list[PriorityGroup] | None:
        """See ``TaskBroker``; None where its queues are not searchable."""
        with self._server.reached(self):
            return self._server.queue(queue).by_priority() if self._server.is_searchable else None

    async def product(self) -> str:
        """See ``TaskBroker``."""
        with self._server.reached(self):
            return "memory"

    def listener(self) -> Listener:
        """See ``TaskBroker``."""
        return _MemoryListener(self, self._server)


class _MemoryListener(Listener):
    """Looks at its queues in turn."""

    def __init__(self, broker: MemoryBroker, server: MemoryQueues) -> None:
        self._broker = broker
        self._server = server
        self._queues = list(broker.queues)

    async def look(self) -> Delivery | None:
        with self._server.reached(self._broker):
            for _ in self._queues:
                queue = self._queues.pop(0)  # whatever it has, it is the others' turn then
                self._queues.append(queue)
                hold = self._server.queue(queue).take(self._broker, queue)
                if hold is not None:
                    return self._delivery(hold)
        return None

    async def wait(self) -> None:
        await self._server.wait(self._broker)

    async def turn_to(self, queues: Sequence[str]) -> None:
        self._queues = list(queues)

    def _delivery(self, hold: Hold) -> Delivery:
        async def ack() -> None:
            with self._server.reached(self._broker):
                self._server.end(hold)

        async def release() -> None:
            with self._server.reached(self._broker):
                self._server.give_back(hold)

        return Delivery(data=hold.task.payload, ack=ack, release=release)
