"""Whether Dagster has given up a run whose process is gone.

Steps of a run that may be resumed go on without its process. When it is not resumed after all (the
resume failed, somebody marked the run as failed or deleted it), nobody tells the worker, so it asks
Dagster: through a child process, as the worker itself has no Dagster instance.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from dagster_taskiq.errors import SlotError
from dagster_taskiq.worker.child import LOOK_AT_RUN
from dagster_taskiq.worker.slot import ChildDied, Slot

logger = logging.getLogger(__name__)


class RunWatch:
    """Asks one question at a time.

    Args:
        slot: of its own; it has a child only while there is something to ask.
    """

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self._turn = asyncio.Lock()

    async def is_over(self, payload: Mapping[str, Any]) -> bool:
        """Whether the run of a step is finished or deleted; False where that cannot be known.

        Args:
            payload: of the step's task.
        """
        async with self._turn:
            try:
                task = {"name": LOOK_AT_RUN, "payload": dict(payload)}
                answer = await self._slot.run(task, lambda _: None)
            except SlotError as error:
                logger.warning("Cannot ask Dagster after a run whose process is gone: %s.", error)
                return False
            finally:
                await self._slot.stop()  # it is rare that there is something to ask
        if isinstance(answer, ChildDied) or answer["error"]:
            reason = answer if isinstance(answer, ChildDied) else answer["error"]
            logger.warning("Cannot ask Dagster after a run whose process is gone: %s.", reason)
            return False
        return bool(answer["is_over"])

    async def stop(self) -> None:
        """End the child."""
        await self._slot.stop()
