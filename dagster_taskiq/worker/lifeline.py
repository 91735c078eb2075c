"""A child does not outlive its worker, whatever it does at the moment."""

from __future__ import annotations

import fcntl
import os
import signal


def die_with(pipe: int) -> None:
    """Have the kernel kill this process's group when the other end of a pipe is closed.

    No thread watches, as none would run while a step holds Python's lock. On a system other than
    Linux, which cannot do this, the guard alone ends the children of a dead worker.

    Args:
        pipe: descriptor of its reading end; this process leads its group.
    """
    if not hasattr(fcntl, "F_SETSIG"):
        return
    fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
