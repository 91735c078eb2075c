"""What is put back after a step, and what keeps its process from taking another one."""

from __future__ import annotations

import locale
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dagster_taskiq.worker import leftovers
from dagster_taskiq.worker.leftovers import Leftovers

SECONDS = 60.0


def _zone() -> str:
    os.environ["TZ"] = "Asia/Tokyo"
    time.tzset()
    return time.tzname[0]


#: By name: how to read it, and how a step may change it.
CHANGES: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
    "directory": (Path.cwd, lambda: os.chdir("/")),
    "umask": (lambda: os.umask(os.umask(0o022)), lambda: os.umask(0o077)),
    "new variable": (lambda: os.getenv("LEFT"), lambda: os.environ.update(LEFT="x")),
    "other variable": (lambda: os.getenv("HOME"), lambda: os.environ.update(HOME="/nowhere")),
    "no variable": (lambda: os.getenv("PATH"), lambda: os.environ.pop("PATH")),
    "time zone": (lambda: (os.getenv("TZ"), time.tzname), _zone),
    "time zone without its variable": (lambda: time.tzname, lambda: (_zone(), os.unsetenv("TZ"))),
    "socket timeout": (socket.getdefaulttimeout, lambda: socket.setdefaulttimeout(0.5)),
    "timer": (
        lambda: signal.getitimer(signal.ITIMER_PROF),
        lambda: signal.setitimer(signal.ITIMER_PROF, 1000),
    ),
    "handler": (
        lambda: signal.getsignal(signal.SIGUSR2),
        lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
    ),
    "blocked signal": (
        lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2}),
    ),
    "locale": (
        lambda: locale.setlocale(locale.LC_ALL),
        lambda: locale.setlocale(
            locale.LC_ALL, "C" if locale.setlocale(locale.LC_ALL) != "C" else "C.UTF-8"
        ),
    ),
    "start method": (
        lambda: multiprocessing.get_start_method(allow_none=True),
        lambda: multiprocessing.set_start_method("spawn", force=True),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_it_is_put_back(name: str) -> None:
    """Without a word, since nothing is left of it."""
    read, change = CHANGES[name]
    before = read()
    found = Leftovers()
    found.look()
    change()
    assert found.put_back() == []
    assert read() == before


def test_a_timer_goes_before_its_handler() -> None:
    """An alarm that came in between would end the process."""
    found = Leftovers()
    found.look()
    signal.signal(signal.SIGPROF, lambda *_: None)
    signal.setitimer(signal.ITIMER_PROF, 0.000_1, 0.000_1)  # that of real time is pytest's
    assert found.put_back() == []
    assert signal.getsignal(signal.SIGPROF) is signal.SIG_DFL


def test_what_cannot_be_put_back_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that the step has removed, for example; the rest is put back all the same."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    found = Leftovers()
    found.look()
    os.chdir(tmp_path)
    gone.rmdir()
    socket.setdefaulttimeout(0.5)
    (found,) = found.put_back()
    assert "the working directory" in found
    assert str(gone) in found
    assert socket.getdefaulttimeout() is None


def test_nothing_is_put_back_that_was_not_looked_at() -> None:
    """Where a step has not come as far as its own code."""
    assert Leftovers().put_back() == []


@pytest.fixture
def until_the_end() -> Iterator[threading.Event]:
    """Is set after the test, for its threads to end."""
    event = threading.Event()
    yield event
    event.set()


def test_a_thread_that_goes_on_is_named(until_the_end: threading.Event) -> None:
    """Not one that was there before, nor a daemon, nor one that has ended."""
    until_the_end_of: Callable[[str, bool], threading.Thread] = lambda name, is_daemon: (  # noqa: E731
        threading.Thread(target=until_the_end.wait, name=name, daemon=is_daemon)
    )
    until_the_end_of("before", False).start()
    found = Leftovers()
    found.look()
    until_the_end_of("of a library", True).start()
    ended = threading.Thread(target=int)
    ended.start()
    ended.join()
    assert found.put_back() == []
    found.look()
    until_the_end_of("of the step", False).start()
    assert found.put_back() == ["threads that still run (of the step)"]


def test_a_pool_of_threads_may_stay_but_not_its_work(until_the_end: threading.Event) -> None:
    """Libraries keep such pools for ever; an idle thread of one does nothing."""
    found = Leftovers()
    found.look()
    with ThreadPoolExecutor(1, thread_name_prefix="pool") as pool:
        pool.submit(int).result()
        deadline = time.monotonic() + SECONDS
        while found.put_back():  # it has given its result, and not come to wait again
            assert time.monotonic() < deadline
        found.look()
        pool.submit(int).result()
        found.look()
        has_begun = threading.Event()
        with ThreadPoolExecutor(1, thread_name_prefix="other") as other:
            other.submit(lambda: (has_begun.set(), until_the_end.wait()))
            assert has_begun.wait(SECONDS)
            assert found.put_back() == ["threads that still run (other_0)"]
            until_the_end.set()


@pytest.mark.parametrize("kernel_lists_children", [leftovers._KERNEL_LISTS_CHILDREN, False])
def test_processes_of_processes_are_named(
    kernel_lists_children: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the kernel does not say which they are."""
    monkeypatch.setattr(leftovers, "_KERNEL_LISTS_CHILDREN", kernel_lists_children)
    found = Leftovers()
    found.look()
    shell = ["sh", "-c", "sleep 1000 & echo $!; wait"]
    with subprocess.Popen(shell, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        grandchild = int(process.stdout.readline())
        names = ", ".join(map(str, sorted((process.pid, grandchild))))
        assert found.put_back() == [f"processes that still run ({names})"]
        os.kill(grandchild, signal.SIGKILL)


def test_a_process_that_goes_on_is_named() -> None:
    """Not one that was there before, nor one that has ended, whether it was waited for or not."""
    sleep = [sys.executable, "-c", "import time; time.sleep(1000)"]
    with subprocess.Popen(sleep) as before:
        found = Leftovers()
        found.look()
        with subprocess.Popen(sleep) as process:
            assert found.put_back() == [f"processes that still run ({process.pid})"]
            found.look()
            process.kill()
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            assert found.put_back() == []
        before.kill()
