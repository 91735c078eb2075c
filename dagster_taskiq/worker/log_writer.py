"""The worker's own log, written by a thread of its own.

Where nobody reads the worker's output, a write to it blocks, and in the event loop it would hold up
the renewal of leases. So the loop only puts lines into a bounded queue, from which the thread
writes them. What does not fit is counted, and the log says so when it can be written again.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: How many lines may wait.
_LINES = 10_000

#: How long the last lines may take when the worker ends.
_STOP_SECONDS = 5.0

_STANDARD_ERROR = 2


class LogWriter(logging.Handler):
    """A handler that never waits for the reader of its log.

    Args:
        target: descriptor that it writes to.
        lines: how many may wait to be written.
    """

    def __init__(self, target: int, lines: int = _LINES) -> None:
        super().__init__()
        self._target = target
        self._lines: queue.Queue[str | None] = queue.Queue(lines)
        self._counting = threading.Lock()
        self._dropped = 0
        # a daemon, since a write may never end
        self._thread = threading.Thread(target=self._write_all, name="log-writer", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Put a line into the queue, or count it."""
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._count()

    def stop(self, timeout_seconds: float) -> bool:
        """Write what waits; whether all is written, after that time at most."""
        end = time.monotonic() + timeout_seconds
        try:
            self._lines.put(None, timeout=timeout_seconds)
        except queue.Full:
            return False
        self._thread.join(max(0.0, end - time.monotonic()))
        return not self._thread.is_alive()

    def _write_all(self) -> None:
        while (line := self._lines.get()) is not None:
            self._write(line)
            with self._counting:
                dropped, self._dropped = self._dropped, 0
            if dropped:
                self._write(f"{dropped} lines of this log are missing: nobody read it in time.")

    def _count(self) -> None:
        with self._counting:
            self._dropped += 1

    def _write(self, line: str) -> None:
        data = line.encode(errors="backslashreplace") + b"\n"
        try:
            # not through `sys.stderr`, whose lock Python needs when the process ends
            while data:
                data = data[os.write(self._target, data) :]
        except OSError:
            # the reader is gone or the disk is full, and there is nowhere to say it
            self._count()


@contextmanager
def log_to_standard_error(level: str, line_format: str) -> Iterator[None]:
    """Log through a ``LogWriter``; a reader that pauses does not keep the process from ending.

    Args:
        level: of the root logger, a name.
        line_format: of its lines.
    """
    writer = LogWriter(_STANDARD_ERROR)
    logging.basicConfig(level=level, format=line_format, handlers=[writer])
    try:
        yield
    finally:
        logging.getLogger().removeHandler(writer)
        if not writer.stop(_STOP_SECONDS):
            _let_go_of_output()


def _let_go_of_output() -> None:
    """Keep what this process still prints from waiting for its reader."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        os.dup2(nowhere, output)
    os.close(nowhere)
