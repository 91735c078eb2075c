"""The processes of the demo, two workers and the run, and their logs."""

from __future__ import annotations

import signal
from pathlib import Path

from dagster_taskiq.errors import DemoError
from dagster_taskiq.stack.processes import Processes

#: How much of a log is shown when something failed.
TAIL_LINES = 15

_RUN = "run"


class DemoProcesses:
    """What the demo has started.

    Args:
        directory: where they run and where their logs are.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._processes = Processes()
        self._workers: list[str] = []

    def start_guard(self) -> None:
        """Before anything else is started."""
        self._processes.start_guard()

    def start_worker(self, name: str, arguments: list[str]) -> None:
        """Start ``dagster-taskiq worker start`` with further arguments."""
        self._workers.append(name)
        self._start(name, ["dagster_taskiq", "worker", "start", "--name", name, *arguments])

    def start_run(self, arguments: list[str]) -> None:
        """Start ``dagster job execute`` with further arguments."""
        self._start(_RUN, ["dagster", "job", "execute", *arguments])

    def _start(self, name: str, command: list[str]) -> None:
        with self._log(name).open("ab") as log:
            self._processes.start(name, ["-m", *command], self._directory, log)

    def check_workers(self) -> None:
        """Raise DemoError if a worker has ended."""
        for name, code in self._processes.ended().items():
            if name in self._workers:
                raise DemoError(
                    f"The worker {name!r} has ended with exit code {code}.\n{self.tail(name)}"
                )

    def is_running(self) -> bool:
        """Whether the run's process has not ended."""
        return _RUN not in self._processes.ended()

    def tail(self, name: str) -> str:
        """The last lines of a process's log."""
        try:
            lines = self._log(name).read_text(encoding="utf8", errors="replace").splitlines()
        except OSError as error:
            lines = [str(error)]
        return "\n".join([f"The last lines of {self._log(name)}:", *lines[-TAIL_LINES:]])

    def logs(self) -> str:
        """The last lines of all logs."""
        return "\n\n".join(self.tail(name) for name in (*self._workers, _RUN))

    def _log(self, name: str) -> Path:
        return self._directory / f"{name}.log"

    def stop(self) -> None:
        """Stop in order: the run, whose steps the workers cancel, then the workers, then the rest.

        Returns when none of them nor of their descendants exists any more.
        """
        # as Ctrl-C would: Dagster cancels the steps and waits for their end
        self._processes.stop({_RUN: signal.SIGINT})
        self._processes.stop(dict.fromkeys(self._workers, signal.SIGTERM))
        self._processes.close()
