"""The processes of a measurement: started with a mark, ended with all that carry it."""

from __future__ import annotations

import resource
import signal
import statistics
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import click
import psutil

from dagster_taskiq_tests.acceptance.harness import STACK_VARIABLE, end_marked
from dagster_taskiq_tests.server_processes import popen, stop

#: How often to look at what costs nothing to look at, and at what another server must answer.
LOOK_SECONDS = 0.02
LOOK_AT_STORAGE_SECONDS = 0.25

#: Processes are at rest when they have used less than this share of a core, at each of the looks
#: of these seconds. Waiting workers use a hundredth of a core, and the kernel counts in 10 ms.
_REST_SHARE = 0.08
_REST_SECONDS = 2.0


class FailedError(click.ClickException):
    """A measurement cannot be made; the command line says why, without a traceback.

    Attributes:
        limit_seconds: the time limit that was not kept, where that was it.
    """

    limit_seconds: float | None = None


class DidNotEndError(FailedError):
    """Something was not over within its time limit."""

    def __init__(self, what: str, limit_seconds: float) -> None:
        super().__init__(f"{what} within {limit_seconds:g} s")
        self.limit_seconds = limit_seconds


def interrupt_on_signals() -> None:
    """End this program at SIGINT and SIGTERM by a KeyboardInterrupt; a second one does nothing.

    So nothing keeps it from clearing up.
    """

    def interrupt(*_: object) -> NoReturn:
        for ending in (signal.SIGINT, signal.SIGTERM):
            signal.signal(ending, signal.SIG_IGN)
        raise KeyboardInterrupt

    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, interrupt)


def allow_connections() -> None:
    """Let this process open as many files as it may, for thousands of connections."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Processes:
    """All processes of one measurement. Closing it ends them, and whatever they have started."""

    def __init__(self, environment: Mapping[str, str | None], directory: Path) -> None:
        self._mark = uuid.uuid4().hex
        self._environment = {**environment, STACK_VARIABLE: self._mark}
        self._directory = directory
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, command: Sequence[str]) -> tuple[subprocess.Popen[bytes], Path]:
        """Start one in a session of its own, out of reach of Ctrl-C; with the file of its log."""
        log = self._directory / f"{len(self._started):02}-{name}.log"
        process = popen(command, log, environment=self._environment, directory=self._directory)
        self._started.append(process)
        return process, log

    def close(self) -> None:
        """End them, runs before the workers; an embedded server ends by itself after its users."""
        for process in reversed(self._started):
            stop(process)
        end_marked([self._mark])


def wait_for(
    condition: Callable[[], bool],
    what: str,
    limit_seconds: float,
    look_seconds: float = LOOK_SECONDS,
) -> None:
    """Wait until it holds.

    Raises:
        DidNotEndError: it did not within the limit.
    """
    deadline = time.monotonic() + limit_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise DidNotEndError(what, limit_seconds)
        time.sleep(look_seconds)


class Looks:
    """What looks at a process find, one look in each pause; for ``Lab.run`` to call."""

    def __init__(self, look: Callable[[int], float], pause_seconds: float = 0.0) -> None:
        self._found: list[float] = []
        self._look = look
        self._pause_seconds = pause_seconds
        self._looked_at = float("-inf")

    def __call__(self, pid: int) -> None:
        """Look, unless the last look was a moment ago."""
        if time.monotonic() - self._looked_at >= self._pause_seconds:
            self._found.append(self._look(pid))
            self._looked_at = time.monotonic()

    @property
    def most(self) -> float:
        """The largest."""
        return max(self._found, default=0.0)

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.fmean(self._found) if self._found else 0.0


def tree(pid: int) -> list[psutil.Process]:
    """The process and all below it."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def cpu_seconds(processes: Sequence[psutil.Process], *, with_past: bool = False) -> float:
    """CPU time that they have used so far, and perhaps their children that have ended."""
    total = 0.0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
            if with_past:
                total += times.children_user + times.children_system
    return total


def wait_for_rest(processes: Callable[[], Sequence[psutil.Process]], limit_seconds: float) -> float:
    """Wait until they only wait; the moment at which they began to, by ``time.monotonic``.

    Raises:
        DidNotEndError: they went on for longer than the limit.
    """
    looked_at = rest_since = time.monotonic()
    used = cpu_seconds(processes(), with_past=True)

    def are_at_rest() -> bool:
        nonlocal looked_at, rest_since, used
        now, now_used = time.monotonic(), cpu_seconds(processes(), with_past=True)
        if now_used - used > _REST_SHARE * (now - looked_at):
            rest_since = now
        looked_at, used = now, now_used
        return now - rest_since > _REST_SECONDS

    wait_for(are_at_rest, "Processes did not come to rest", limit_seconds, LOOK_AT_STORAGE_SECONDS)
    return rest_since


def connections(processes: Sequence[psutil.Process], port: int) -> int:
    """Connections that they have to a port."""
    count = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            found = process.net_connections("tcp")
            count += sum(bool(it.raddr) and it.raddr.port == port for it in found)
    return count


def pss_mib(processes: Sequence[psutil.Process]) -> float:
    """Their memory, with each shared page divided among those that share it.

    Where the system does not say (macOS), what is theirs alone.
    """
    total = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            memory = process.memory_full_info()
            total += getattr(memory, "pss", 0) or memory.uss
    return total / 2**20
