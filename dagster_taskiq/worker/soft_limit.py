"""The soft time limit, as a step's process sees it: an exception in the step's code.

The worker looks at the clock and sends a signal. It must not strike while Dagster does its own
bookkeeping between two pieces of user code, so the exception waits for the next one.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dagster_taskiq._dagster.patches import runs_user_code
from dagster_taskiq.errors import SoftTimeLimitError

#: What the worker sends; between tasks it is ignored.
SOFT_LIMIT_SIGNAL = signal.SIGUSR1

#: How long to wait for Dagster to be done with what it does.
_LOOK_AGAIN_SECONDS = 0.05


@contextmanager
def soft_time_limit(seconds: float | None) -> Iterator[None]:
    """Let the worker's signal raise ``SoftTimeLimitError`` in the step that runs meanwhile.

    Args:
        seconds: the limit, for the error's text; None for a step that has none.
    """
    is_over = threading.Event()

    def strike(_number: int, _frame: FrameType | None) -> None:
        if is_over.is_set():
            return
        if runs_user_code():
            is_over.set()
            raise SoftTimeLimitError(seconds or 0)
        timer = threading.Timer(_LOOK_AGAIN_SECONDS, _strike_again)
        timer.daemon = True
        timer.start()

    def _strike_again() -> None:
        if not is_over.is_set():
            os.kill(os.getpid(), SOFT_LIMIT_SIGNAL)

    signal.signal(SOFT_LIMIT_SIGNAL, strike)
    try:
        yield
    finally:
        is_over.set()
        signal.signal(SOFT_LIMIT_SIGNAL, signal.SIG_IGN)
