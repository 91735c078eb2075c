"""RabbitMQ and PostgreSQL processes that tests start: private nodes, to be killed and restarted."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import aio_pika
import psutil
import psycopg2  # type: ignore[import-untyped]

from dagster_taskiq_tests.server_processes import (
    STOP_SECONDS,
    UnavailableError,
    await_answer,
    free_port,
    popen,
    stop,
    temporary_directory,
)


class Node(ABC):
    """A server process with its own directory.

    Attributes:
        url: how to reach it; the same after ``restart``.
        directory: of its data and log.
        process: the running one, or the last.
    """

    #: What asks it to stop in order.
    stop_signal = signal.SIGTERM

    def __init__(self, url: str, directory: Path) -> None:
        self.url = url
        self.directory = directory
        self.process = self._start()

    @abstractmethod
    def spawn(self) -> subprocess.Popen[bytes]:
        """Start the process."""

    @abstractmethod
    def check(self) -> str:
        """Raise ``UnavailableError`` unless it answers."""

    @property
    def log(self) -> Path:
        """What it writes."""
        return self.directory / "server.log"

    def stop(self) -> None:
        """Stop it in order; does nothing if it is not running."""
        stop(self.process, self.stop_signal)

    def kill(self) -> None:
        """Kill it with SIGKILL, with all its processes."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def restart(self) -> None:
        """Start it again with the same data, after an orderly stop if it is running."""
        self.stop()
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        process = self.spawn()
        try:
            await_answer(self.check, process, self.log)
        except BaseException:
            stop(process)
            raise
        return process


# --- RabbitMQ -----------------------------------------------------------------------------------


class RabbitMQNode(Node):
    """A RabbitMQ of our own; ``environment`` is how rabbitmqctl reaches it."""

    def __init__(
        self, server: str, port: int, epmd_port: int, directory: Path, settings: str
    ) -> None:
        config = directory / "rabbitmq.conf"  # in the place of the host's own, which may name ports
        config.write_text(f"listeners.tcp.local = 127.0.0.1:{port}\n{settings}")
        self._server = server
        self.environment = {
            "ERL_CRASH_DUMP": str(directory / "erl_crash.dump"),
            "ERL_EPMD_PORT": str(epmd_port),
            "HOME": str(directory),  # of the cookie
            "RABBITMQ_NODENAME": f"test-{port}@localhost",
            "RABBITMQ_CONFIG_FILE": str(config),
            "RABBITMQ_CONF_ENV_FILE": str(directory / "none"),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
            "RABBITMQ_LOG_BASE": str(directory / "log"),
            "RABBITMQ_MNESIA_BASE": str(directory / "data"),
            "RUNNING_UNDER_SYSTEMD": "true",  # no shell around it, which the signals would stop at
        }
        super().__init__(f"amqp://guest:guest@127.0.0.1:{port}/", directory)

    def spawn(self) -> subprocess.Popen[bytes]:
        return popen([self._server], self.log, environment=self.environment)

    def check(self) -> str:
        return checked_amqp(self.url)


@contextmanager
def started_rabbitmq(settings: str = "") -> Iterator[RabbitMQNode]:
    """Start a node.

    Args:
        settings: more lines of rabbitmq.conf.

    Raises:
        UnavailableError: this host has no RabbitMQ.
    """
    server, epmd = rabbitmq_binary("rabbitmq-server", own=True), shutil.which("epmd")
    if epmd is None:
        raise UnavailableError("no epmd on PATH")
    with temporary_directory() as directory, ExitStack() as stack:
        epmd_port = free_port()
        # our own epmd in the foreground, since the one that a node starts daemonises and stays
        command = [epmd, "-port", str(epmd_port), "-address", "127.0.0.1"]
        # it ignores SIGTERM
        stack.callback(stop, popen(command, directory / "epmd.log"), signal.SIGKILL)
        node = RabbitMQNode(server, free_port(), epmd_port, directory, settings)
        stack.callback(node.stop)
        yield node


def rabbitmq_binary(name: str, *, own: bool) -> str:
    """Path of one of RabbitMQ's commands.

    Args:
        own: whether it is for a node of ours, and so not Debian's wrapper, which would switch to
            the user rabbitmq.
    """
    unwrapped = Path("/usr/lib/rabbitmq/bin") / name
    if own and unwrapped.exists():
        return str(unwrapped)
    if path := shutil.which(name):
        return path
    raise UnavailableError(f"no {name} on PATH")


def checked_amqp(url: str) -> str:
    """The URL, if RabbitMQ answers there."""

    async def connect() -> None:
        await (await aio_pika.connect(url, timeout=5)).close()

    parts = urlsplit(url)
    try:
        # before aio-pika, which logs an error where nothing listens
        socket.create_connection((parts.hostname, parts.port or 5672), timeout=5).close()
        # in a thread of its own, as the test that needs the server may run in an event loop
        _in_thread(lambda: asyncio.run(connect()))
    except Exception as error:  # aio-pika has no root of its errors
        raise UnavailableError(f"port {parts.port}: {error!r}") from None
    return url


def _in_thread(function: Callable[[], None]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(function).result()


# --- PostgreSQL ---------------------------------------------------------------------------------


class PostgresNode(Node):
    """A PostgreSQL cluster of our own, where everybody is trusted."""

    #: The fast shutdown, which does not wait for clients.
    stop_signal = signal.SIGINT

    def __init__(self, binary: str, port: int, directory: Path, user: str | None) -> None:
        data = ["-D", str(directory / "data"), "-p", str(port), "-k", str(directory)]
        self._command = [binary, *data, "-F", "-h", "127.0.0.1"]
        self._user = user
        super().__init__(f"postgresql://postgres@127.0.0.1:{port}/postgres", directory)

    def spawn(self) -> subprocess.Popen[bytes]:
        return popen(self._command, self.log, user=self._user)

    def check(self) -> str:
        return checked_postgres(self.url)

    def kill(self) -> None:
        """Kill it with SIGKILL, with its children, each of which leads a group of its own."""
        processes = self._processes()
        self._signal(processes, signal.SIGKILL)
        self.process.wait()
        # those without a parent may stay as zombies until init looks; the next start needs the rest
        deadline = time.monotonic() + STOP_SECONDS
        while any(map(_is_alive, processes)) and time.monotonic() < deadline:
            time.sleep(0.005)

    def use_tls(self, certificate: str, key: str) -> None:
        """Offer TLS from the next start on, beside connections without it."""
        for source, name in ((certificate, "server.crt"), (key, "server.key")):
            path = self.directory / "data" / name
            shutil.copyfile(source, path)
            path.chmod(0o600)  # it takes no other one
            if self._user:
                shutil.chown(path, self._user)
        execute_sql(self.url, "ALTER SYSTEM SET ssl TO on")

    def pause(self) -> None:
        """Freeze it: connections stay, and nothing answers."""
        self._signal(self._processes(), signal.SIGSTOP)

    def resume(self) -> None:
        """Undo ``pause``."""
        self._signal(self._processes(), signal.SIGCONT)

    def _processes(self) -> list[psutil.Process]:
        """The postmaster first, so that it starts no more of the others."""
        try:
            postmaster = psutil.Process(self.process.pid)
            return [postmaster, *postmaster.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    @staticmethod
    def _signal(processes: list[psutil.Process], number: signal.Signals) -> None:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def started_postgres() -> Iterator[PostgresNode]:
    """Start a new cluster.

    Raises:
        UnavailableError: this host has no PostgreSQL, or it does not start.
    """
    places = [os.environ.get("PATH", ""), *map(str, Path("/usr/lib/postgresql").glob("*/bin"))]
    path = os.pathsep.join(places)
    initdb, postgres = shutil.which("initdb", path=path), shutil.which("postgres", path=path)
    if initdb is None or postgres is None:
        raise UnavailableError("no initdb and postgres on PATH or in /usr/lib/postgresql")
    with temporary_directory() as directory:
        user = None
        if os.geteuid() == 0:  # both refuse to run as root
            user = "postgres"
            shutil.chown(directory, user)
        command = [initdb, "-D", str(directory / "data"), "-A", "trust", "-U", "postgres"]
        done = subprocess.run(
            [*command, "--no-sync"], user=user, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise UnavailableError(f"initdb: {done.stderr.strip()}")
        node = PostgresNode(postgres, free_port(), directory, user)
        try:
            yield node
        finally:
            node.stop()


def checked_postgres(url: str) -> str:
    """The URL, if PostgreSQL answers there."""
    try:
        execute_sql(url, "SELECT 1")
    except psycopg2.Error as error:
        raise UnavailableError(str(error).strip()) from None
    return url


def execute_sql(url: str, statement: str) -> None:
    """Run one statement outside of a transaction."""
    connection = psycopg2.connect(url, connect_timeout=5)
    try:
        connection.autocommit = True  # CREATE DATABASE refuses to run in a transaction
        with connection.cursor() as cursor:
            cursor.execute(statement)
    finally:
        connection.close()
