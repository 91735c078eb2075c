"""Whether children may be forked from a process that has loaded user code.

A fork has all memory and one thread. What other threads were doing is never finished: a lock that
one of them held stays locked, and a pool of threads waits for workers that are not there. So a
process is judged by what is left in it after a fork on trial, before which libraries such as
OpenBLAS stop their threads. The names of the libraries do not matter.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import stat
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

#: Native threads that hold nothing a child needs: they free memory, or remove the files of queries
#: that have ended. jemalloc starts its own anew in a child.
_HARMLESS_THREADS = frozenset({"jemalloc_bg_thd", "polars-ooc-clea"})

#: How long a thread that is ending may take, and the child that is forked on trial.
_ENDING_SECONDS = 1.0
_TRIAL_SECONDS = 10.0

#: How long to wait before threads are looked at again.
_LOOK_SECONDS = 0.01

#: Devices that every process may have.
_HARMLESS_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_TERMINALS = ("/dev/tty", "/dev/pts/", "/dev/console", "/dev/ptmx")

#: Memory that processes share on purpose.
_SHARED_MEMORY = ("/dev/shm/", "/memfd:")  # noqa: S108 - nothing is made there

_THREADS, _DESCRIPTORS = Path("/proc/self/task"), Path("/proc/self/fd")
_DESCRIPTOR_FACTS = Path("/proc/self/fdinfo")

#: What the child that is forked on trial says if nothing has happened to it.
_ALIVE = b"+"


class ForkTrial:
    """Whether children may be forked from this process.

    Make it before user code is loaded: what is open by then is known, and no hazard.
    """

    def __init__(self) -> None:
        self._known = _descriptors() if _DESCRIPTORS.exists() else {}

    def hazard(self) -> str:
        """Why forked children might hang or crash: for a log line, empty where nothing is found.

        It forks a child on trial, and takes up to two seconds where threads do not end, and up to
        ten where that child hangs. Call it in the main thread. A library whose own handler hangs
        in ``fork`` itself holds this call up, so another process must watch this one.
        """
        if not _THREADS.exists():
            return "this system does not show which native threads a process has"
        try:
            return self._look()
        except OSError as error:
            return f"the system does not let a child be forked on trial: {error}"

    def _look(self) -> str:
        # first, as they may hold locks for which handlers of the fork wait in this process
        threads = _once_empty(_python_threads)
        if threads:
            return _count(threads, "thread of Python", "threads of Python") + _run(threads)
        failure = _try_fork()
        if failure:
            return failure
        threads = _once_empty(_native_threads)
        if threads:
            return _count(threads, "native thread", "native threads") + _run(threads)
        return self._open_descriptor()

    def _open_descriptor(self) -> str:
        """What is open that children must not share; empty where nothing is."""
        for number, target in _descriptors().items():
            if self._known.get(number) != target:
                with suppress(OSError):  # closed meanwhile
                    found = _shared(number, target)
                    if found:
                        return f"{found} is open"
        return ""


def _once_empty(look: Callable[[], list[str]]) -> list[str]:
    """What is found, once that is nothing, or after a second."""
    end = time.monotonic() + _ENDING_SECONDS
    while (found := look()) and time.monotonic() < end:
        time.sleep(_LOOK_SECONDS)
    return found


def _python_threads() -> list[str]:
    """The names of Python's threads but the main one that the system has, too."""
    present = {int(it.name) for it in _THREADS.iterdir()}
    return [
        it.name
        for it in threading.enumerate()
        # Python keeps an entry of a foreign thread that has called it, also when that has ended
        if it is not threading.main_thread() and it.native_id in present
    ]


def _native_threads() -> list[str]:
    """The names of all threads but the main one and harmless ones; empty for one without a name."""
    main, found = os.getpid(), []
    own = (_THREADS / str(main) / "comm").read_text().strip()
    for thread in _THREADS.iterdir():
        if int(thread.name) != main:
            with suppress(OSError):  # it has ended
                name = (thread / "comm").read_text().strip()
                if name not in _HARMLESS_THREADS:
                    found.append("" if name == own else name)
    return found


def _count(threads: list[str], one: str, many: str) -> str:
    return f"{len(threads)} {one if len(threads) == 1 else many}"


def _run(names: Iterable[str]) -> str:
    """The end of a sentence about threads, with the names that they have."""
    counts = Counter(it for it in names if it)
    named = ", ".join(
        f"{name} ({count})" if count > 1 else name for name, count in sorted(counts.items())
    )
    return " left running" + (f": {named}" if named else "")


def _try_fork() -> str:
    """Fork a child that ends at once; what went wrong, or empty."""
    reader, writer = os.pipe()
    try:
        with warnings.catch_warnings():
            # Python warns of native threads, which are looked at here
            warnings.simplefilter("ignore")
            pid = os.fork()
        if pid == 0:
            os.write(writer, _ALIVE)
            os._exit(0)
        os.close(writer)
        writer = -1
        return _outcome(pid, reader)
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)


def _outcome(pid: int, reader: int) -> str:
    """Wait for the child, and end it if it hangs."""
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    said = os.read(reader, 1) if poll.poll(_TRIAL_SECONDS * 1000) else None
    if said is None:
        os.kill(pid, signal.SIGKILL)
    with suppress(ChildProcessError):  # the code has the system wait for children by itself
        os.waitpid(pid, 0)
    if said is None:
        return "a child that was forked on trial hung"
    return "" if said == _ALIVE else "a child that was forked on trial crashed"


def _descriptors() -> dict[int, str]:
    """All open descriptors, and what each is of, as the kernel names it."""
    found = {}
    for entry in _DESCRIPTORS.iterdir():
        with suppress(OSError):  # the one that was open to list them
            found[int(entry.name)] = str(entry.readlink())
    return found


def _shared(number: int, target: str) -> str:
    """What copies of a descriptor would take from each other; empty where they may share it."""
    mode = os.fstat(number).st_mode
    if stat.S_ISSOCK(mode):
        return _conversation(number)
    if target.startswith("anon_inode:"):
        # epoll, io_uring, eventfd and the like: copies share what they wait for
        return f"a descriptor of {target.removeprefix('anon_inode:').strip('[]')}"
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        is_harmless = target in _HARMLESS_DEVICES or target.startswith(_TERMINALS)
        return "" if is_harmless else target
    if stat.S_ISFIFO(mode):
        return "a pipe from another process" if _is_fed_from_outside(number) else ""
    if stat.S_ISREG(mode) and not target.startswith(_SHARED_MEMORY) and _is_like_database(number):
        return f"{target}, for reading and writing,"
    return ""


def _open_flags(number: int) -> int:
    """The flags that a descriptor was opened with, as ``os.open`` takes them."""
    lines = (_DESCRIPTOR_FACTS / str(number)).read_text().splitlines()
    return next(int(it.split()[1], 8) for it in lines if it.startswith("flags:"))


def _is_like_database(number: int) -> bool:
    """Whether a file is open for reading and writing, and not just for adding to it.

    So are the files of SQLite and DuckDB, whose locks a forked child does not have.
    """
    flags = _open_flags(number)
    return flags & os.O_ACCMODE == os.O_RDWR and not flags & os.O_APPEND


def _is_fed_from_outside(number: int) -> bool:
    """Whether a descriptor reads from a pipe into which this process cannot write.

    Of what a helper process answers there, each child would read what is for another one. Pipes
    whose both ends are here wake this process itself, mostly.
    """
    if not _only_reads(number):
        return False
    for other in _descriptors():
        with suppress(OSError):  # closed meanwhile
            if os.path.sameopenfile(number, other) and not _only_reads(other):
                return False
    return True


def _only_reads(number: int) -> bool:
    return _open_flags(number) & os.O_ACCMODE == os.O_RDONLY


def _conversation(number: int) -> str:
    """What a socket is, in words; empty for one of datagrams.

    Those are sent as a whole, by loggers and metrics mostly. Of a stream each child would read
    what is for another one, also where both its ends are in this process.
    """
    with socket.socket(fileno=os.dup(number)) as found:
        if found.type == socket.SOCK_DGRAM and found.family != getattr(socket, "AF_NETLINK", None):
            return ""
        for word, ask in (("to", found.getpeername), ("at", found.getsockname)):
            with suppress(OSError):  # it has none
                where = _spelled(ask())
                if where:
                    return f"a socket {word} {where}"
    return "a socket"


def _spelled(address: Any) -> str:
    """An address as people write it; empty for none."""
    if isinstance(address, tuple):
        host, port = address[:2]
        return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
    return os.fsdecode(address) if isinstance(address, (str, bytes)) else ""
