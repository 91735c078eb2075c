"""What several processes write, line by line behind their names."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import IO

import click

#: How long what a process has written may take to be printed after its end.
_REST_SECONDS = 2.0

_COLOURS = ("cyan", "magenta", "green", "yellow")


class Logs:
    """Prints to standard output, with colours in a terminal.

    Args:
        names: of the processes, and of this one, the last.
    """

    def __init__(self, names: Sequence[str]) -> None:
        width = max(map(len, names))
        self._prefixes = {
            name: click.style(f"{name.ljust(width)} | ", fg=colour)
            for name, colour in zip(names, _COLOURS, strict=False)
        }
        self._own = names[-1]
        self._printing = threading.Lock()
        self._threads: list[threading.Thread] = []

    def say(self, text: str) -> None:
        """A sentence of this process."""
        self._print(self._own, text)

    def follow(self, name: str, stream: IO[bytes]) -> None:
        """Print what a process writes, until the end of its output."""
        thread = threading.Thread(
            target=self._follow, args=(name, stream), name=f"log of {name}", daemon=True
        )
        self._threads.append(thread)
        thread.start()

    def _follow(self, name: str, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                self._print(name, line.decode(errors="replace").rstrip("\r\n"))

    def _print(self, name: str, line: str) -> None:
        # a terminal that is closed sends SIGHUP too, which ends everything
        with self._printing, suppress(OSError):
            click.echo(f"{self._prefixes[name]}{line}")

    def close(self) -> None:
        """Print the rest of what processes have written that have ended."""
        for thread in self._threads:
            thread.join(_REST_SECONDS)
