"""The waker ends a wait for a wake-up, a signal or time, and for nothing else."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from dagster_taskiq.aio.waker import Waker

#: A wait that must be ended takes far less; one that is not ended fails the test.
LONG = 30.0


@pytest.fixture
def waker() -> Iterator[Waker]:
    waker = Waker()
    yield waker
    waker.close()


def seconds(action: Callable[[], object]) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began


def test_a_wake_up_ends_the_next_wait(waker: Waker) -> None:
    """One that came before the wait is not lost."""
    waker.wake()
    assert seconds(lambda: waker.wait(LONG)) < LONG / 2


def test_a_thread_ends_the_present_wait(waker: Waker) -> None:
    """From any thread."""
    timer = threading.Timer(0.05, waker.wake)
    timer.start()
    assert seconds(lambda: waker.wait(LONG)) < LONG / 2
    timer.join()


def test_a_signal_ends_the_present_wait(waker: Waker) -> None:
    """Also where the handler only makes a note, as Dagster's does."""
    notes: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: notes.append(number))
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
    try:
        timer.start()
        assert seconds(lambda: waker.wait(LONG)) < LONG / 2
        assert notes == [signal.SIGUSR1]
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)


def test_time_ends_the_wait(waker: Waker) -> None:
    """Not before it is up."""
    assert seconds(lambda: waker.wait(0.05)) >= 0.045
    assert seconds(lambda: waker.wait(0)) < LONG / 2
    assert seconds(lambda: waker.wait(-1)) < LONG / 2


def test_many_wake_ups_end_one_wait(waker: Waker) -> None:
    """More than a pipe holds neither block nor are left for the next wait."""
    for _ in range(200_000):
        waker.wake()
    waker.wait(LONG)
    assert seconds(lambda: waker.wait(0.05)) >= 0.045


def test_a_thread_may_have_one_too() -> None:
    """It gets no signals there, and does not take them from the main thread."""
    before = _wakeup_fd()
    woken = threading.Event()

    def wait() -> None:
        waker = Waker()
        waker.wake()
        waker.wait(LONG)
        waker.close()
        woken.set()

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join()
    assert woken.is_set()
    assert _wakeup_fd() == before


def test_closing_gives_back_what_was_there() -> None:
    """The wake-up descriptor of whoever had one, and both ends of the pipe."""
    outer = Waker()
    try:
        before = _wakeup_fd()
        Waker().close()
        assert _wakeup_fd() == before
    finally:
        outer.close()


def test_a_wake_up_after_the_end_does_nothing() -> None:
    """A late thread does no harm."""
    waker = Waker()
    waker.close()
    waker.wake()


def test_a_wake_up_after_the_end_does_not_write_elsewhere() -> None:
    """The number of the closed descriptor may be somebody else's by now."""
    waker = Waker()
    waker.close()
    reader, writer = os.pipe()
    try:
        os.set_blocking(reader, False)
        waker.wake()
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)
    finally:
        os.close(reader)
        os.close(writer)


def _wakeup_fd() -> int:
    fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(fd, warn_on_full_buffer=False) if fd >= 0 else None
    return fd
