"""What a run holds back, told to the backend when it changes, every few seconds at most."""

from __future__ import annotations

import asyncio
import logging

from dagster_taskiq.backend.withheld import WithheldBackend
from dagster_taskiq.defaults import WITHHELD_SECONDS
from dagster_taskiq.errors import ServerError
from dagster_taskiq.messages.withheld_steps import Withheld

logger = logging.getLogger(__name__)


class WithheldLog:
    """Tells what one run's loop holds back, as it can; a run that holds nothing back calls nothing.

    Args:
        backend: that keeps it; used in its own event loop, by ``run`` and ``send``.
        run_id: the run.
        token: of the loop, as it opens the run.
        seconds: between two calls.
    """

    def __init__(
        self,
        backend: WithheldBackend,
        run_id: str,
        token: str,
        seconds: float = WITHHELD_SECONDS,
    ) -> None:
        self._backend = backend
        self._run_id = run_id
        self._token = token
        self._seconds = seconds
        self._noted = Withheld()
        #: What the backend has; None where that is not known.
        self._kept: Withheld | None = Withheld()
        self._has_told = False

    def note(self, withheld: Withheld) -> None:
        """What is held back now; from any thread."""
        self._noted = withheld

    def note_new_epoch(self) -> None:
        """The backend may have forgotten what it was told, or have something older."""
        if self._has_told:
            self._kept = None

    async def run(self) -> None:
        """Tell every few seconds what has changed, until cancelled."""
        while True:
            await asyncio.sleep(self._seconds)
            await self.send()

    async def send(self) -> None:
        """Tell what has changed; what the backend does not take is told the next time."""
        noted = self._noted
        if noted == self._kept:
            return
        self._kept, self._has_told = None, True  # an answer may be lost
        try:
            is_kept = await self._backend.tell_withheld(self._run_id, noted, token=self._token)
        except ServerError as error:
            logger.debug("What run %s holds back is told later: %s", self._run_id, error)
            return
        except Exception:
            # a run must not end for this, nor try it for ever
            logger.warning("What run %s holds back is not told.", self._run_id, exc_info=True)
            is_kept = True
        if is_kept:
            self._kept = noted
