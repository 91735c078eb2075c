"""One queue of the broker in memory: which tasks wait there, and which are in hand."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Collection
from dataclasses import dataclass, field

from dagster_taskiq.brokers.looks import MAX_PEEK_BYTES, PriorityGroup, WaitingTask


@dataclass(order=True)
class MemoryTask:
    """A task on the server; the order is that of its queue, the next one first.

    Attributes:
        place: its priority, as a negative number, and the number under which it was sent.
    """

    place: tuple[int, int]
    task_id: str = field(compare=False)
    payload: bytes = field(compare=False)


@dataclass(eq=False)
class Hold:
    """One delivery of a task, which is in a broker's hands until it is settled or goes back."""

    holder: object
    queue: str
    task: MemoryTask


class MemoryQueue:
    """One queue: each of its tasks either waits or is in hand.

    Args:
        is_searchable: whether tasks can be found by their ids.
    """

    def __init__(self, is_searchable: bool) -> None:
        self.is_searchable = is_searchable
        self._waiting: list[MemoryTask] = []  # a heap
        self._holds: set[Hold] = set()
        self._ids: set[str] = set()  # of all its tasks, where it is searchable

    @property
    def depth(self) -> int:
        """How many tasks wait."""
        return len(self._waiting)

    def put(self, task: MemoryTask) -> None:
        """Let a task wait, unless it is here already."""
        if self.is_searchable:
            if task.task_id in self._ids:
                return
            self._ids.add(task.task_id)
        heapq.heappush(self._waiting, task)

    def take(self, holder: object, queue: str) -> Hold | None:
        """Put the next task into a broker's hands."""
        if not self._waiting:
            return None
        hold = Hold(holder, queue, heapq.heappop(self._waiting))
        self._holds.add(hold)
        return hold

    def give_back(self, hold: Hold) -> bool:
        """Let a task in hand wait again, in its old place; False where that delivery is over."""
        if hold not in self._holds:
            return False
        self._holds.remove(hold)
        heapq.heappush(self._waiting, hold.task)
        return True

    def holds_of(self, holder: object) -> list[Hold]:
        """What a broker has in hand."""
        return [hold for hold in self._holds if hold.holder is holder]

    def end(self, hold: Hold) -> bool:
        """Forget a task, where it can still be found; False where its delivery is over otherwise.

        A searchable queue forgets it wherever it is: its worker was slow to ack and has claimed it,
        so a copy that went back meanwhile is of no use to anybody.
        """
        if hold in self._holds:
            self._holds.remove(hold)
        elif not self.is_searchable:
            return False
        else:
            task_id = hold.task.task_id
            self._keep([task for task in self._waiting if task.task_id != task_id])
            self._holds = {it for it in self._holds if it.task.task_id != task_id}
        self._ids.discard(hold.task.task_id)
        return True

    def peek(self, limit: int) -> list[WaitingTask]:
        """The next tasks in their order."""
        return [_shown(task) for task in heapq.nsmallest(limit, self._waiting)]

    def places(self, task_ids: Collection[str]) -> dict[str, int]:
        """The places of those of the tasks that wait."""
        places = {task.task_id: place for place, task in enumerate(sorted(self._waiting), 1)}
        return {task_id: places[task_id] for task_id in task_ids if task_id in places}

    def by_priority(self) -> list[PriorityGroup]:
        """The tasks that wait, counted by their priorities."""
        groups = itertools.groupby(sorted(self._waiting), lambda task: task.place[0])
        return [
            PriorityGroup(len(tasks), _shown(tasks[0]))
            for tasks in (list(group) for _, group in groups)
        ]

    def withdraw(self, task_ids: Collection[str]) -> set[str]:
        """Forget those of the tasks that wait; returns their ids."""
        if not self.is_searchable:
            return set()
        withdrawn = {task.task_id for task in self._waiting} & set(task_ids)
        self._keep([task for task in self._waiting if task.task_id not in withdrawn])
        self._ids -= withdrawn
        return withdrawn

    def absent(self, task_ids: Collection[str]) -> set[str]:
        """Which of the tasks are certainly not here."""
        if self.is_searchable:
            return set(task_ids) - self._ids
        return set() if self._waiting else set(task_ids)

    def _keep(self, waiting: list[MemoryTask]) -> None:
        heapq.heapify(waiting)
        self._waiting = waiting


def _shown(task: MemoryTask) -> WaitingTask:
    data = task.payload if len(task.payload) <= MAX_PEEK_BYTES else b""
    return WaitingTask(task.task_id, -task.place[0], data)
