"""What was ordered on the page, for everybody who looks at it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dagster_taskiq.connections import Servers
from dagster_taskiq.dashboard.actions import Action, Order
from dagster_taskiq.errors import DagsterTaskiqError
from dagster_taskiq.messages.plain_text import plain_reason

#: How many orders are shown, and for how long.
_MOST = 20
SHOWN_SECONDS = 600.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Done:
    """An order, and what came of it.

    Attributes:
        number: of the order, from 1.
        at: seconds since the epoch.
        user: who has given it; empty where nobody has a name.
    """

    number: int
    at: float
    label: str
    text: str
    is_refused: bool
    user: str


class Orders:
    """Gives orders, each on connections of its own, and remembers them.

    Args:
        find: the servers; None where the embedded one rests.
    """

    def __init__(
        self, find: Callable[[], Servers | None], clock: Callable[[], float] = time.time
    ) -> None:
        self._find = find
        self._clock = clock
        self._done: deque[Done] = deque(maxlen=_MOST)
        self._number = 0

    async def give(self, action: Action, target: str, reason: str, user: str) -> Done:
        """Do it; what came of it is also written to the log of this process."""
        try:
            text, is_refused = await self._do(action, target, reason, user), False
        except DagsterTaskiqError as error:
            text, is_refused = str(error), True
        self._number += 1
        text = plain_reason(text)
        done = Done(self._number, self._clock(), action.label, text, is_refused, user)
        self._done.appendleft(done)
        level = logging.WARNING if is_refused else logging.INFO
        _log.log(level, "%s, by %s: %s", action.label, user or "a viewer of the page", text)
        return done

    async def _do(self, action: Action, target: str, reason: str, user: str) -> str:
        servers = await asyncio.to_thread(self._find)
        if servers is None:
            raise DagsterTaskiqError("No process uses the embedded server: nothing is there.")
        return await action.do(Order(servers, target, reason, user))

    def recent(self) -> Sequence[Done]:
        """The last ones, the newest first."""
        now = self._clock()
        return [it for it in self._done if now - it.at < SHOWN_SECONDS]
