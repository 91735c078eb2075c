"""Names of queues as labels, of which there must not be any number."""

from __future__ import annotations

from collections.abc import Iterable

#: Stands for all queues beyond those that are told apart.
OTHER = "(other)"

#: How many queues have a label of their own beside those that were configured: anybody who may
#: write to the broker can name one.
MOST_UNKNOWN = 100


class QueueLabels:
    """Gives each queue its label.

    Args:
        known: queues that always have their own.
    """

    def __init__(self, known: Iterable[str]) -> None:
        self._known = set(known)
        self._unknown: set[str] = set()

    def of(self, queue: str) -> str:
        """The queue's name, or ``OTHER``."""
        if queue in self._known or queue in self._unknown:
            return queue
        if len(self._unknown) >= MOST_UNKNOWN:
            return OTHER
        self._unknown.add(queue)
        return queue
