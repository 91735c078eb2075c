"""A place of its own on the servers for one run of the program, gone afterwards.

The servers are those of the tests: the environment variables, the standard ports, a local binary
or Docker, in this order (``dagster_taskiq_tests/server_sources.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import click
import pytest
from dagster import DagsterInstance

from benchmarks.contenders import Namespace
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq_tests.server_sources import stop_session_servers
from dagster_taskiq_tests.servers import (
    amqp_options,
    postgres_database,
    redis_options,
)


@contextmanager
def open_namespace() -> Iterator[Namespace]:
    """A database with Dagster's tables, a key prefix on Redis, a virtual host on RabbitMQ."""
    with ExitStack() as resources:
        resources.callback(stop_session_servers)
        try:
            database = resources.enter_context(postgres_database())
        except pytest.skip.Exception as reason:
            raise click.ClickException(str(reason)) from None
        redis = _if_there(resources, redis_options)
        rabbitmq = _if_there(resources, amqp_options)
        _make_tables(database)
        yield Namespace(database, redis, rabbitmq)


def _if_there(
    resources: ExitStack, make: Callable[[], AbstractContextManager[ServerOptions]]
) -> ServerOptions | None:
    try:
        return resources.enter_context(make())
    except pytest.skip.Exception as reason:
        click.echo(f"Its contenders are left out: {reason}", err=True)
        return None


def _make_tables(database: str) -> None:
    """Make them now, so that no contender's first process does."""
    overrides = {
        "telemetry": {"enabled": False},
        "storage": {"postgres": {"postgres_url": database}},
    }
    with DagsterInstance.local_temp(overrides=overrides) as instance:
        instance.get_runs(limit=1)
