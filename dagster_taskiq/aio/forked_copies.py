"""Copies of this process, which user code makes by ``os.fork``, end where that code returns.

A copy that went on would do the rest of its parent's work a second time: write the end of the step
to Dagster's log, answer the worker, take the next task.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn


@contextmanager
def ending_copies() -> Iterator[None]:
    """Run user code; a copy of the process that it has forked does not come out of this.

    The copy's exit code is that of its ``SystemExit``, 1 after another exception, else 0.
    """
    pid = os.getpid()
    try:
        yield
    except BaseException as error:
        if os.getpid() != pid:
            _end(error)
        raise
    if os.getpid() != pid:
        _end(None)


def _end(error: BaseException | None) -> NoReturn:
    """End this copy without the clean-up that is its parent's: connections, exit handlers."""
    exit_code = 1 if error else 0
    with suppress(Exception):  # whatever has become of its output
        if isinstance(error, SystemExit):
            exit_code = error.code if isinstance(error.code, int) else bool(error.code)
        elif error is not None:
            traceback.print_exception(type(error), error, error.__traceback__)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(exit_code)
