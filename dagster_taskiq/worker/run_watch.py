"""What a worker has to ask and to tell Dagster about runs, when their own process cannot.

Steps of a run that may be resumed go on without its process. When it is not resumed after all (the
resume failed, somebody marked the run as failed or deleted it), nobody tells the worker, so it asks
Dagster. And it tells Dagster of a launched run that could not start (its process died before, or a
child for it did not come up), which nobody else would notice before its start timeout. And it asks
where the code of earlier runs is.

All through a child process, as the worker itself has no Dagster instance.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from dagster_taskiq.aio.loop_thread import end_tasks
from dagster_taskiq.errors import SlotError
from dagster_taskiq.worker.child_messages import (
    FailRun,
    FindCode,
    LookAtRun,
    RunAnswer,
    RunOrder,
)
from dagster_taskiq.worker.slot_base import ChildDied, Slot

logger = logging.getLogger(__name__)

#: How long Dagster is told again that a run could not start.
TELL_SECONDS = 300.0

#: Pause before the next try: the first one, and the longest.
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 10.0


class RunWatch:
    """Asks or tells one thing at a time.

    Args:
        slot: of its own; it has a child only while there is something to say.
    """

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self._turn = asyncio.Lock()
        self._looks: dict[str, asyncio.Task[None]] = {}
        self._is_stopped = asyncio.Event()

    def look(self, key: str, payload: str, on_over: Callable[[], None]) -> None:
        """Ask Dagster whether the run of a step is over, unless the last answer is still out.

        Args:
            key: of who asks.
            payload: of the step's task, as it travels.
            on_over: called if the run is over.
        """

        async def look() -> None:
            try:
                if await self.is_over(payload):
                    on_over()
            finally:
                del self._looks[key]

        if key not in self._looks:
            self._looks[key] = asyncio.create_task(look(), name=f"look after the run of {key}")

    async def is_over(self, payload: str) -> bool:
        """Whether the run of a step is finished or deleted; False where that cannot be known.

        Args:
            payload: of the step's task, as it travels.
        """
        answer = await self._say(LookAtRun(payload))
        return answer is not None and answer.is_over

    async def fail(self, payload: str, reason: str) -> None:
        """Fail a run that still waits to be started; tries until Dagster has heard it, for a while.

        What killed the run's process may keep the child of this from starting, too.

        Args:
            payload: of the run's task, as it travels.
            reason: why it could not start.
        """
        deadline = time.monotonic() + TELL_SECONDS
        pause = _FIRST_PAUSE_SECONDS
        while await self._say(FailRun(payload, reason)) is None:
            if self._is_stopped.is_set() or time.monotonic() + pause > deadline:
                logger.error(
                    "Dagster was not told that a run could not start (%s): it stays STARTING until "
                    "Dagster's start timeout. End it in the UI, or launch it again.",
                    reason,
                )
                return
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._is_stopped.wait(), pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    async def find_code(self, run_ids: Sequence[str]) -> Mapping[str, str]:
        """The code locations of runs with a payload of each, see ``payloads_of``.

        Returns:
            nothing where Dagster cannot be asked.
        """
        answer = await self._say(FindCode(run_ids))
        return {} if answer is None else answer.payloads

    async def _say(self, order: RunOrder) -> RunAnswer | None:
        """The child's answer, or None where there is none."""
        async with self._turn:
            try:
                answer = await self._slot.run(order, lambda _: None)
            except SlotError as error:
                logger.warning("Cannot speak with Dagster about runs: %s.", error)
                return None
            finally:
                await self._slot.stop()  # it is rare that there is something to say
        if isinstance(answer, RunAnswer) and not answer.error:
            return answer
        reason = answer if isinstance(answer, ChildDied) else getattr(answer, "error", answer)
        logger.warning("Cannot speak with Dagster about runs: %s.", reason)
        return None

    async def stop(self) -> None:
        """Ask and try nothing again, and end the child."""
        self._is_stopped.set()
        await end_tasks(self._looks.values())
        await self._slot.stop()
