"""A library that exchanges parts of the standard library at its import does not hang a run.

Each case is a process of its own, in which the exchange comes first.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from dagster_taskiq.aio.patched_library import Empty, SimpleQueue, next_of

SECONDS = 60.0

#: A queue as gevent's: what one thread puts into it wakes no other.
DEAF_QUEUE = """
import queue, time

class DeafQueue:
    def put(self, item): pass
    def get(self, *arguments, **options): time.sleep(1000)

queue.SimpleQueue = DeafQueue
"""

#: Locks, and thus threads, that are none; after Dagster, which needs some of its own to load.
GREEN_THREADS = """
import threading, dagster
from _thread import allocate_lock

class Lock:
    def __init__(self): self._lock = allocate_lock()
    def __getattr__(self, name): return getattr(self._lock, name)
    def __enter__(self): return self._lock.__enter__()
    def __exit__(self, *error): return self._lock.__exit__(*error)

Lock.__module__ = "greenery.locks"
threading.Lock = Lock
"""

IN_LOOP_THREAD = """
import asyncio
from dagster_taskiq.aio.loop_thread import LoopThread

thread = LoopThread("test")
print(thread.call(asyncio.to_thread(int, "4711")))
thread.stop()
"""

QUEUES = """
import threading
from dagster_taskiq.loop import client
from dagster_taskiq.execution import event_batches

written = event_batches._Written()
threading.Timer(0.01, written.say).start()
written.wait()
arrived = client.SimpleQueue()
arrived.put(4711)
print(arrived.get(timeout=1))
"""


def run(*parts: str) -> subprocess.CompletedProcess[str]:
    """A process of the parts, which has ended."""
    return subprocess.run(
        [sys.executable, "-c", "".join(parts)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


@pytest.mark.parametrize("use", [IN_LOOP_THREAD, QUEUES])
def test_another_queue_does_not_matter(use: str) -> None:
    """Threads of this package wait for each other at queues that cannot be exchanged."""
    process = run(DEAF_QUEUE, use)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == "4711"


def test_other_threads_are_an_error_with_the_reason() -> None:
    """It says who has exchanged them, and what to do, where the run would hang."""
    process = run(GREEN_THREADS, IN_LOOP_THREAD)
    assert process.returncode == 1
    assert "PatchedLibraryError" in process.stderr
    assert "'greenery'" in process.stderr


def test_a_wait_for_a_moment_ends() -> None:
    """Also where the moment is over before the wait begins, with which Python's own goes on."""
    for number in range(20_000):
        queue: SimpleQueue[int] = SimpleQueue()
        with pytest.raises(Empty):
            next_of(queue, 1e-6)
        queue.put(number)
        assert next_of(queue, 1e-6) == number
        with pytest.raises(Empty):
            next_of(queue, 1e-7)
        queue.put(number)
        assert next_of(queue, None) == number
