"""The processes of a measurement: started with a mark, ended with all that carry it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

#: Whatever our processes start inherits it, also what leaves their session: the embedded server.
MARK_VARIABLE = "DAGSTER_TASKIQ_BENCHMARK"

#: How long a worker may take to end, and then what it has left to stop by itself.
END_SECONDS = 10.0

#: How often to look at what costs nothing to look at, and at what another server must answer.
LOOK_SECONDS = 0.02
LOOK_AT_STORAGE_SECONDS = 0.25


class DidNotEndError(Exception):
    """Something was not over within its time limit."""

    def __init__(self, what: str, limit_seconds: float) -> None:
        super().__init__(f"{what} within {limit_seconds:g} s")
        self.limit_seconds = limit_seconds


class FailedError(Exception):
    """A worker or a run has ended as it must not."""


class Processes:
    """All processes of one measurement. Closing it ends them, whatever they are doing."""

    def __init__(self, environment: Mapping[str, str], directory: Path) -> None:
        self._mark = uuid.uuid4().hex
        self._environment = {**environment, MARK_VARIABLE: self._mark}
        self._directory = directory
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, command: Sequence[str]) -> tuple[subprocess.Popen[bytes], Path]:
        """Start one in a session of its own, out of reach of Ctrl-C; with the file of its log."""
        log = self._directory / f"{len(self._started):02}-{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environment,
                cwd=self._directory,
                start_new_session=True,
            )
        self._started.append(process)
        return process, log

    def close(self) -> None:
        """End them: first as a supervisor would, then by SIGKILL."""
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            alive = [process for process in self._started if process.poll() is None]
            for asked in alive:
                with suppress(ProcessLookupError):
                    os.killpg(asked.pid, number)
            deadline = time.monotonic() + END_SECONDS
            for asked in alive:
                with suppress(subprocess.TimeoutExpired):
                    asked.wait(max(0.0, deadline - time.monotonic()))
        # an embedded server and guards end by themselves after the last user
        _, left = psutil.wait_procs(self._marked(), END_SECONDS)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, END_SECONDS)

    def _marked(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):  # gone, or not ours
                if process.environ().get(MARK_VARIABLE) == self._mark:
                    found.append(process)
        return found


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


def tree(pid: int) -> list[psutil.Process]:
    """The process and all below it."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    """CPU time that they have used so far."""
    total = 0.0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


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
