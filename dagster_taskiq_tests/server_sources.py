"""Where the servers of a test session come from; each is found or started once, when asked for.

The first of these: its environment variable (``VARIABLES``), a standard port of this host, a local
binary, a Docker container. Where there is none the test is skipped with the reasons, or fails if
``CI=true``. What was started is stopped at the end of the session.
"""

from __future__ import annotations

import atexit
import functools
import getpass
import importlib
import os
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, NoReturn

import pytest
import redis

from dagster_taskiq_tests.server_nodes import (
    checked_amqp,
    checked_postgres,
    rabbitmq_binary,
    started_postgres,
    started_rabbitmq,
)
from dagster_taskiq_tests.server_processes import (
    RedisKind,
    UnavailableError,
    attempt,
    await_answer,
    started_redis,
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


def _started_rabbitmq() -> str:
    node = at_session_end.enter_context(started_rabbitmq())
    _node_environment.update(node.environment)
    return node.url


def rabbitmqctl(*arguments: str) -> None:
    """Run rabbitmqctl on the session's node.

    Raises:
        UnavailableError: it is not installed, or failed.
        subprocess.TimeoutExpired: it did not come back.
    """
    command = [rabbitmq_binary("rabbitmqctl", own=bool(_node_environment)), *arguments]
    environment = {**os.environ, **_node_environment}
    done = subprocess.run(
        command, env=environment, check=False, capture_output=True, text=True, timeout=60
    )
    if done.returncode:
        raise UnavailableError(f"rabbitmqctl {' '.join(arguments)}: {done.stderr.strip()}")


def management_port() -> int:
    """The port of RabbitMQ's management plugin, if the session's node has it."""
    return _management_port


def _running_postgres() -> str:
    url = "postgresql://{}@127.0.0.1:5432/postgres"
    users = dict.fromkeys((getpass.getuser(), "postgres"))
    found = _first([functools.partial(checked_postgres, url.format(user)) for user in users])
    if isinstance(found, str):
        return found
    raise UnavailableError("; ".join(map(str, found)))


def _started_postgres() -> str:
    return at_session_end.enter_context(started_postgres()).url


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
            "postgres", 5432, "postgresql://postgres@127.0.0.1:{port}/postgres", checked_postgres
        ),
    ),
}
