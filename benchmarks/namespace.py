"""The servers of a program run: a place of its own on shared servers, or servers of its own.

The shared servers are those of the tests: the environment variables, the standard ports, a local
binary or Docker, in this order (``dagster_taskiq_tests/server_sources.py``).
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TypeVar

import click
import pytest
import redis
from dagster import DagsterInstance

from benchmarks.contenders import Namespace
from benchmarks.processes import FailedError
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq_tests.servers import (
    amqp_options,
    postgres_database,
    private_redis,
    redis_options,
)

_Server = TypeVar("_Server")


@contextmanager
def needed(server: AbstractContextManager[_Server]) -> Iterator[_Server]:
    """A server of the tests without which a measurement cannot be made.

    Raises:
        FailedError: the server is not there; a test would be skipped.
    """
    with ExitStack() as resources:
        try:
            opened = resources.enter_context(server)
        except pytest.skip.Exception as reason:
            raise FailedError(str(reason)) from None
        yield opened


@contextmanager
def own_redis() -> Iterator[ServerOptions]:
    """A Redis for one measurement alone, with an append-only file and room for connections."""
    with needed(private_redis("redis", settings={"maxclients": "60000"})) as server:
        yield server.options


@contextmanager
def given_redis(url: str) -> Iterator[ServerOptions]:
    """A key prefix of its own on somebody's server; its keys are deleted afterwards."""
    options = ServerOptions(url=url, key_prefix=f"scale-{uuid.uuid4().hex}")
    try:
        yield options
    finally:
        with redis.Redis.from_url(url) as client:
            for key in client.scan_iter(match=f"{options.key_prefix}*", count=1000):
                client.unlink(key)


@contextmanager
def open_namespace() -> Iterator[Namespace]:
    """A database with Dagster's tables, a key prefix on Redis, a virtual host on RabbitMQ."""
    with ExitStack() as resources:
        database = resources.enter_context(needed(postgres_database()))
        found: list[ServerOptions | None] = []
        for server in (redis_options(), amqp_options()):
            try:
                found.append(resources.enter_context(needed(server)))
            except FailedError as reason:
                click.echo(f"Its contenders are left out: {reason}", err=True)
                found.append(None)
        _make_tables(database)
        yield Namespace(database, *found)


def _make_tables(database: str) -> None:
    """Make them now, so that no contender's first process does."""
    overrides = {
        "telemetry": {"enabled": False},
        "storage": {"postgres": {"postgres_url": database}},
    }
    with DagsterInstance.local_temp(overrides=overrides) as instance:
        instance.get_runs(limit=1)
