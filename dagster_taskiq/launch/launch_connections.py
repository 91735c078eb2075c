"""Connections to Dagster's database that stay open while launches follow one another.

Dagster opens one for each statement of a launch, and a launch has a dozen.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from contextlib import ExitStack

from dagster import DagsterInstance

from dagster_taskiq._dagster.known_schema import remember_schema
from dagster_taskiq.execution.storage_connections import can_keep_connections, kept_connections
from dagster_taskiq.launch.background import Background

#: How long after the last launch they are closed.
IDLE_SECONDS = 2.0

#: How often to look whether they are to be closed.
LOOK_SECONDS = 0.5

#: How many are kept at most; Dagster's daemon may launch runs in several threads.
MAX_CONNECTIONS = 8

_all: weakref.WeakSet[LaunchConnections] = weakref.WeakSet()


class LaunchConnections:
    """Those of the instance of one launcher. Used from any thread.

    The process has as many as its threads use at once, whatever they use them for. An instance
    that keeps connections of its own, as a web server's does, or that has no database with a
    server, stays as it is.

    Args:
        background: where they are closed; its end is theirs.
    """

    def __init__(self, background: Background) -> None:
        self._background = background
        self._lock = threading.Lock()
        self._kept: ExitStack | None = None
        self._used_at = 0.0
        _all.add(self)

    def keep(self, instance: DagsterInstance) -> None:
        """Keep open what is opened from now on, until no launch has called this for a while."""
        remember_schema(instance)
        with self._lock:
            self._used_at = time.monotonic()
            if self._kept is not None or not can_keep_connections(instance):
                return
            if self._background.is_closed:
                return
            self._kept = ExitStack()
            self._kept.enter_context(kept_connections(instance, count=MAX_CONNECTIONS))
        self._background.repeat(
            "launch-connections",
            self._close_idle,
            LOOK_SECONDS,
            "Cannot close connections to Dagster's database",
        )

    def close(self) -> None:
        """Close them now; the instance is as it was before."""
        with self._lock:
            self._close()

    def _close_idle(self) -> bool:
        with self._lock:
            if time.monotonic() - self._used_at >= IDLE_SECONDS:
                self._close()
            return self._kept is None

    def _close(self) -> None:
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.close()

    def forget(self) -> None:
        """In a forked process: leave the connections to the parent, and keep none here."""
        self._lock = threading.Lock()
        self._close()


def _forget_after_fork() -> None:
    # `storage_connections`, which is asked first, has put empty pools in place of the parent's
    for connections in list(_all):
        connections.forget()


os.register_at_fork(after_in_child=_forget_after_fork)
