"""What a sender sees of a queue in which a task of its own waits, in words for Dagster's UI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dagster_taskiq.messages.queue_waits import Listeners, QueueWait

#: How many workers or steps an event names.
_MOST_NAMES = 20


@dataclass(frozen=True)
class QueueLook:
    """One look into a queue, as its tasks wait there.

    Attributes:
        depth: how many tasks wait there; None where the server did not say.
        places: of the tasks that were asked for, the next one has 1; empty where the server cannot
            tell.
    """

    depth: int | None = None
    places: Mapping[str, int] = field(default_factory=dict)

    def sentence(self, task_id: str, name: str = "It") -> str:
        """Which place a task has, or how many tasks wait; empty where neither is known.

        Args:
            name: of the task.
        """
        place = self.places.get(task_id)
        if self.depth is None or (place is None and not self.depth):
            return ""
        if place is None:
            verb = "task waits" if self.depth == 1 else "tasks wait"
            return f"{self.depth} {verb} in the queue."
        # tasks may have been taken or sent between the two questions
        return f"{name} has place {place} of {max(place, self.depth)} in the queue."


def queue_metadata(
    queue: str, wait: QueueWait, look: QueueLook, listeners: Listeners | None
) -> dict[str, str | int]:
    """What is known of a queue and of why its tasks wait, for an event."""
    found: dict[str, str | int] = {"queue": queue, "reason": wait.kind.value}
    if look.depth is not None:
        found["tasks in queue"] = look.depth
    if listeners is not None:
        found["workers"] = named(listeners.names)
        found["busy slots"] = f"{listeners.busy_slots} of {listeners.slots}"
    return found


def task_metadata(task_id: str, priority: int, look: QueueLook) -> dict[str, int]:
    """What is known of one task in its queue, for an event."""
    found = {"priority": priority}
    if (place := look.places.get(task_id)) is not None:
        found["tasks before it"] = place - 1
    return found


def named(names: Sequence[str]) -> str:
    """Names for people: not all of very many."""
    more = len(names) - _MOST_NAMES
    text = ", ".join(names[:_MOST_NAMES]) or "none"
    return f"{text} and {more} more" if more > 0 else text
