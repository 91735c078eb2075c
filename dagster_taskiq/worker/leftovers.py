"""What a step leaves behind in its process is not there for the next one.

What belongs to the process as a whole and can be set is put back as it was before the step's code
began. What goes on by itself cannot be: threads and processes. Then the process must be replaced.

Not a leftover is what libraries keep for as long as a process lives: daemon threads, idle threads
of a ``ThreadPoolExecutor``, and the helper processes of ``multiprocessing``. Nor is what came
with the code: it is looked at after the code has been loaded. A transaction in a connection of the
step's own cannot be seen.
"""

from __future__ import annotations

import locale
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import thread as thread_pool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any, cast

import psutil

#: Signals that a step may handle itself. To look at all of them would take a tenth of a
#: millisecond; those that end a step, and its soft time limit, are Dagster's and ours to exchange.
_SIGNALS = (
    signal.SIGALRM,
    signal.SIGCHLD,
    signal.SIGHUP,
    signal.SIGPIPE,
    signal.SIGPROF,
    signal.SIGQUIT,
    signal.SIGUSR2,
    signal.SIGVTALRM,
)

_TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)


#: Whether the kernel says which processes a thread has started. What psutil does instead, to read
#: about every process of the machine, takes milliseconds.
_KERNEL_LISTS_CHILDREN = Path("/proc/thread-self/children").exists()


@dataclass(frozen=True)
class _Setting:
    """Something that belongs to the process as a whole.

    Attributes:
        name: in words.
        read: its present value.
        write: sets it to such a value.
    """

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]


class Leftovers:
    """Looks at this process before a step's code runs, and puts things back after it."""

    def __init__(self) -> None:
        self._settings: list[Any] | None = None
        self._threads: frozenset[threading.Thread] = frozenset()
        self._processes: frozenset[int] = frozenset()

    def look(self) -> None:
        """Note how things are now, in the main thread."""
        self._threads = frozenset(threading.enumerate())
        self._processes = _processes()
        self._settings = [it.read() for it in _SETTINGS]

    def put_back(self) -> list[str]:
        """Have things as they were at the last ``look``, if there was one.

        Returns:
            what cannot be put back, in words.
        """
        before, self._settings = self._settings, None
        if before is None:
            return []
        found = []
        for setting, value in zip(_SETTINGS, before, strict=True):
            try:
                if setting.read() != value:
                    setting.write(value)
            except Exception as error:  # a directory that is gone, for example
                found.append(f"the {setting.name} ({error})")
        threads = [it.name for it in threading.enumerate() if self._is_new_work(it)]
        processes = [str(it) for it in sorted(_processes() - self._processes)]
        for kind, names in (("threads", threads), ("processes", processes)):
            if names:
                found.append(f"{kind} that still run ({', '.join(names)})")
        return found

    def _is_new_work(self, thread: threading.Thread) -> bool:
        return thread not in self._threads and not thread.daemon and not _is_idle(thread)


def _is_idle(thread: threading.Thread) -> bool:
    """Whether it belongs to a ``ThreadPoolExecutor`` and waits for work, as it does for ever."""
    frame = sys._current_frames().get(thread.ident or 0)  # noqa: SLF001
    worker: Any = getattr(thread_pool, "_worker", None)
    return frame is not None and worker is not None and frame.f_code is worker.__code__


def _processes() -> frozenset[int]:
    """Those below this one that run, but for the helpers of ``multiprocessing``.

    The usual case, that there are none, is known by one call of the kernel.
    """
    if hasattr(os, "waitid"):
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return frozenset()
    helpers = {
        getattr(vars(forkserver).get("_forkserver"), "_forkserver_pid", None),
        getattr(vars(resource_tracker).get("_resource_tracker"), "_pid", None),
    }
    return frozenset(it for it in processes_below(os.getpid()) if it not in helpers and _runs(it))


def processes_below(pid: int) -> list[int]:
    """The processes below one, some of which may have ended by now."""
    if not _KERNEL_LISTS_CHILDREN:
        return [it.pid for it in psutil.Process(pid).children(recursive=True)]
    children: list[int] = []
    with suppress(OSError):  # the process has ended
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):  # the thread has ended
                children += map(int, (thread / "children").read_bytes().split())
    return children + [it for child in children for it in processes_below(child)]


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


# --- settings -----------------------------------------------------------------------------------


def _directory() -> str | None:
    try:
        return os.getcwd()  # noqa: PTH109 - it takes a tenth of the time
    except FileNotFoundError:
        return None


def _umask() -> int:
    mask = os.umask(0o077)  # a thread that makes a file meanwhile lets nobody in
    os.umask(mask)
    return mask


def _environment() -> dict[bytes, bytes]:
    # the dictionary below it: to copy that takes a microsecond, to copy it from above a hundred
    return dict(vars(os.environ)["_data"])


def _set_environment(before: Mapping[bytes, bytes]) -> None:
    for name in set(os.environb) - set(before):
        del os.environb[name]
    os.environb.update(before)
    time.tzset()


def _zone() -> tuple[object, ...]:
    return (time.tzname, time.timezone, time.altzone)


def _disarm(before: list[bool]) -> None:
    for timer, was_armed in zip(_TIMERS, before, strict=True):
        if not was_armed:
            signal.setitimer(timer, 0)


def _set_handlers(before: list[Any]) -> None:
    for number, handler in zip(_SIGNALS, before, strict=True):
        if handler is not None and signal.getsignal(number) != handler:
            signal.signal(number, handler)


#: A timer is taken back before the handler of its signal, whose default is to end the process.
_SETTINGS = (
    _Setting("timers", lambda: [signal.getitimer(it)[0] > 0 for it in _TIMERS], _disarm),
    _Setting("signal handlers", lambda: [signal.getsignal(it) for it in _SIGNALS], _set_handlers),
    _Setting(
        "blocked signals",
        lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        lambda mask: signal.pthread_sigmask(signal.SIG_SETMASK, mask),
    ),
    _Setting("working directory", _directory, os.chdir),
    _Setting("umask", _umask, os.umask),
    _Setting("environment", _environment, _set_environment),
    _Setting("time zone", _zone, lambda _: time.tzset()),
    _Setting(
        "locale",
        lambda: locale.setlocale(locale.LC_ALL),
        lambda it: locale.setlocale(locale.LC_ALL, it),
    ),
    _Setting("default socket timeout", socket.getdefaulttimeout, socket.setdefaulttimeout),
    _Setting(
        "start method of multiprocessing",
        lambda: multiprocessing.get_start_method(allow_none=True),
        lambda name: multiprocessing.set_start_method(cast("Any", name), force=True),
    ),
)
