"""Messages that a worker must leave to another one, and holds while it looks behind them.

Given back one by one, each would be the first in its queue again. They are given back when
something of the worker's own was found, or when there is nothing else. Then the worker looks away
for a moment, or it would take them again before another worker can.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress

from dagster_taskiq.aio.loop_thread import to_its_end
from dagster_taskiq.errors import ServerError

#: How many are held at a time; behind more of them a worker does not see its own tasks.
MOST_PARKED = 100

#: How long a worker looks away, on average.
PAUSE_SECONDS = 0.5


class Parking:
    """Holds deliveries by what gives them back."""

    def __init__(self) -> None:
        self._releases: list[Callable[[], Awaitable[None]]] = []
        self._run_ids: set[str] = set()

    def put(self, release: Callable[[], Awaitable[None]], run_id: str) -> bool:
        """Hold a delivery.

        Args:
            release: of the delivery.
            run_id: of its task.

        Returns:
            whether it is the first of its run since all were given back.
        """
        self._releases.append(release)
        is_first = run_id not in self._run_ids
        self._run_ids.add(run_id)
        return is_first

    @property
    def is_empty(self) -> bool:
        """Whether none is held."""
        return not self._releases

    @property
    def is_full(self) -> bool:
        """Whether no other one can be held."""
        return len(self._releases) >= MOST_PARKED

    async def give_back(self) -> None:
        """Give all of them back, to their old places."""
        self._run_ids.clear()
        if self._releases:
            await to_its_end(self._release_all())

    async def _release_all(self) -> None:
        while self._releases:
            release = self._releases.pop()
            with suppress(ServerError):  # the server takes it back when it sees that we are gone
                await release()

    async def look_away(self) -> None:
        """Give all of them back, and leave them to others for a moment."""
        await self.give_back()
        await asyncio.sleep(PAUSE_SECONDS * random.uniform(0.5, 1.5))
