"""``worker start -d``: a worker in a process of its own, with a log file."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import click

from dagster_taskiq.aio.private_files import open_log, own_directory
from dagster_taskiq.errors import DagsterTaskiqError

#: What a worker writes to ``--ready-fd``: it takes tasks; it waits for a server that is away.
READY, WAITING = b"r", b"w"

#: Options of ``worker start`` that its child in the background must not get, or gets anew.
_OF_THE_PARENT = ("background", "name", "ready_fd")


def start_in_background(context: click.Context, name: str) -> None:
    """Start the worker that a command line asked for, and return when it is ready or waits.

    Args:
        context: of the ``worker start`` that was called, by whatever program.
        name: of the worker, without its host.

    Raises:
        DagsterTaskiqError: the worker ended before it was ready; with its last line.
    """
    log = _open_directory() / f"{name}.log"
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "dagster_taskiq", "worker", "start"]
    own = [f"--name={name}", f"--ready-fd={writer}"]
    with _open_log(log) as output:
        process = subprocess.Popen(
            [*command, *own, *arguments_of(context)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[writer],
            start_new_session=True,
        )
    os.close(writer)
    with os.fdopen(reader, "rb") as ready:
        word = ready.read(1)
    if not word:  # it has ended without a word
        lines = log.read_text(encoding="utf8", errors="replace").splitlines()
        reason = lines[-1].removeprefix("Error: ") if lines else "it said nothing"
        raise DagsterTaskiqError(f"The worker did not start: {reason} (log: {log})")
    click.echo(f"Started worker {name}@{socket.gethostname()}, pid {process.pid}, log {log}")
    if word == WAITING:
        click.echo("It waits for a server that is away; its log says which.", err=True)


def _open_log(log: Path) -> BinaryIO:
    try:
        return open_log(log)
    except OSError as error:
        raise DagsterTaskiqError(f"Cannot write the log {log}: {error.strerror}.") from error


def arguments_of(context: click.Context) -> list[str]:
    """The parsed options of ``worker start`` as arguments, without those of the parent alone.

    They are made of what was parsed, not of ``sys.argv``: there, ``-dq a`` and a caller that is
    another program both hide the ``-d``, and the child would start a child in turn.
    """
    arguments: list[str] = []
    rest: tuple[str, ...] = ()
    for parameter in context.command.params:
        value = context.params.get(str(parameter.name))
        if parameter.name in _OF_THE_PARENT or value is None or value is False:
            continue
        if isinstance(parameter, click.Argument):
            rest = ("--", *value) if value else ()
        elif value is True:
            arguments.append(parameter.opts[0])
        else:
            values = value if isinstance(value, tuple) else (value,)
            arguments += [f"{parameter.opts[0]}={item}" for item in values]
    return [*arguments, *rest]


def _open_directory() -> Path:
    """The directory of the logs; it is made where it is missing.

    Raises:
        DagsterTaskiqError: it belongs to somebody else, or cannot be made.
    """
    home = Path(os.getenv("DAGSTER_HOME") or ".").expanduser()
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        return own_directory(own_directory(home / "dagster_taskiq") / "logs")
    except OSError as error:
        raise DagsterTaskiqError(
            f"Cannot make the directory {error.filename} for the worker's log: {error.strerror}."
        ) from error
