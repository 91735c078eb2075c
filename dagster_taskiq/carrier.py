"""The way of tasks to the workers, and what is heard of them, over servers that are open.

A broker knows where a task waits, a backend what became of it. This module has the calls that need
both, and the order in which they are asked; the loop's client and the launcher's share it.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from dagster_taskiq._taskiq import BrokerMessage
from dagster_taskiq.backend import Backend, TaskState
from dagster_taskiq.brokers import TaskBroker
from dagster_taskiq.connections import Servers
from dagster_taskiq.errors import ServerError
from dagster_taskiq.messages.control import cancel_order
from dagster_taskiq.messages.envelope import Envelope
from dagster_taskiq.messages.notes import read_note
from dagster_taskiq.messages.queue_looks import QueueLook
from dagster_taskiq.messages.queue_names import QueueKind
from dagster_taskiq.messages.queue_waits import Listeners, QueueWait, QueueWaits, WaitKind
from dagster_taskiq.messages.refusals import Refusals
from dagster_taskiq.messages.results import TaskResult, read_result


class Carrier:
    """Carries tasks of one kind. Its coroutines are for the event loop of the connections.

    Tasks are given with the queues that they were sent to, as people name them.

    Args:
        servers: which they are, and how tasks are signed.
        kind: of the tasks.
        broker: connected to the one.
        backend: connected to the other.

    Errors: ``ServerError`` with the address from every coroutine.
    """

    def __init__(
        self, servers: Servers, kind: QueueKind, broker: TaskBroker, backend: Backend
    ) -> None:
        self._servers = servers
        self._kind = kind
        self._broker = broker
        self._backend = backend
        self._refusals = Refusals(servers.backend.address)

    def message_of(self, envelope: Envelope) -> BrokerMessage:
        """A task, signed and ready to be sent.

        Raises:
            TooLargeError: it is longer than the settings allow.
        """
        known = replace(
            envelope,
            state=self._backend.identity,
            backend=self._backend.address,
            sent_at=time.time(),
        )
        return known.to_message(self._physical_queue(envelope.queue), self._servers.signer)

    async def send(self, messages: Sequence[BrokerMessage]) -> None:
        """Send tasks in their order; all are on the broker on return."""
        await self._broker.kick_many(messages)

    async def cancel(
        self, run_id: str, tasks: Mapping[str, str], reason: str
    ) -> tuple[str, dict[str, TaskState]]:
        """Stop tasks of a run, and take those that nobody had claimed out of their queues.

        Args:
            tasks: the queue of each, by its id.

        Returns:
            see ``RunBackend.cancel``.
        """
        signer = self._servers.signer
        orders = {task_id: cancel_order(signer, task_id, reason) for task_id in tasks}
        # first the tombstones: from then on nobody can claim what is still queued
        epoch, states = await self._backend.cancel(run_id, orders)
        unclaimed = {
            task_id: queue
            for task_id, queue in tasks.items()
            if states[task_id] is TaskState.CANCELLED
        }
        for physical, task_ids in self._by_physical_queue(unclaimed).items():
            await self._broker.withdraw(physical, task_ids)
        return epoch, states

    async def absent(self, tasks: Mapping[str, str]) -> set[str]:
        """Which of the tasks the broker certainly does not hold; see ``TaskBroker.absent``.

        Args:
            tasks: the queue of each, by its id.
        """
        absent: set[str] = set()
        for physical, task_ids in self._by_physical_queue(tasks).items():
            absent |= await self._broker.absent(physical, task_ids)
        return absent

    async def depth(self, queue: str) -> int:
        """How many tasks of this kind wait in a queue."""
        return await self._broker.depth(self._physical_queue(queue))

    async def queue_waits(self) -> QueueWaits:
        """Why tasks of this kind wait in their queues, as the workers are now."""
        workers, pauses = await self._backend.workers(), await self._backend.paused_queues()
        broker, signer = self._servers.broker.address, self._servers.signer
        return QueueWaits(workers, self._kind, broker, signer, says_busy_steps=True, pauses=pauses)

    async def explained_waits(
        self, run_id: str, queues: Collection[str]
    ) -> tuple[dict[str, QueueWait], dict[str, Listeners]]:
        """Why a run's tasks wait in their queues, where there is a reason; and who listens."""
        if not queues:
            return {}, {}
        waits = await self.queue_waits()
        found = {queue: await self.explained(run_id, waits.of(queue)) for queue in queues}
        reasons = {queue: wait for queue, wait in found.items() if wait}
        return reasons, {queue: waits.listeners(queue) for queue in queues}

    async def look_into(self, queue: str, task_ids: Sequence[str]) -> QueueLook:
        """How many tasks wait in a queue, and the places of some, if the server tells.

        Args:
            task_ids: a few, as each is a question.
        """
        physical = self._physical_queue(queue)
        depth, places = None, None
        # for people only: a user who may not ask that is no outage
        with suppress(ServerError):
            depth = await self._broker.depth(physical)
            places = await self._broker.places(physical, task_ids)
        return QueueLook(depth, places or {})

    @staticmethod
    def may_explain(wait: QueueWait | None) -> bool:
        """Whether a worker may say more of a reason than the list of workers does."""
        return wait is not None and wait.kind is WaitKind.UNSERVED

    async def explained(self, run_id: str, wait: QueueWait | None) -> QueueWait | None:
        """The same reason, or what a worker says that gives a run's tasks back.

        Args:
            wait: why the run or its tasks wait, by what the workers in the list say.
        """
        if wait is None or not self.may_explain(wait):
            return wait
        data = await self._broker.take_note(run_id)
        said = None if data is None else read_note(self._servers.signer, run_id, data)
        return QueueWait(WaitKind.BACKEND, f"{wait.reason} {said}") if said else wait

    def read(self, task_id: str, data: bytes) -> TaskResult:
        """The result of a task as the backend has it; see ``read_result``."""
        return read_result(self._servers.signer, task_id, data, self._refusals)

    def _by_physical_queue(self, tasks: Mapping[str, str]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for task_id, queue in tasks.items():
            found.setdefault(self._physical_queue(queue), []).append(task_id)
        return found

    def _physical_queue(self, queue: str) -> str:
        return self._servers.physical_queue(self._kind, queue)
