"""Where a soak takes place: servers of its own, two DAGSTER_HOMEs, workers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal
from unittest.mock import patch
from urllib.parse import unquote, urlsplit

import psutil
import psycopg2  # type: ignore[import-untyped]
import redis
import yaml
from dagster import DagsterInstance

from dagster_taskiq.servers.embedded.server import release_embedded_server, use_embedded_server
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq.servers.postgresql_schema import schema_name
from dagster_taskiq_tests.acceptance.harness import DAGSTER_YAML, Stack, closed_stacks
from dagster_taskiq_tests.acceptance.launched import launching_settings
from dagster_taskiq_tests.proxy import Proxy, proxied
from dagster_taskiq_tests.server_nodes import PostgresNode, execute_sql
from dagster_taskiq_tests.server_sources import rabbitmqctl
from dagster_taskiq_tests.servers import (
    PrivateRedis,
    amqp_options,
    crashable_postgres,
    postgres_database,
    private_redis,
    redis_options,
)
from dagster_taskiq_tests.soak.jobs import POOL, POOL_SLOTS

Kind = Literal["redis", "embedded", "rabbitmq", "rabbitmq+postgres", "redis+postgres", "postgres"]

#: Of claims and runs: short, so that much happens in ten minutes, and long enough for a machine
#: on which much else runs.
LEASE_SECONDS = 5.0
GRACE_SECONDS = 5.0

#: How often a run is resumed.
RESUMES = 3

#: The instance's settings without the proxy before its database, for whoever watches the soak.
WATCHERS_YAML = "watchers.yaml"


class EmbeddedServer:
    """The embedded server of the soak's DAGSTER_HOME."""

    def __init__(self, home: Path) -> None:
        self._home = home

    def client(self) -> redis.Redis:
        """A connection."""
        path = unquote(urlsplit(use_embedded_server(self._home)).path)
        return redis.Redis(unix_socket_path=path)

    @property
    def _server(self) -> list[psutil.Process]:
        return [p for p in self._processes() if "valkey-server" in p.name() or "redis" in p.name()]

    @property
    def _keeper(self) -> list[psutil.Process]:
        return [p for p in self._processes() if p not in self._server]

    def _processes(self) -> list[psutil.Process]:
        directory = str((self._home / "dagster_taskiq").resolve())
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                names = process.name(), " ".join(process.cmdline())
                is_ours = "embedded/keeper.py" in names[1] or "-server" in names[0]
                if is_ours and process.cwd() == directory:
                    found.append(process)
        return found

    def kill(self) -> None:
        """Kill it; its keeper starts it again."""
        for process in self._server:
            process.kill()

    def kill_keeper(self) -> None:
        """Kill the keeper, and the server with it; whoever needs them starts them again."""
        for process in self._keeper:
            process.kill()

    def flush(self) -> None:
        """Delete all that it keeps."""
        with self.client() as client:
            client.flushall()

    def pause(self) -> None:
        """Freeze it: connections stay, and nothing answers."""
        for process in self._server:
            process.suspend()

    def resume(self) -> None:
        """Undo ``pause``."""
        for process in self._server:
            process.resume()

    def close(self) -> None:
        """Be no user of it any more."""
        release_embedded_server(self._home)


class PostgresServer:
    """A PostgreSQL cluster that is the backend, and perhaps the broker."""

    def __init__(self, node: PostgresNode, options: ServerOptions, *, is_broker: bool) -> None:
        self._node = node
        self._tables = "runs tasks results orders workers history counts batches".split()
        if is_broker:
            self._tables.append("messages")
        self._schema = f'"{schema_name(options.key_prefix)}"'

    def kill(self) -> None:
        """Kill it, which loses what was not on the disk yet."""
        self._node.kill()

    def restart(self) -> None:
        """Start it again."""
        self._node.restart()

    def pause(self) -> None:
        """Freeze it: connections stay, and nothing answers."""
        self._node.pause()

    def resume(self) -> None:
        """Undo ``pause``."""
        self._node.resume()

    def flush(self) -> None:
        """Delete all that it keeps."""
        tables = ", ".join(f"{self._schema}.{name}" for name in self._tables)
        execute_sql(self._node.url, f"TRUNCATE {tables}")

    def count(self, rows: str) -> int:
        """How many rows there are of a table, perhaps with a condition."""
        connection = psycopg2.connect(self._node.url)
        with closing(connection), connection.cursor() as cursor:
            cursor.execute(f"SELECT count(*) FROM {self._schema}.{rows}")
            return int(cursor.fetchone()[0])


#: What keeps the state: a Redis, which is perhaps the broker too, or a PostgreSQL.
Server = PrivateRedis | EmbeddedServer | PostgresServer


@contextmanager
def open_soak_stack(kind: Kind, directory: Path) -> Iterator[tuple[Stack, Path, Server, Proxy]]:
    """The stack, the home of runs that are not resumed, the server that keeps the state, and the
    proxy that runs and workers reach Dagster's database by."""
    home, other_home = directory / "home", directory / "other-home"
    with ExitStack() as resources:
        database = resources.enter_context(postgres_database())
        database_proxy = resources.enter_context(proxied(database))
        broker, backend, server = _servers(kind, resources, home)
        for path in (home, other_home):
            path.mkdir()
            _write_settings(path / "dagster.yaml", database_proxy.url)
        if kind == "embedded":
            # one server for both
            (home / "dagster_taskiq").mkdir(mode=0o700)
            (other_home / "dagster_taskiq").symlink_to(home / "dagster_taskiq")
        resources.enter_context(patch.dict(os.environ, DAGSTER_HOME=str(home)))
        stack = Stack(home, broker, backend, directory)
        closed_stacks.append(stack.mark)
        resources.enter_context(stack.exit_stack)
        _write_settings(home / "dagster.yaml", database_proxy.url, _launching(stack))
        _write_settings(home / WATCHERS_YAML, database, _launching(stack))
        stack.instance = resources.enter_context(open_watchers_instance(home))
        stack.instance.event_log_storage.set_concurrency_slots(POOL, POOL_SLOTS)
        yield stack, other_home, server, database_proxy


def open_watchers_instance(home: Path) -> DagsterInstance:
    """The instance for the soak itself and Dagster's monitoring: no fault takes its database away.

    Runs and workers that are told of it by its directory read that directory's dagster.yaml.
    """
    return DagsterInstance.from_config(str(home), WATCHERS_YAML)


def _write_settings(
    path: Path, database: str, more: Mapping[str, Any] = MappingProxyType({})
) -> None:
    settings = {"storage": {"postgres": {"postgres_url": database}}, **DAGSTER_YAML, **more}
    path.write_text(yaml.safe_dump(settings))


def _servers(
    kind: Kind, resources: ExitStack, home: Path
) -> tuple[ServerOptions | None, ServerOptions | None, Server]:
    if kind == "embedded":
        embedded = EmbeddedServer(home)
        resources.callback(embedded.close)
        return None, None, embedded
    if kind in ("rabbitmq+postgres", "redis+postgres"):
        is_redis = kind == "redis+postgres"
        broker = resources.enter_context(redis_options() if is_redis else amqp_options())
        node, options = resources.enter_context(crashable_postgres(broker.key_prefix))
        return broker, options, PostgresServer(node, options, is_broker=False)
    if kind == "postgres":
        node, options = resources.enter_context(crashable_postgres())
        return options, None, PostgresServer(node, options, is_broker=True)
    server = resources.enter_context(private_redis())
    if kind == "redis":
        return server.options, None, server
    url = resources.enter_context(amqp_options()).url
    return ServerOptions(url=url, key_prefix=server.options.key_prefix), server.options, server


def close_broker_connections(stack: Stack) -> None:
    """What RabbitMQ does to its clients when it restarts."""
    rabbitmqctl("close_all_connections", "--vhost", _vhost(stack), "a fault of the soak")


def refuse_broker_connections(stack: Stack) -> None:
    """Have RabbitMQ end the connections of the virtual host and refuse new ones."""
    rabbitmqctl("set_vhost_limits", "--vhost", _vhost(stack), '{"max-connections": 0}')
    close_broker_connections(stack)


def accept_broker_connections(stack: Stack) -> None:
    """Have RabbitMQ take connections again; also where it does already, after faults in a row."""
    rabbitmqctl("set_vhost_limits", "--vhost", _vhost(stack), '{"max-connections": -1}')


def _vhost(stack: Stack) -> str:
    assert stack.broker is not None
    return unquote(urlsplit(stack.broker.url).path[1:])


def _launching(stack: Stack) -> dict[str, Any]:
    times = {"lease_seconds": LEASE_SECONDS, "cancel_grace_seconds": GRACE_SECONDS}
    settings = launching_settings(stack, RESUMES, times)
    # longer than the database is away
    settings["run_monitoring"] |= {"start_timeout_seconds": 150, "cancel_timeout_seconds": 90}
    return settings
