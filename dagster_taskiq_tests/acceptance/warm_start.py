"""Processes that start warm: forks of one that has imported what ``dagster-taskiq`` imports.

To import it takes a second of the processor, which the worker of every other test and each run
would need. The modules of jobs are not among it: a child must load what stands on disk now.
A test about the start itself, the environment or what is imported starts a new interpreter.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import multiprocessing.process
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import IO, Any

#: What a worker with children imports, whatever its servers and jobs are, and what a run does.
_IMPORTS = (
    "dagster_taskiq.cli",
    "dagster_taskiq.worker.child",
    "dagster_taskiq.backend.postgresql",
    "dagster_taskiq.backend.redis",
    "dagster_taskiq.brokers.amqp",
    "dagster_taskiq.brokers.postgresql",
    "dagster_taskiq.brokers.redis",
    "dagster_taskiq.executor",
    "dagster._core.storage.sqlite_storage",
    "alembic.command",
    "upath.implementations.local",
    "anyio._backends._asyncio",
    "dagster_taskiq.monitoring.exporter",
    "dagster_taskiq.monitoring.worker_pages",
)

#: The longest request: the arguments and the environment.
_REQUEST_BYTES = 1 << 17

#: A pid, or a status as ``os.waitpid`` has it.
_NUMBER = struct.Struct("i")

#: How long a template may take to end.
_CLOSE_SECONDS = 10.0

#: Only Linux shows the environment that a process was started with as it stands in its memory.
IS_POSSIBLE = sys.platform == "linux"


class WarmProcess:
    """A process that a template has forked; what it is asked is as with ``subprocess.Popen``."""

    def __init__(self, command: Sequence[str], numbers: int) -> None:
        self.args = command
        self.returncode: int | None = None
        self._numbers = numbers
        self.pid = self._read_number()

    def poll(self) -> int | None:
        """Its exit code if it has ended."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code once it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not.
        """
        if self.returncode is None:
            if not select.select([self._numbers], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = os.waitstatus_to_exitcode(self._read_number())
            os.close(self._numbers)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _read_number(self) -> int:
        data = os.read(self._numbers, _NUMBER.size)
        if not data:
            raise RuntimeError("The template of the warm processes has died.")
        return int(_NUMBER.unpack(data)[0])


class Template:
    """The process that the warm ones are forked from.

    Args:
        environment: of its start.
        mark: the variable whose value tells warm processes apart, also in /proc/PID/environ.
        mark_length: of its values.
    """

    def __init__(self, environment: Mapping[str, str], mark: str, mark_length: int) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._requests.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * _REQUEST_BYTES)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), mark],
                env={**environment, mark: "-" * mark_length},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    def start(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        stdout: IO[Any],
        stderr: IO[Any],
        environment: Mapping[str, str],
        directory: Path,
    ) -> WarmProcess:
        """Run a module as ``python -m`` does; standard input is empty."""
        request = json.dumps([module, list(arguments), dict(environment), str(directory)]).encode()
        assert len(request) < _REQUEST_BYTES
        reader, writer = os.pipe()
        try:
            descriptors = [stdout.fileno(), stderr.fileno(), writer]
            socket.send_fds(self._requests, [request], descriptors)
        finally:
            os.close(writer)
        return WarmProcess([module, *arguments], reader)

    def close(self) -> None:
        """End it; what it has forked goes on."""
        self._requests.close()
        self._process.wait(_CLOSE_SECONDS)


# --- in the template ---


def _main(descriptor: int, mark: str) -> None:
    """Serve requests until their other end is closed; returns in what it has forked."""
    # where `dagster_taskiq.__main__` does the same
    gc.disable()
    for module in _IMPORTS:
        with suppress(ImportError):  # another release of Dagster has another one, or none
            import_module(module)
    quick_storage: Any = import_module("dagster_taskiq_tests.quick_storage")
    quick_storage.make_quick()
    quick_storage.prepare()
    # else the first collection of each fork would look at all of it, and so copy it
    gc.freeze()
    # a test of slots may have blocked the one, and the other is for the tests alone
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests = socket.socket(fileno=descriptor)
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    writers: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([requests, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            _tell_ends(writers)
        if requests not in ready:
            continue
        data, descriptors, _, _ = socket.recv_fds(requests, _REQUEST_BYTES, 3)
        if not data:
            os._exit(0)
        stdout, stderr, writer = descriptors
        pid = os.fork()
        if pid == 0:
            requests.detach()
            _become(json.loads(data), mark, stdout, stderr)
            return
        writers[pid] = writer
        _tell(writer, pid)
        os.close(stdout)
        os.close(stderr)


def _tell_ends(writers: dict[int, int]) -> None:
    while writers:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        writer = writers.pop(pid)
        _tell(writer, status)
        os.close(writer)


def _tell(writer: int, number: int) -> None:
    with suppress(BrokenPipeError):  # nobody wants to know
        os.write(writer, _NUMBER.pack(number))


def _become(request: tuple[str, list[str], dict[str, str], str], mark: str, *output: int) -> None:
    """Run a module, in a fork."""
    module, arguments, environment, directory = request
    for target, source in zip((1, 2), output, strict=True):
        os.dup2(source, target)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - they are no files
        if int(name) > 2:
            with suppress(OSError):  # the one that was open to list them
                os.close(int(name))
    _overwrite(mark, environment.get(mark, ""))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    sys.path[0] = multiprocessing.process.ORIGINAL_DIR = directory
    sys.argv[1:] = arguments
    gc.enable()
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            raise  # Python says it
        code = end.code or 0
    else:
        code = 0
    # What an interpreter does for its program when that ends. What it does then for itself, freeing
    # each object of all modules, would copy all memory of the template.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)


def _overwrite(name: str, value: str) -> None:
    """Change a variable where the kernel shows it, in the memory that the start has left."""
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_void_p
    where = libc.getenv(os.fsencode(name))
    assert len(ctypes.string_at(where)) == len(value)
    ctypes.memmove(where, os.fsencode(value), len(value))


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2])
