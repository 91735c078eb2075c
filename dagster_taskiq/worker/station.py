"""A station: a worker's slots for one kind of task, steps or runs, and the broker that brings them.

Steps and runs have separate stations with separate physical queues, so that runs, which wait for
their steps, never take the slots that those need. What becomes of a task is told in ``attempt``.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Collection, Sequence

from dagster_taskiq.aio.loop_thread import end_tasks
from dagster_taskiq.brokers import Delivery, TaskBroker
from dagster_taskiq.errors import CopyOfStepError, NoProcessError
from dagster_taskiq.messages.envelope import Envelope, TaskName
from dagster_taskiq.messages.queue_names import QueueKind
from dagster_taskiq.worker.attempt import Attempt
from dagster_taskiq.worker.receiver import SettlingReceiver
from dagster_taskiq.worker.slot_base import Slot
from dagster_taskiq.worker.slot_pool import SlotPool
from dagster_taskiq.worker.tools import Tools

_TASK_NAMES = {
    QueueKind.STEPS: (TaskName.EXECUTE_PLAN,),
    QueueKind.RUNS: (TaskName.EXECUTE_JOB, TaskName.RESUME_JOB),
}


class Station:
    """Takes tasks of one kind and has its slots execute them.

    Args:
        kind: of its tasks.
        broker: with the physical queues to listen on, and with the station's ``StationAdmission``;
            not yet started.
        make_slot: makes the slot of a number, not yet prepared.
        count: how many slots it begins with.
        tools: of its attempts.
    """

    def __init__(
        self,
        kind: QueueKind,
        broker: TaskBroker,
        make_slot: Callable[[int], Slot],
        count: int,
        tools: Tools,
    ) -> None:
        self.kind = kind
        self._broker = broker
        self._make_slot = make_slot
        self._slots = SlotPool([make_slot(number) for number in range(1, count + 1)], kind.value)
        self._wanted = count
        self._resized = asyncio.Event()
        self._tools = tools
        self._is_draining: Callable[[], bool] = lambda: False
        broker.is_worker_process = True
        for name in _TASK_NAMES[kind]:
            self._register(name)
        self._receiver = SettlingReceiver(broker, count, self._recover)

    async def reach(self) -> None:
        """Reach the broker.

        Raises:
            ServerError: it cannot be reached, or refuses.
        """
        await self._broker.startup()

    async def start(self) -> None:
        """Warm the slots.

        Raises:
            SlotError: a child cannot be started.
        """
        await self._slots.start()

    async def work(self, drain: asyncio.Event) -> None:
        """Take and execute tasks until told to drain; returns when the last one is done."""
        self._is_draining = drain.is_set
        await self._receiver.listen(drain)

    async def _recover(self) -> None:
        await self._slots.end_shortage(self._is_draining)

    def listen_on(self, queues: Sequence[str]) -> None:
        """Take tasks from these physical queues from now on; from none: rest."""
        self._broker.listen_on(queues)

    def resize(self, count: int) -> None:
        """Have so many slots, as soon as ``keep_size`` can: no task is stopped for it."""
        self._wanted = count
        self._resized.set()

    async def keep_size(self) -> None:
        """Have as many slots as are wanted, until cancelled."""
        while True:
            self._resized.clear()
            while len(self._slots) < self._wanted:
                await self._slots.add(self._make_slot(_lowest_free(self._slots.numbers)))
                self._receiver.grow()
            if len(self._slots) == self._wanted:
                await self._resized.wait()
            elif await self._has_free_place():
                await self._slots.remove()

    async def _has_free_place(self) -> bool:
        """Wait for a slot that is idle and gets no task, or until another number is wanted."""
        shrinking = asyncio.ensure_future(self._receiver.shrink())
        resized = asyncio.ensure_future(self._resized.wait())
        try:
            await asyncio.wait({shrinking, resized}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await end_tasks([shrinking, resized])
        return not shrinking.cancelled()

    async def reload(self) -> None:
        """Give every slot a fresh child: at once where it is idle, else after its task."""
        await self._slots.reload()

    async def stop(self) -> None:
        """Kill what still runs, and leave the broker."""
        await self._slots.stop()
        await self._tools.run_watch.stop()
        await self._broker.shutdown()

    @property
    def slot_count(self) -> int:
        """How many tasks it can execute at once."""
        return len(self._slots)

    @property
    def is_short(self) -> bool:
        """Whether it takes no tasks, since it cannot start processes for them."""
        return self._slots.is_short

    def _register(self, name: TaskName) -> None:
        # Taskiq's receiver calls this for each message, by the task's name
        async def execute(delivery: Delivery) -> None:
            await self._execute(delivery)

        self._broker.register_task(execute, task_name=name.value)

    async def _execute(self, delivery: Delivery) -> None:
        """Execute an admitted message, or leave it unsettled: the receiver gives it back then."""
        if self._is_draining():
            return
        envelope: Envelope = delivery.content
        slot = self._slots.take(envelope.code_location)
        try:
            await Attempt(delivery, slot, self._tools, self._is_draining).run()
        except NoProcessError as error:
            # the receiver gives back what was not acked
            self._slots.note_shortage(slot, error)
        except CopyOfStepError as error:
            self._tools.observer.refused(self._broker.address, "a message", error)
        finally:
            await self._slots.put_back(slot, is_needed=not self._is_draining())


def _lowest_free(numbers: Collection[int]) -> int:
    return next(number for number in itertools.count(1) if number not in numbers)
