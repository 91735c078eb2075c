"""The guard: a small process that kills a worker's children when the worker cannot.

It runs in a session of its own, and only the worker holds the other end of its standard input.
End of file means that the worker is gone, however it went: every process group it had named is
killed. Each group may have a deadline, which the worker moves on as it renews its leases; a worker
that is frozen, or that cannot reach the backend, does not, and then the group is killed at the
deadline, before anybody else may judge that its step is lost.

The lines of the protocol, each shorter than what a pipe writes at once:

    watch GROUP               the group exists, and has no deadline (any more)
    deadline GROUP SECONDS    kill it when ``clock`` says this number of seconds
    forget GROUP              it is gone
    ask                       answer with an empty line that everything before is obeyed

The module imports nothing but the standard library and is started by its path, so that it costs
a few megabytes and milliseconds.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

#: A clock that goes on while the machine is suspended, where there is one: a laptop that wakes up
#: must find that its leases are over.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def clock() -> float:
    """Seconds of the clock that deadlines are given in."""
    return time.clock_gettime(_CLOCK)


def kill_group(group: int) -> None:
    """SIGKILL to a process group; nothing if it is gone."""
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def guard(commands: int, answers: int) -> None:
    """Serve the protocol on two file descriptors until the end of file of the first."""
    deadlines: dict[int, float | None] = {}
    rest = b""
    while True:
        pending = [when for when in deadlines.values() if when is not None]
        timeout = max(0.0, min(pending) - clock()) if pending else None
        readable, _, _ = select.select([commands], [], [], timeout)
        if readable:
            data = os.read(commands, 65536)
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line == b"ask":
                    _answer(answers)
                else:
                    _obey(line.split(), deadlines)
        for group, when in deadlines.items():
            if when is not None and when <= clock():
                kill_group(group)
                deadlines[group] = None
    for group in deadlines:
        kill_group(group)


def _obey(words: list[bytes], deadlines: dict[int, float | None]) -> None:
    command, group = words[0], int(words[1])
    if command == b"forget":
        deadlines.pop(group, None)
    elif command == b"deadline":
        deadlines[group] = float(words[2])
    else:  # watch
        deadlines[group] = None


def _answer(answers: int) -> None:
    try:
        os.write(answers, b"\n")
    except BrokenPipeError:
        pass  # the worker is gone, as the end of its commands is about to say


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    guard(sys.stdin.fileno(), sys.stdout.fileno())
