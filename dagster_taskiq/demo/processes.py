"""The processes of the demo: two workers and the run, and that none of them is left over."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from dagster_taskiq.errors import DemoError
from dagster_taskiq.worker.guard import kill_group
from dagster_taskiq.worker.guard_client import GuardClient

#: How long the run may take to have its steps stopped, and a worker to end without steps.
STOP_SECONDS = 15.0

#: How long what is dead or killed may take to disappear.
GONE_SECONDS = 5.0

#: How much of a log is shown when something failed.
TAIL_LINES = 15


class Processes:
    """What the demo has started, each in a session of its own, so that Ctrl-C reaches us alone.

    A guard, the same as a worker's, kills them when this process is killed.

    Args:
        directory: where they run and where their logs are.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._guard = GuardClient()
        self._workers: dict[str, subprocess.Popen[bytes]] = {}
        self._run: subprocess.Popen[bytes] | None = None

    def start_guard(self) -> None:
        """Before anything else is started."""
        self._guard.start()

    def start_worker(self, name: str, arguments: list[str]) -> None:
        """Start ``dagster-taskiq worker start`` with further arguments."""
        command = ["dagster_taskiq", "worker", "start", "--name", name, *arguments]
        self._workers[name] = self._start(name, command)

    def start_run(self, arguments: list[str]) -> None:
        """Start ``dagster job execute`` with further arguments."""
        self._run = self._start("run", ["dagster", "job", "execute", *arguments])

    def _start(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        with self._log(name).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._guard.watch(process.pid)
        return process

    def check_workers(self) -> None:
        """Raise DemoError if a worker has ended."""
        for name, process in self._workers.items():
            if process.poll() is not None:
                raise DemoError(
                    f"The worker {name!r} has ended with exit code {process.returncode}.\n"
                    f"{self.tail(name)}"
                )

    def is_running(self) -> bool:
        """Whether the run's process has not ended."""
        return self._run is not None and self._run.poll() is None

    def tail(self, name: str) -> str:
        """The last lines of a process's log."""
        try:
            lines = self._log(name).read_text(encoding="utf8", errors="replace").splitlines()
        except OSError as error:
            lines = [str(error)]
        return "\n".join([f"The last lines of {self._log(name)}:", *lines[-TAIL_LINES:]])

    def logs(self) -> str:
        """The last lines of all logs."""
        return "\n\n".join(self.tail(name) for name in (*self._workers, "run"))

    def _log(self, name: str) -> Path:
        return self._directory / f"{name}.log"

    def stop(self) -> None:
        """Stop in order: the run, whose steps the workers cancel, then the workers, then the rest.

        Returns when none of them nor of their descendants exists any more.
        """
        everything = set(psutil.Process().children(recursive=True))
        if self._run is not None:
            # as Ctrl-C would: Dagster cancels the steps and waits for their end
            _signal(self._run, signal.SIGINT)
            self._end(self._run)
        everything.update(psutil.Process().children(recursive=True))
        for worker in self._workers.values():
            _signal(worker, signal.SIGTERM)
        for worker in self._workers.values():
            self._end(worker)
        self._guard.close()
        for process in _wait(everything):
            _kill(process)
        _wait(everything)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for its end, with patience but not for ever; then nothing of its group is left."""
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        # at once, while the number cannot yet be that of another group
        kill_group(process.pid)
        process.wait()
        self._guard.forget(process.pid)


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if process.poll() is None:
        process.send_signal(number)


def _wait(processes: set[psutil.Process]) -> set[psutil.Process]:
    """Those that are still there after a while."""
    deadline = time.monotonic() + GONE_SECONDS
    while (left := {item for item in processes if _is_alive(item)}) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


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
