"""How much memory a worker takes, with the processes below it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil

from dagster_taskiq.worker.leftovers import processes_below


class MemoryGauge:
    """Measures now and then, in a thread: to look at a process takes the kernel a millisecond.

    Where a process hangs in the kernel, who looks at it hangs too. So nobody waits for that thread,
    not even the end of the worker.

    Args:
        measure: brings the bytes.
    """

    def __init__(self, measure: Callable[[], int] | None = None) -> None:
        self._measure = measure or tree_bytes
        self._thread: threading.Thread | None = None
        #: As found last; 0 before the first time.
        self.found_bytes = 0

    def look(self) -> None:
        """Begin to measure, unless that still goes on."""
        if self._thread is None or not self._thread.is_alive():
            thread = threading.Thread(target=self._look, name="memory-gauge", daemon=True)
            with suppress(RuntimeError):  # the system has no thread left
                thread.start()
                self._thread = thread

    def _look(self) -> None:
        with suppress(OSError):  # without descriptors
            self.found_bytes = self._measure()


def tree_bytes() -> int:
    """The memory of this process and those below it; what several of them share counts once.

    Where the system does not tell shares, it counts in each.
    """
    return sum(map(_bytes_of, [os.getpid(), *processes_below(os.getpid())]))


def _bytes_of(pid: int) -> int:
    try:
        process = psutil.Process(pid)
        info: Any
        try:
            info = process.memory_full_info()
        except psutil.AccessDenied:
            info = process.memory_info()
        return int(getattr(info, "pss", 0) or info.rss)
    except psutil.Error:  # it has ended
        return 0
