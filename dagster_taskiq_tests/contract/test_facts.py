"""How real servers say that they are set."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping

import psycopg
import pytest

from dagster_taskiq.errors import UnreachableServerError
from dagster_taskiq.servers.facts import PostgresqlFacts, RedisFacts, read_facts
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq_tests.server_processes import free_port
from dagster_taskiq_tests.servers import postgres_options, private_redis

#: How far the clock of a server on this machine may seem to be off on a loaded one.
CLOCK_SECONDS = 20.0


def facts_of(options: ServerOptions) -> object:
    return asyncio.run(read_facts(options, "backend"))


def test_a_redis_says_how_it_is_set() -> None:
    """As it comes, and as it is configured."""
    with private_redis(settings={"appendonly": "no"}) as server:
        found = facts_of(ServerOptions(server.url))
        assert isinstance(found, RedisFacts)
        assert (found.role, found.is_cluster, found.has_log) == ("master", False, False)
        assert (found.memory_limit_bytes, found.eviction) == (0, "noeviction")
        assert abs(found.clock - time.time()) < CLOCK_SECONDS
    settings: Mapping[str, str] = {
        "appendonly": "yes",
        "maxmemory": "100mb",
        "maxmemory-policy": "allkeys-lru",
        "cluster-enabled": "yes",
        "cluster-port": str(free_port()),  # else 10,000 above the port, which may be too high
    }
    with private_redis(settings=settings) as server:
        found = facts_of(ServerOptions(server.url))
        assert isinstance(found, RedisFacts)
        assert (found.is_cluster, found.has_log) == (True, True)
        assert (found.memory_limit_bytes, found.eviction) == (100 * 2**20, "allkeys-lru")


@pytest.fixture
def options() -> Iterator[ServerOptions]:
    """Of a PostgreSQL."""
    with postgres_options() as found:
        yield found


def test_a_postgresql_says_how_it_is_set(options: ServerOptions) -> None:
    """Also what is set for a user or a connection alone."""
    found = facts_of(options)
    assert isinstance(found, PostgresqlFacts)
    assert found.version > 100_000
    assert found.max_connections > 10
    assert (found.is_standby, found.is_read_only, found.is_pooled) == (False, False, False)
    assert abs(found.clock - time.time()) < CLOCK_SECONDS
    mark = "&" if "?" in options.url else "?"
    url = f"{options.url}{mark}options=-cdefault_transaction_read_only%3Don"
    found = facts_of(ServerOptions(url))
    assert isinstance(found, PostgresqlFacts)
    assert found.is_read_only


def test_a_pooler_is_noticed(options: ServerOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the number that it gives the connection, which is not the server process's."""
    monkeypatch.setattr(psycopg.ConnectionInfo, "backend_pid", property(lambda _: 1))
    found = facts_of(options)
    assert isinstance(found, PostgresqlFacts)
    assert found.is_pooled


@pytest.mark.parametrize("url", ["redis://localhost:1", "postgresql://localhost:1/x"])
def test_a_server_that_is_away_tells_nothing(url: str) -> None:
    with pytest.raises(UnreachableServerError):
        facts_of(ServerOptions(url))


def test_a_rabbitmq_is_not_asked() -> None:
    assert facts_of(ServerOptions("amqp://localhost:1")) is None
