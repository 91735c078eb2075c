"""Where the servers of a test session come from; each is found or started once, when asked for.

The first of these: its environment variable (``VARIABLES``), a standard port of this host, a local
binary, a Docker container. Where there is none the test is skipped with the reasons, or fails if
``CI=true``. What was started is stopped at the end of the session.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import getpass
import importlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NoReturn
from urllib.parse import urlsplit

import aio_pika
import psycopg2  # type: ignore[import-untyped]
import pytest
import redis

from dagster_taskiq_tests.server_processes import (
    RedisKind,
    UnavailableError,
    attempt,
    await_answer,
    free_port,
    popen,
    started_redis,
    stop,
    temporary_directory,
)

ServerKind = Literal["redis", "valkey", "rabbitmq", "postgres"]

#: The variables that name the servers to use.
VARIABLES: Mapping[ServerKind, str] = {
    "redis": "DAGSTER_TASKIQ_TEST_REDIS_URL",
    "valkey": "DAGSTER_TASKIQ_TEST_VALKEY_URL",
    "rabbitmq": "DAGSTER_TASKIQ_TEST_RABBITMQ_URL",
    "postgres": "DAGSTER_TASKIQ_TEST_POSTGRES_URL",
}

IMAGES: Mapping[ServerKind, str] = {
    "redis": "redis:7",
    "valkey": "valkey/valkey:8",
    "rabbitmq": "rabbitmq:3-management",
    "postgres": "postgres:16",
}

#: What was started for the session; undone by ``stop_session_servers``.
at_session_end = ExitStack()
_session_pid = os.getpid()

#: How rabbitmqctl reaches a node that we started; empty for the host's own.
_node_environment: dict[str, str] = {}
#: Where RabbitMQ's management plugin listens; another port where we started a container.
_management_port = 15672


@atexit.register
def stop_session_servers() -> None:
    """Stop all that was started for the session; ``server_url`` must not be used after it."""
    if os.getpid() == _session_pid:  # not in a forked child, which inherits the list
        at_session_end.close()


def server_url(kind: ServerKind) -> str:
    """The session's server of that kind; skips or fails the test where there is none."""
    found = _locate(kind)
    if isinstance(found, str):
        return found
    reasons = "; ".join(map(str, found))
    return missing(f"No {kind} server: {reasons}. Set {VARIABLES[kind]} to name one.")


def missing(reason: str) -> NoReturn:
    """Skip the test, or fail it where everything must be there (``CI=true``)."""
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@functools.cache
def _locate(kind: ServerKind) -> str | Sequence[UnavailableError]:
    """The server's URL, or why there is none."""
    if url := os.environ.get(VARIABLES[kind]):
        return url
    return _first(_SOURCES[kind])


def _first(sources: Iterable[Callable[[], str]]) -> str | Sequence[UnavailableError]:
    """The first source's URL that there is, or every source's reason."""
    reasons = []
    for source in sources:
        found = attempt(source)
        if isinstance(found, str):
            return found
        reasons.append(found)
    return reasons


def _running_redis(kind: RedisKind) -> str:
    url = "redis://127.0.0.1:6379/0"
    try:
        with redis.Redis.from_url(url, socket_connect_timeout=2) as client:
            info = client.info("server")
    except redis.RedisError as error:
        raise UnavailableError(f"port 6379: {error}") from None
    found = "valkey" if info.get("server_name") == "valkey" else "redis"
    if found != kind:
        raise UnavailableError(f"port 6379 is {found}")
    return url


def _started_redis(kind: RedisKind) -> str:
    return at_session_end.enter_context(started_redis(kind)).url


def _checked_redis(url: str) -> str:
    try:
        with redis.Redis.from_url(url, socket_timeout=1) as client:
            client.ping()
    except redis.RedisError as error:
        raise UnavailableError(str(error)) from None
    return url


def _running_rabbitmq() -> str:
    return checked_amqp("amqp://guest:guest@127.0.0.1:5672/")


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


def _started_rabbitmq() -> str:
    port = free_port()
    url = f"amqp://guest:guest@127.0.0.1:{port}/"
    config = f"listeners.tcp.local = 127.0.0.1:{port}\n"
    _node_environment.update(start_rabbitmq(config, lambda: checked_amqp(url)))
    return url


def start_rabbitmq(config: str, check: Callable[[], str]) -> Mapping[str, str]:
    """Start a node that runs until the end of the session.

    Args:
        config: the whole rabbitmq.conf.
        check: see ``await_answer``.

    Returns:
        how rabbitmqctl reaches it.

    Raises:
        UnavailableError: RabbitMQ is not installed, or does not start.
    """
    server, epmd = _rabbitmq_binary("rabbitmq-server", own=True), shutil.which("epmd")
    if epmd is None:
        raise UnavailableError("no epmd on PATH")
    directory = _session_directory()
    epmd_port = free_port()
    file = directory / "rabbitmq.conf"  # in the place of the host's own, which may name ports
    file.write_text(config)
    environment = {
        "ERL_CRASH_DUMP": str(directory / "erl_crash.dump"),
        "ERL_EPMD_PORT": str(epmd_port),
        "HOME": str(directory),  # of the cookie
        "RABBITMQ_NODENAME": f"test-{epmd_port}@localhost",
        "RABBITMQ_CONFIG_FILE": str(file),
        "RABBITMQ_CONF_ENV_FILE": str(directory / "none"),
        "RABBITMQ_DIST_PORT": str(free_port()),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
        "RABBITMQ_LOG_BASE": str(directory / "log"),
        "RABBITMQ_MNESIA_BASE": str(directory / "data"),
        "RUNNING_UNDER_SYSTEMD": "true",  # no shell around it, which the signals would stop at
    }
    # our own epmd in the foreground, since the one that a node starts daemonises and stays
    _run_server([epmd, "-port", str(epmd_port), "-address", "127.0.0.1"], directory / "epmd.log")
    process = _run_server([server], directory / "server.log", environment=environment)
    await_answer(check, process, directory / "server.log")
    return environment


def rabbitmqctl(*arguments: str) -> None:
    """Run rabbitmqctl on the session's node.

    Raises:
        UnavailableError: it is not installed, or failed.
        subprocess.TimeoutExpired: it did not come back.
    """
    command = [_rabbitmq_binary("rabbitmqctl", own=bool(_node_environment)), *arguments]
    environment = {**os.environ, **_node_environment}
    done = subprocess.run(
        command, env=environment, check=False, capture_output=True, text=True, timeout=60
    )
    if done.returncode:
        raise UnavailableError(f"rabbitmqctl {' '.join(arguments)}: {done.stderr.strip()}")


def management_port() -> int:
    """The port of RabbitMQ's management plugin, if the session's node has it."""
    return _management_port


def _rabbitmq_binary(name: str, *, own: bool) -> str:
    """For a node of our own not Debian's wrapper, which would switch to the user rabbitmq."""
    unwrapped = Path("/usr/lib/rabbitmq/bin") / name
    if own and unwrapped.exists():
        return str(unwrapped)
    if path := shutil.which(name):
        return path
    raise UnavailableError(f"no {name} on PATH")


def _running_postgres() -> str:
    url = "postgresql://{}@127.0.0.1:5432/postgres"
    users = dict.fromkeys((getpass.getuser(), "postgres"))
    found = _first([functools.partial(_checked_postgres, url.format(user)) for user in users])
    if isinstance(found, str):
        return found
    raise UnavailableError("; ".join(map(str, found)))


def execute_sql(url: str, statement: str) -> None:
    """Run one statement outside of a transaction."""
    connection = psycopg2.connect(url, connect_timeout=5)
    try:
        connection.autocommit = True  # CREATE DATABASE refuses to run in a transaction
        with connection.cursor() as cursor:
            cursor.execute(statement)
    finally:
        connection.close()


def _checked_postgres(url: str) -> str:
    try:
        execute_sql(url, "SELECT 1")
    except psycopg2.Error as error:
        raise UnavailableError(str(error).strip()) from None
    return url


def _started_postgres() -> str:
    places = [os.environ.get("PATH", ""), *map(str, Path("/usr/lib/postgresql").glob("*/bin"))]
    path = os.pathsep.join(places)
    initdb, postgres = shutil.which("initdb", path=path), shutil.which("postgres", path=path)
    if initdb is None or postgres is None:
        raise UnavailableError("no initdb and postgres on PATH or in /usr/lib/postgresql")
    directory, port = _session_directory(), free_port()
    user = None
    if os.geteuid() == 0:  # both refuse to run as root
        user = "postgres"
        shutil.chown(directory, user)
    data = directory / "data"
    command = [initdb, "-D", str(data), "-A", "trust", "-U", "postgres", "--no-sync"]
    done = subprocess.run(command, user=user, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnavailableError(f"initdb: {done.stderr.strip()}")
    command = [postgres, "-D", str(data), "-p", str(port), "-k", str(directory), "-F"]
    process = _run_server(
        [*command, "-h", "127.0.0.1"],
        directory / "server.log",
        user=user,
        stop_signal=signal.SIGINT,  # the fast shutdown, which does not wait for clients
    )
    url = f"postgresql://postgres@127.0.0.1:{port}/postgres"
    await_answer(lambda: _checked_postgres(url), process, directory / "server.log")
    return url


def _container(kind: ServerKind, port: int, url: str, check: Callable[[str], str]) -> str:
    """Start the kind's image; ``url`` has a place for the port that Docker chose."""
    try:
        client: Any = importlib.import_module("docker").from_env()
        client.ping()
    except Exception as error:  # not installed, or no daemon: its errors have no common root
        raise UnavailableError(f"Docker: {error}") from None
    ports = {f"{number}/tcp": ("127.0.0.1", None) for number in (port, 15672)}
    container = client.containers.run(
        IMAGES[kind],
        detach=True,
        ports=ports,
        environment={"POSTGRES_HOST_AUTH_METHOD": "trust"},
    )
    at_session_end.callback(container.remove, force=True, v=True)
    container.reload()
    mapped = container.attrs["NetworkSettings"]["Ports"]
    if kind == "rabbitmq":
        global _management_port  # noqa: PLW0603
        _management_port = int(mapped["15672/tcp"][0]["HostPort"])
    located = url.format(port=mapped[f"{port}/tcp"][0]["HostPort"])
    await_answer(lambda: check(located))
    return located


_SOURCES: Mapping[ServerKind, Sequence[Callable[[], str]]] = {
    "redis": (
        lambda: _running_redis("redis"),
        lambda: _started_redis("redis"),
        lambda: _container("redis", 6379, "redis://127.0.0.1:{port}/0", _checked_redis),
    ),
    "valkey": (
        lambda: _running_redis("valkey"),
        lambda: _started_redis("valkey"),
        lambda: _container("valkey", 6379, "redis://127.0.0.1:{port}/0", _checked_redis),
    ),
    "rabbitmq": (
        _running_rabbitmq,
        _started_rabbitmq,
        lambda: _container("rabbitmq", 5672, "amqp://guest:guest@127.0.0.1:{port}/", checked_amqp),
    ),
    "postgres": (
        _running_postgres,
        _started_postgres,
        lambda: _container(
            "postgres", 5432, "postgresql://postgres@127.0.0.1:{port}/postgres", _checked_postgres
        ),
    ),
}


def _session_directory() -> Path:
    return at_session_end.enter_context(temporary_directory())


def _run_server(
    command: Sequence[str],
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    user: str | None = None,
    stop_signal: int = signal.SIGTERM,
) -> subprocess.Popen[bytes]:
    """Start a server that runs until the end of the session."""
    process = popen(command, log, environment=environment, user=user)
    at_session_end.callback(stop, process, stop_signal)
    return process
