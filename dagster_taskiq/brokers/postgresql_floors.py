"""Where a broker's looks begin in queues on PostgreSQL, where the front is far from what waits.

What has passed through a queue is walked over by each look until it is vacuumed, and a transaction
that stays open in the database, such as a dump, keeps it from being vacuumed. So where a look from
the front takes long, the next ones begin at *floors*: numbers, of each queue and priority, below
which nothing waits. They are found by a look from the front, now and then, since what is given back
has its old number, which may be lower; and raised by looks from the last ones on in between.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from dagster_taskiq.defaults import MAX_PRIORITY

#: A look from the front that takes longer is a reason for floors: it has met some thousand dead
#: rows.
_SLOW_SECONDS = 0.005

#: How often floors are raised, and the longest time that sending may take: what takes longer may be
#: passed over until the next look from the front.
_RAISE_SECONDS = 0.5

#: How long nobody looks from the front: at least, at most, and in times of what that takes.
_SHORTEST_SECONDS = 2.0
_LONGEST_SECONDS = 10.0
_TIMES_OF_LOOK = 50.0

#: The floors of one queue, by priority from 0 on.
Row = Sequence[int]

_NONE: Row = [0] * (MAX_PRIORITY + 1)


class Floors:
    """The floors of one broker's queues.

    Args:
        find: looks for the floors of some queues, from the front or from earlier ones on; brings
            them, and how many seconds the look took on the server.
        clock: of seconds.
    """

    def __init__(
        self,
        find: Callable[
            [Sequence[str], Sequence[Row] | None], Awaitable[tuple[Sequence[Row], float]]
        ],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._find = find
        self._clock = clock
        self._turn = asyncio.Lock()
        self._are_used = False
        #: What the last look has found that might raise the floors, and the floors themselves. They
        #: are what the look before that one had found: none sees what is just being sent.
        self._found: dict[str, Row] = {}
        self._believed: dict[str, Row] = {}
        self._raise_at = 0.0
        self._front_at = 0.0

    async def of(self, queues: Sequence[str]) -> Sequence[Row] | None:
        """The floors of these queues, in their order; None to look from the front.

        Raises:
            ServerError: they are to be found, and the server is away.
        """
        async with self._turn:
            now = self._clock()
            is_new = not self._believed.keys() >= set(queues)
            if self._are_used and (now >= self._front_at or is_new):
                seconds = await self._look(queues, None)
                self._are_used = seconds > _SLOW_SECONDS
                pause = min(max(_SHORTEST_SECONDS, _TIMES_OF_LOOK * seconds), _LONGEST_SECONDS)
                self._front_at = now + pause
            if not self._are_used:
                return None
            if now >= self._raise_at:
                await self._look(queues, [self._believed[queue] for queue in queues])
            return [self._believed[queue] for queue in queues]

    async def _look(self, queues: Sequence[str], floors: Sequence[Row] | None) -> float:
        is_raise = self._clock() >= self._raise_at
        rows, seconds = await self._find(queues, floors)
        for queue, row in zip(queues, rows, strict=True):
            found = self._found.get(queue, _NONE)
            highest = found if is_raise else self._believed.get(queue, _NONE)
            self._believed[queue] = [*map(min, row, highest)]
            self._found[queue] = row if is_raise else [*map(min, row, found)]
        if is_raise:
            self._raise_at = self._clock() + _RAISE_SECONDS
        return seconds

    def looked(self, seconds: float) -> None:
        """Note how long a look from the front took on the server."""
        self._are_used = seconds > _SLOW_SECONDS

    def doubt(self) -> None:
        """Look from the front first: something was given back."""
        self._front_at = 0.0
