"""Bells: how a run's loop learns at once that there is a result for it.

A hint may be lost, come late or be anybody's, and never is the truth: what the backend has stored
is. Behind the hints the loop looks there all the same, seldom, and often where none arrive.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod

#: A longer hint is none of ours, which are ids of tasks.
_LONGEST_HINT = 1000

#: How many hints are kept for who has not read them; behind them is the look.
_MOST_HINTS = 10_000


class Hearing(ABC):
    """Hears the hints to one mailbox, until it is closed or lost.

    Args:
        arrived: set at each hint, and at the end of the hearing.
    """

    def __init__(self, arrived: asyncio.Event) -> None:
        self.hints: set[str] = set()
        self.is_lost = False
        #: Whether any hint has come, be it an empty one.
        self.has_heard = False
        self._arrived = arrived

    def hear(self, hint: str) -> None:
        """Keep a hint, and wake who waits."""
        self.has_heard = True
        if hint and len(hint) <= _LONGEST_HINT and len(self.hints) < _MOST_HINTS:
            self.hints.add(hint)
        self._arrived.set()

    def lose(self) -> None:
        """Wake who waits, since no more hints come."""
        self.is_lost = True
        self._arrived.set()

    @abstractmethod
    def close(self) -> None:
        """Hear no more."""


class Bell(ABC):
    """Rings for mailboxes, and hears who rings."""

    #: Whether hints arrive at all, as far as is known.
    works: bool = True

    @abstractmethod
    def ring(self, mailbox: str, hint: str) -> None:
        """Send a hint, beside the caller's work; nobody is told where it could not be sent."""

    @abstractmethod
    async def listen(self, mailbox: str, arrived: asyncio.Event) -> Hearing | None:
        """Hear the hints to a mailbox from now on.

        Returns:
            None where they cannot be heard: for now, or for good, which ``works`` and the log say.

        Raises:
            ServerError: the server is away or refuses for now.
        """

    @abstractmethod
    async def close(self) -> None:
        """Close the connections."""
