"""Commands with a mark in their environment, by which a test sees what is left of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from dagster_taskiq.defaults import BACKEND_URL_VARIABLE, BROKER_URL_VARIABLE
from dagster_taskiq_tests.server_processes import temporary_directory

#: How long a thing may take on a busy machine.
SECONDS = 120.0

#: How long what a killed command leaves may take to see that.
GONE_SECONDS = 15.0

#: Pause between two looks, each of which may be at all processes of the machine.
PAUSE_SECONDS = 0.1

_VARIABLE = "DAGSTER_TASKIQ_TEST_COMMAND"

#: What would make a command use a server or a home of its tester.
_NOT_INHERITED = (BROKER_URL_VARIABLE, BACKEND_URL_VARIABLE, "DAGSTER_HOME")


@dataclass
class Command:
    """A command of ours that runs in a session of its own.

    Attributes:
        directory: where it runs; ``tmp`` in it is its directory for temporary files.
        mark: that it and all its processes carry in their environment.
    """

    process: subprocess.Popen[bytes]
    directory: Path
    mark: str

    @property
    def output(self) -> str:
        return (self.directory / "output").read_text(encoding="utf8")

    def files(self) -> list[str]:
        """What it has in the directory for temporary files."""
        return sorted(path.name for path in (self.directory / "tmp").iterdir())

    def processes(self) -> list[str]:
        """Commands of all that carry its mark, whoever their parent is by now."""
        return [
            " ".join(command) for command in map(self._command, psutil.process_iter()) if command
        ]

    def _command(self, process: psutil.Process) -> list[str]:
        try:
            if process.environ().get(_VARIABLE) != self.mark:
                return []
            return process.cmdline()  # of a zombie there is none
        except (psutil.Error, OSError):
            return []

    def runs(self, *parts: str) -> bool:
        """Whether it has a process with these words in its command."""
        return any(all(part in command for part in parts) for command in self.processes())

    def has_loaded(self, library: str) -> bool:
        """Whether its own process has loaded a native library with this in its path."""
        return any(
            library in found.path for found in psutil.Process(self.process.pid).memory_maps()
        )

    def wait_until(
        self,
        condition: Callable[[], bool],
        seconds: float = SECONDS,
        pause_seconds: float = PAUSE_SECONDS,
    ) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (self.output, self.processes())
            time.sleep(pause_seconds)

    def wait_until_gone(self) -> None:
        """Wait for the end of all its processes."""
        self.wait_until(lambda: not self.processes(), GONE_SECONDS)

    def end(self) -> int:
        """Wait for its end; the exit code."""
        return self.process.wait(SECONDS)


@contextmanager
def marked_commands(files: Mapping[str, str] | None = None) -> Iterator[Callable[..., Command]]:
    """Start ``dagster-taskiq`` with some arguments and variables, in a directory of its own.

    Whatever a failed test leaves of it is killed.

    Args:
        files: in that directory, by name.
    """
    with temporary_directory() as directory:
        (directory / "tmp").mkdir()
        for name, text in (files or {}).items():
            (directory / name).write_text(text, encoding="utf8")
        started: list[Command] = []

        def start(*arguments: str, **environment: str) -> Command:
            started.append(_start(directory, arguments, environment))
            return started[-1]

        try:
            yield start
        finally:
            for command in started:
                command.process.kill()
                command.process.wait()
                # the guards and the keeper do the rest
                command.wait_until_gone()


def _start(directory: Path, arguments: tuple[str, ...], environment: dict[str, str]) -> Command:
    mark = uuid.uuid4().hex
    inherited = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    with (directory / "output").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "dagster_taskiq", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=directory,
            env={**inherited, _VARIABLE: mark, "TMPDIR": str(directory / "tmp"), **environment},
            start_new_session=True,
        )
    return Command(process, directory, mark)
