"""What steps print, in the worker's own output too.

Dagster redirects the output of a step into files, which the UI shows, and copies those to where the
output would have gone by two ``tail`` processes and two more that watch them, for each step: four
starts of a process, which take longer than everything else about a short step. Here the worker
copies instead, in one thread for all of its slots. That is no part of the child, so nothing is lost
when the child is killed or does not give Python's lock away.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

#: How often to look for more while a step runs.
LOOK_SECONDS = 0.2

_CHUNK_BYTES = 1 << 16

#: How many files may be open at once. Where nobody reads the worker's output they stay open.
_MOST_FILES = 200

#: How long the last words may take that nobody reads.
_STOP_SECONDS = 5.0


@dataclass(eq=False)
class _Tail:
    """One file that a child process writes to, and where it goes."""

    owner: int
    path: str
    source: int
    target: int
    is_ended: bool = False
    rest: bytes = field(default=b"", repr=False)

    def copy(self, *, is_last: bool) -> None:
        """Copy what is new in whole lines, and at last all of it."""
        while chunk := os.read(self.source, _CHUNK_BYTES):
            lines, newline, self.rest = (self.rest + chunk).rpartition(b"\n")
            if len(self.rest) > _CHUNK_BYTES:
                lines, newline, self.rest = lines + newline + self.rest, b"", b""
            _write(self.target, lines + newline)
        if is_last:
            _write(self.target, self.rest)


class LogTails:
    """Copies files to the output of this process while they grow."""

    def __init__(self) -> None:
        self._tails: list[_Tail] = []
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._is_stopping = False
        self._is_full = False
        self._thread: threading.Thread | None = None

    def begin(self, owner: int, path: str, target: int) -> None:
        """A process has begun to write to a file.

        Args:
            owner: the process.
            path: of the file.
            target: the descriptor that it would have written to: 1 or 2.
        """
        if self._note_full(len(self._tails) >= _MOST_FILES):
            return
        try:
            source = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            logger.warning("The output of a step is only in its log in the UI: %s", error)
            return
        with self._lock:
            self._tails.append(_Tail(owner, path, source, target))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="log-tails", daemon=True)
            self._thread.start()
        self._changed.set()

    def end(self, owner: int, path: str | None = None) -> None:
        """It writes no more to that file, or to any."""
        with self._lock:
            for tail in self._tails:
                if tail.owner == owner and path in (None, tail.path):
                    tail.is_ended = True
        self._changed.set()

    def stop(self) -> None:
        """Copy what is left."""
        self._is_stopping = True
        self._changed.set()
        if self._thread is not None:
            self._thread.join(_STOP_SECONDS)

    def _note_full(self, is_full: bool) -> bool:
        if is_full and not self._is_full:
            logger.warning(
                "The output of steps is only in their logs in the UI from now on, until somebody "
                "reads the worker's own output."
            )
        self._is_full = is_full
        return is_full

    def _run(self) -> None:
        # a thread, since whoever reads our output may let us wait
        while not self._is_stopping:
            self._changed.wait(LOOK_SECONDS if self._tails else None)
            self._changed.clear()
            with self._lock:
                # before the copy, which then sees all that was written until the end
                looks = [(tail, tail.is_ended or self._is_stopping) for tail in self._tails]
            ended = [tail for tail, is_last in looks if not _copy(tail, is_last=is_last)]
            with self._lock:
                self._tails = [tail for tail in self._tails if tail not in ended]


def _copy(tail: _Tail, *, is_last: bool) -> bool:
    """Copy what is new; whether there may be more."""
    try:
        tail.copy(is_last=is_last)
    except OSError as error:
        logger.warning("Cannot copy the output of a step: %s", error)
        is_last = True
    if is_last:
        os.close(tail.source)
    return not is_last


def _write(target: int, data: bytes) -> None:
    while data:
        data = data[os.write(target, data) :]
