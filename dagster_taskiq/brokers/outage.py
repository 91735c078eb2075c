"""The outage of a server that is listened to: said once, and how long to wait for its end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from dagster_taskiq.errors import ServerError

logger = logging.getLogger(__name__)

#: Pauses between two tries of a listener to reach a lost server: the first, and the longest.
FIRST_RETRY_SECONDS = 0.1
LONGEST_RETRY_SECONDS = 2.0


class Outage:
    """Tells the log once that a server is lost and once that it is back.

    Args:
        address: of the server.
        tell: see ``Admission.outage``.
    """

    def __init__(
        self, address: str, tell: Callable[[ServerError | None], None] | None = None
    ) -> None:
        self._address = address
        self._tell = tell or (lambda _: None)
        self._since: float | None = None
        self._pause_seconds = FIRST_RETRY_SECONDS

    def pause_seconds(self, error: ServerError) -> float:
        """Note a failed try; how long to wait before the next one."""
        if self._since is None:
            self._since = time.monotonic()
            self._pause_seconds = FIRST_RETRY_SECONDS
            logger.warning("%s Listening goes on when it is back.", error)
            self._tell(error)
        else:
            self._pause_seconds = min(2 * self._pause_seconds, LONGEST_RETRY_SECONDS)
        return self._pause_seconds

    def over(self) -> None:
        """Note that the server answers."""
        if self._since is None:
            return
        seconds = time.monotonic() - self._since
        logger.warning("Listening to %s again after %.1f s.", self._address, seconds)
        self._since = None
        self._tell(None)
