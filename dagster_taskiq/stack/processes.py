"""Processes that a command starts, and that none of them nor of their descendants is left over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil

from dagster_taskiq.worker.guard import kill_group
from dagster_taskiq.worker.guard_client import GuardClient

#: How long a process may take to end when it is told to.
STOP_SECONDS = 15.0

#: How long what is dead or killed may take to disappear, and the children of what has ended to end.
GONE_SECONDS = 5.0

#: Pause between two looks at a process that is to end.
_LOOK_SECONDS = 0.02


class Processes:
    """What a command has started, each in a session of its own, so that Ctrl-C reaches us alone.

    A guard, the same as a worker's, kills them when this process is killed.

    Args:
        is_forced: whether there is no more patience with what is being stopped.
    """

    def __init__(self, is_forced: Callable[[], bool] = lambda: False) -> None:
        self._is_forced = is_forced
        self._guard = GuardClient()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._descendants: set[psutil.Process] = set()

    def start_guard(self) -> None:
        """Before anything else is started."""
        self._guard.start()

    def start(
        self, name: str, arguments: Sequence[str], directory: Path, output: int | IO[bytes]
    ) -> subprocess.Popen[bytes]:
        """Start Python.

        Args:
            name: for people, and for ``stop``.
            arguments: of Python, such as ``-m`` and a module.
            output: where both of its outputs go.
        """
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._processes[name] = process
        self._guard.watch(process.pid)
        return process

    def ended(self) -> dict[str, int]:
        """Exit codes of those that have ended, by name."""
        codes = {name: process.poll() for name, process in self._processes.items()}
        return {name: code for name, code in codes.items() if code is not None}

    def stop(self, signals: dict[str, signal.Signals]) -> None:
        """Give some of them a signal each, all at once, and wait for their end."""
        self._descendants.update(psutil.Process().children(recursive=True))
        found = [(name, self._processes[name]) for name in signals if name in self._processes]
        for name, process in found:
            if process.poll() is None:
                process.send_signal(signals[name])
        deadline = time.monotonic() + STOP_SECONDS
        for _, process in found:
            self._end(process, deadline)

    def close(self) -> None:
        """Return when none of them nor of their descendants exists any more."""
        self._descendants.update(psutil.Process().children(recursive=True))
        self._guard.close()
        for process in self._wait(self._descendants):
            _kill(process)
        self._wait(self._descendants)

    def _end(self, process: subprocess.Popen[bytes], deadline: float) -> None:
        """Wait for its end, with patience but not for ever; then nothing of its group is left."""
        group = process.pid
        while process.poll() is None and time.monotonic() < deadline and not self._is_forced():
            time.sleep(_LOOK_SECONDS)
        if process.poll() is not None:
            # a child that ends a little later would leave its files if it were killed
            self._wait_for(lambda: not _members(group))
        # without members the number may be that of another group by now
        if process.poll() is None or _members(group):
            kill_group(group)
        process.wait()
        _wait_until(lambda: not _members(group), GONE_SECONDS)
        self._guard.forget(group)

    def _wait(self, processes: set[psutil.Process]) -> set[psutil.Process]:
        """Those that are still there after a while."""
        self._wait_for(lambda: not any(map(_is_alive, processes)))
        return set(filter(_is_alive, processes))

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait for a while until it holds, if there is patience."""
        _wait_until(lambda: condition() or self._is_forced(), GONE_SECONDS)


def exit_code_in_words(code: int) -> str:
    """Such as ``exit code 1``, or the signal that has ended a process."""
    if code >= 0:
        return f"exit code {code}"
    return f"exit code {code}, by the signal {signal.Signals(-code).name}"


def _wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Return when it holds, or when it has not for this time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)


def _members(group: int) -> list[psutil.Process]:
    """The processes of a process group, whoever their parent is by now."""
    found = []
    for pid in psutil.pids():
        with suppress(OSError, psutil.NoSuchProcess):
            if os.getpgid(pid) == group:
                found.append(psutil.Process(pid))
    return [process for process in found if _is_alive(process)]


def _is_alive(process: psutil.Process) -> bool:
    try:
        # the zombie of an orphan is gone as soon as init looks
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        pass
