"""A forked process that a test runs beside itself."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: How long it may take on a busy machine.
PATIENCE_SECONDS = 60


@contextmanager
def forked(do: Callable[[], None]) -> Iterator[None]:
    """Call a function in a forked process, beside the block, after which that must have ended well.

    Raises:
        AssertionError: the function has raised something, or has taken too long.
    """
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(PATIENCE_SECONDS)
            do()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    try:
        yield
    finally:
        _, status = os.waitpid(pid, 0)
    assert status == 0, f"the forked process has ended with the wait status {status}"
