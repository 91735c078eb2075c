"""Messages that a worker has taken and not settled: it says that it has them while it lives.

For servers that do not see by the connection whether a worker lives.

Most deliveries are settled within milliseconds, so one timer serves all of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dagster_taskiq.aio.loop_thread import end_tasks
from dagster_taskiq.errors import ServerError

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Held:
    """One delivery; its token may change each time that it is put off.

    Id and token are of the types that the server's client has.
    """

    queue: str
    task_id: Any
    token: Any


class InHand:
    """The deliveries of one broker.

    Args:
        put_off: says of deliveries of one queue that they are still in hand; returns their new
            tokens, empty for what is in other hands by now.
        every_seconds: how often.
    """

    def __init__(
        self,
        put_off: Callable[[str, Sequence[Held]], Awaitable[Sequence[Any]]],
        every_seconds: float,
    ) -> None:
        self._put_off = put_off
        self._every_seconds = every_seconds
        self._held: set[Held] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        #: Taken by whoever needs a token that the server has now.
        self.tokens_change = asyncio.Lock()

    def add(self, held: Held) -> None:
        """It was taken."""
        self._held.add(held)
        self._set_timer()

    def discard(self, held: Held) -> None:
        """It is being settled, whatever comes of that."""
        self._held.discard(held)

    async def close(self) -> None:
        """Say no more of it."""
        self._held.clear()
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            await end_tasks([self._task])

    def _set_timer(self) -> None:
        if self._timer is None and self._held:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._every_seconds, self._begin)

    def _begin(self) -> None:
        self._timer = None
        if self._held:
            self._task = asyncio.create_task(self._put_off_all(), name="in hand")

    async def _put_off_all(self) -> None:
        try:
            async with self.tokens_change:
                for queue in {it.queue for it in self._held}:
                    held = [it for it in self._held if it.queue == queue]
                    tokens = await self._put_off(queue, held) if held else []
                    for one, token in zip(held, tokens, strict=True):
                        one.token = token or one.token
        except ServerError as error:
            logger.debug("Cannot say what is in hand: %s", error)  # the listener says it aloud
        finally:
            self._set_timer()
