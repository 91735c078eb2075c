"""Servers for tests: a fresh namespace on one for each test, or one that belongs to the test.

Where they come from, and what happens where there is none: ``server_sources.py``.
"""

from __future__ import annotations

import base64
import functools
import subprocess
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import TypeVar
from urllib.parse import urlsplit

import redis

from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq.servers.postgresql_schema import schema_name
from dagster_taskiq.servers.urls import normalize_amqp
from dagster_taskiq_tests.server_nodes import (
    PostgresNode,
    RabbitMQNode,
    checked_amqp,
    execute_sql,
    started_postgres,
    started_rabbitmq,
)
from dagster_taskiq_tests.server_processes import (
    PrivateRedis,
    RedisKind,
    UnavailableError,
    started_redis,
)
from dagster_taskiq_tests.server_sources import (
    at_session_end,
    management_port,
    missing,
    rabbitmqctl,
    server_url,
)

__all__ = [
    "PostgresNode",
    "PrivateRedis",
    "RabbitMQNode",
    "amqp_options",
    "crashable_postgres",
    "postgres_database",
    "postgres_options",
    "private_postgres",
    "private_rabbitmq",
    "private_redis",
    "redis_options",
    "valkey_options",
]

_Server = TypeVar("_Server")


@contextmanager
def redis_options() -> Iterator[ServerOptions]:
    """A key prefix of its own on a Redis server; its keys are deleted afterwards."""
    with _own_keys("redis") as options:
        yield options


@contextmanager
def valkey_options() -> Iterator[ServerOptions]:
    """A key prefix of its own on a Valkey server; its keys are deleted afterwards."""
    with _own_keys("valkey") as options:
        yield options


@contextmanager
def amqp_options() -> Iterator[ServerOptions]:
    """A queue prefix of its own on RabbitMQ, in a virtual host of this session.

    Where virtual hosts cannot be made, it is the URL's own, and the queues of the prefix stay.
    """
    yield ServerOptions(url=_session_vhost(server_url("rabbitmq")), key_prefix=unique_prefix())


@contextmanager
def postgres_database() -> Iterator[str]:
    """URL of a new, empty PostgreSQL database, which is dropped afterwards."""
    server = server_url("postgres")
    name = unique_prefix().replace("-", "_")
    execute_sql(server, f'CREATE DATABASE "{name}"')
    try:
        yield urlsplit(server)._replace(path=f"/{name}").geturl()
    finally:
        execute_sql(server, f'DROP DATABASE "{name}" WITH (FORCE)')


@contextmanager
def postgres_options(key_prefix: str | None = None) -> Iterator[ServerOptions]:
    """A schema on a PostgreSQL server, which is dropped afterwards.

    Args:
        key_prefix: of the broker beside it; None for one of its own.
    """
    with _own_schema(server_url("postgres"), key_prefix) as options:
        yield options


@contextmanager
def crashable_postgres(
    key_prefix: str | None = None,
) -> Iterator[tuple[PostgresNode, ServerOptions]]:
    """A schema of the test's own on the session's own cluster, which may be killed and frozen.

    A new cluster takes seconds, so that tests share one; each leaves it running.
    """
    node = _session_cluster()
    if node.process.poll() is not None:
        node.restart()
    with _own_schema(node.url, key_prefix) as options:
        try:
            yield node, options
        finally:
            node.resume()
            if node.process.poll() is not None:
                node.restart()


@functools.cache
def _session_cluster() -> PostgresNode:
    return at_session_end.enter_context(_or_missing(started_postgres()))


@contextmanager
def _own_schema(url: str, key_prefix: str | None) -> Iterator[ServerOptions]:
    options = ServerOptions(url=url, key_prefix=key_prefix or unique_prefix())
    try:
        yield options
    finally:
        execute_sql(url, f'DROP SCHEMA IF EXISTS "{schema_name(options.key_prefix)}" CASCADE')


@contextmanager
def private_redis(
    kind: RedisKind | None = None,
    *,
    unix_socket: bool = False,
    password: str | None = None,
    settings: Mapping[str, str] | None = None,
) -> Iterator[PrivateRedis]:
    """A server of the test's own, to be killed, restarted and frozen; its data goes with it.

    Args:
        kind: None takes what this host has, Valkey first.
        unix_socket: listen on a socket file and no TCP port.
        password: of the default user.
        settings: lines of redis.conf; by default it has an append-only file, synced every second.
    """
    start = started_redis(kind, unix_socket=unix_socket, password=password, settings=settings)
    with _or_missing(start) as server:
        yield server


@contextmanager
def private_rabbitmq() -> Iterator[RabbitMQNode]:
    """A RabbitMQ node of the test's own, to be killed and restarted."""
    with _or_missing(started_rabbitmq()) as node:
        yield node


@contextmanager
def private_postgres() -> Iterator[PostgresNode]:
    """A PostgreSQL cluster of the test's own, to be killed and restarted."""
    with _or_missing(started_postgres()) as node:
        yield node


@contextmanager
def _or_missing(start: AbstractContextManager[_Server]) -> Iterator[_Server]:
    with ExitStack() as stack:
        try:
            server = stack.enter_context(start)
        except UnavailableError as error:
            missing(str(error))
        yield server


def unique_prefix() -> str:
    """A name that no other test, session or developer uses."""
    return f"test-{uuid.uuid4().hex}"


@contextmanager
def _own_keys(kind: RedisKind) -> Iterator[ServerOptions]:
    options = ServerOptions(url=server_url(kind), key_prefix=unique_prefix())
    try:
        yield options
    finally:
        with redis.Redis.from_url(options.url) as client:
            keys = list(client.scan_iter(match=f"*{options.key_prefix}*", count=1000))
            if keys:
                client.unlink(*keys)


@functools.cache
def _session_vhost(url: str) -> str:
    """The URL of a new virtual host of that server, or the URL itself where none can be made."""
    url = normalize_amqp(url)
    name = f"dagster-taskiq-{unique_prefix()}"
    for add in (_add_by_command, _add_by_http):
        with suppress(OSError, subprocess.SubprocessError, UnavailableError):
            add(url, name)
            return checked_amqp(urlsplit(url)._replace(path=f"/{name}").geturl())
    return url


def _add_by_command(url: str, name: str) -> None:
    if urlsplit(url).hostname not in ("127.0.0.1", "localhost", "::1"):
        raise UnavailableError("rabbitmqctl reaches only a node of this host")
    rabbitmqctl("add_vhost", name)
    at_session_end.callback(rabbitmqctl, "delete_vhost", name)
    user = urlsplit(url).username or "guest"
    rabbitmqctl("set_permissions", "-p", name, user, ".*", ".*", ".*")


def _add_by_http(url: str, name: str) -> None:
    # the management plugin gives the user that adds a virtual host all rights there
    _management(url, "PUT", f"vhosts/{name}", b"{}")
    at_session_end.callback(_management, url, "DELETE", f"vhosts/{name}")


def _management(url: str, method: str, path: str, body: bytes | None = None) -> None:
    parts = urlsplit(url)
    login = f"{parts.username or 'guest'}:{parts.password or 'guest'}".encode()
    headers = {
        "Authorization": f"Basic {base64.b64encode(login).decode()}",
        "Content-Type": "application/json",
    }
    address = f"http://{parts.hostname}:{management_port()}/api/{path}"
    request = urllib.request.Request(address, body, headers, method=method)
    with urllib.request.urlopen(request, timeout=5):
        pass
