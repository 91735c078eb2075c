"""One wait for messages, signals and time, in a thread that is not an event loop."""

from __future__ import annotations

import os
import select
import signal
import threading


class Waker:
    """Lets a thread sleep until another one calls ``wake``, a signal arrives or time is up.

    Python restarts an interrupted wait after the signal's handler has run, so a handler that only
    makes a note, as Dagster's does, would not be seen until the timeout. A wake-up descriptor
    ends the wait; only the main thread can have one, and only it gets signals.
    """

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._previous_fd: int | None = None
        if threading.current_thread() is threading.main_thread():
            self._previous_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)

    def wake(self) -> None:
        """End the present wait, or the next one; from any thread."""
        try:
            os.write(self._writer, b"\0")
        except BlockingIOError:
            pass  # the pipe is full of wake-ups, one more would say nothing new
        except OSError:
            pass  # closed: nobody waits any more

    def wait(self, timeout_seconds: float) -> None:
        """Sleep until woken, or until the time is over."""
        ready, _, _ = select.select([self._reader], [], [], max(0.0, timeout_seconds))
        if ready:
            self._drain()

    def _drain(self) -> None:
        while True:
            try:
                if len(os.read(self._reader, 4096)) < 4096:
                    return
            except BlockingIOError:
                return

    def close(self) -> None:
        """Give the descriptors and the signal's wake-up back."""
        if self._previous_fd is not None:
            signal.set_wakeup_fd(self._previous_fd)
            self._previous_fd = None
        reader, writer = self._reader, self._writer
        # a late `wake` must not write to whatever gets the number next
        self._reader = self._writer = -1
        os.close(reader)
        os.close(writer)
