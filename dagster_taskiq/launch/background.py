"""The launcher's background threads, whose end is the launcher's."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Background:
    """The threads of one launcher, a thread for each job that is not done yet.

    Its end is the launcher's: ``RunClient`` reaches no server any more when this is closed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_asked_again: dict[str, bool] = {}
        self._closed = threading.Event()

    def close(self) -> None:
        """Do nothing any more; a call that is under way ends by itself."""
        self._closed.set()

    @property
    def is_closed(self) -> bool:
        """Whether the launcher has ended."""
        return self._closed.is_set()

    def repeat(
        self, name: str, look: Callable[[], bool], every_seconds: float, complaint: str
    ) -> None:
        """Call a function again and again, in a thread of its own, until it says that it is done.

        Asked for a job that runs already, it calls that job's own function at least once more, and
        ignores the new one.

        Args:
            name: of the job and its thread.
            look: whether the job is done. An error that it raises is logged, and it is called
                again: a server or Dagster's storage that is away may be back by then.
            every_seconds: the pause before each call.
            complaint: what cannot be done, to begin a sentence with.
        """
        with self._lock:
            is_running = name in self._is_asked_again
            self._is_asked_again[name] = True
        if not is_running:
            arguments = (name, look, every_seconds, complaint)
            threading.Thread(target=self._repeat, args=arguments, name=name, daemon=True).start()

    def _repeat(
        self, name: str, look: Callable[[], bool], every_seconds: float, complaint: str
    ) -> None:
        while not self._closed.wait(every_seconds):
            with self._lock:
                self._is_asked_again[name] = False
            try:
                is_done = look()
            except Exception as error:
                if self.is_closed:  # in the midst of it
                    return
                logger.warning("%s: %s: %s", complaint, type(error).__name__, error)
                continue
            with self._lock:
                if is_done and not self._is_asked_again[name]:
                    del self._is_asked_again[name]
                    return
