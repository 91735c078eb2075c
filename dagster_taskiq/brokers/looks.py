"""What a look into a queue brings, which takes nothing out of it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

#: The longest message that a look into a queue brings: it is made for people, of many tasks.
MAX_PEEK_BYTES = 256 * 2**10


@dataclass(frozen=True)
class WaitingTask:
    """A task that waits in a queue.

    Attributes:
        data: of its message; empty where that is longer than ``MAX_PEEK_BYTES``.
    """

    task_id: str
    priority: int
    data: bytes


@dataclass(frozen=True)
class PriorityGroup:
    """The tasks of one priority that wait in a queue.

    Attributes:
        count: how many.
        first: the next of them.
    """

    count: int
    first: WaitingTask


class Looks:
    """What a broker shows of its queues: nothing where the server cannot look into them."""

    async def queues_with_tasks(self) -> set[str] | None:
        """The physical queues of the deployment in which tasks wait.

        Returns:
            None from a broker whose server does not list its queues.
        """
        return None

    async def peek(self, queue: str, limit: int) -> list[WaitingTask] | None:
        """The next tasks of a physical queue in their order, without taking them.

        Args:
            limit: how many at most.

        Returns:
            None from a broker that cannot look into its queue.
        """
        del queue, limit
        return None

    async def places(self, queue: str, task_ids: Collection[str]) -> dict[str, int] | None:
        """The places of those of the tasks that wait in a physical queue; the next one has 1.

        Returns:
            None from a broker that cannot look into its queue.
        """
        del queue, task_ids
        return None

    async def by_priority(self, queue: str) -> list[PriorityGroup] | None:
        """How many tasks of each priority wait in a physical queue, the highest first.

        The one that has waited longest is among the first ones of the groups. Tasks that come or go
        meanwhile may be counted or not.

        Returns:
            None from a broker that cannot look into its queue.
        """
        del queue
        return None
