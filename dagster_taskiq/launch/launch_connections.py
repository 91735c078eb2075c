"""Connections to Dagster's database that stay open while launches follow one another.

Dagster opens one for each statement of a launch, and a launch has a dozen.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack

from dagster import DagsterInstance

from dagster_taskiq.execution.storage_connections import kept_connections

#: How many are kept at most; Dagster's daemon may launch runs in several threads.
MAX_CONNECTIONS = 8


class LaunchConnections:
    """Those of the instance of one launcher. Used from any thread.

    From the first launch on, the process has as many as its threads use at once, whatever they use
    them for. An instance that keeps connections of its own, as a web server's does, or that has no
    database with a server, stays as it is.

    Args:
        idle_seconds: how long one is kept that nobody uses; 0 keeps none.
    """

    def __init__(self, idle_seconds: float) -> None:
        self._idle_seconds = idle_seconds
        self._lock = threading.Lock()
        self._kept: ExitStack | None = None

    def keep(self, instance: DagsterInstance) -> None:
        """Keep what is opened from now on, until ``close``.

        Args:
            instance: always the same one.
        """
        with self._lock:
            if self._kept is None:
                kept = ExitStack()
                kept.enter_context(kept_connections(instance, self._idle_seconds, MAX_CONNECTIONS))
                self._kept = kept

    def close(self) -> None:
        """Close them now; the instance is as it was before."""
        with self._lock:
            kept, self._kept = self._kept, None
            if kept is not None:
                kept.close()
