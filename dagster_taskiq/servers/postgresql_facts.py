"""How a PostgreSQL is set."""

from __future__ import annotations

from contextlib import closing

from dagster_taskiq.servers.facts import PostgresqlFacts
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq.servers.postgresql_client import Connections, server_errors
from dagster_taskiq.servers.postgresql_pool import Connection

_QUESTION = """\
SELECT current_setting('server_version_num')::int,
  current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int,
  pg_is_in_recovery(),
  current_setting('default_transaction_read_only') = 'on',
  current_setting('fsync') = 'on',
  pg_backend_pid(),
  extract(epoch FROM clock_timestamp())::float8"""


async def read_postgresql_facts(options: ServerOptions) -> PostgresqlFacts:
    """See ``facts.read_facts``."""
    pid = 0

    async def greet(connection: Connection) -> None:
        nonlocal pid
        pid = connection.info.backend_pid

    with server_errors(options.address), closing(Connections(options, greet)) as connections:
        (
            (version, most, is_standby, is_read_only, has_fsync, true_pid, clock),
        ) = await connections.call(_QUESTION)
    return PostgresqlFacts(
        version=version,
        max_connections=most,
        is_standby=is_standby,
        is_read_only=is_read_only,
        has_fsync=has_fsync,
        # a pooler makes up a number of its own, to cancel by
        is_pooled=pid != true_pid,
        clock=clock,
    )
