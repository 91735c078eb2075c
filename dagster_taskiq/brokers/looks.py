"""What a look into a queue brings, which takes nothing out of it."""

from __future__ import annotations

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
