"""Where user code has exchanged parts of the standard library, as gevent's patches do.

Some libraries do so when they are imported, which may be before this package is. The queue of C is
out of their reach, and is used wherever threads of this package wait for each other. Without real
threads there is no way on.
"""

from __future__ import annotations

import threading
from _queue import Empty, SimpleQueue
from _thread import get_ident
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from dagster_taskiq.errors import PatchedLibraryError

__all__ = [
    "Empty",
    "SimpleQueue",
    "get_ident",
    "has_real_threads",
    "make_executor",
    "next_of",
    "require_real_threads",
]

_T = TypeVar("_T")


def next_of(queue: SimpleQueue[_T], seconds: float | None) -> _T:
    """The next item of a queue that no other thread takes from.

    Until Python 3.12 ``SimpleQueue.get`` waits for ever where its time is over before it begins to
    wait. It finds its lock free and takes it, then waits for it again for the rest of the time, and
    a negative rest means no limit. A look before leaves the lock taken, unless there is an item.

    Args:
        seconds: how long one is waited for; None is for ever.

    Raises:
        Empty: there is none.
    """
    with suppress(Empty):
        return queue.get_nowait()
    return queue.get(timeout=seconds)


def has_real_threads() -> bool:
    """Whether a lock, and thus a thread, is what Python makes it."""
    return type(threading.Lock()).__module__ == "_thread"


def require_real_threads() -> None:
    """Do nothing where threads are real.

    Raises:
        PatchedLibraryError: they are not; it says by whom they were exchanged.
    """
    if not has_real_threads():
        culprit = type(threading.Lock()).__module__.partition(".")[0]
        raise PatchedLibraryError(
            f"A module of this job's code has replaced Python's threads by those of {culprit!r}, "
            "with which the process of a run cannot talk to its workers: it would hang. Do not "
            "patch the standard library where the definitions are loaded, or leave threads out "
            "(gevent.monkey.patch_all(thread=False))."
        )


def make_executor(threads: int) -> ThreadPoolExecutor:
    """A pool of threads whose work comes through a real queue.

    Args:
        threads: how many at most.
    """
    executor: Any = ThreadPoolExecutor(threads)
    executor._work_queue = SimpleQueue()  # noqa: SLF001 - it has no argument for this
    found: ThreadPoolExecutor = executor
    return found
