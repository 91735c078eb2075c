"""Commands for whoever looks after the PostgreSQL that is broker or backend."""

from __future__ import annotations

import click

from dagster_taskiq.cli.options import config_yaml_option, read_settings, say_errors
from dagster_taskiq.connections import Servers, name_servers
from dagster_taskiq.errors import ConfigError
from dagster_taskiq.messages.plain_text import plain_name
from dagster_taskiq.servers.kinds import POSTGRESQL, ServerOptions
from dagster_taskiq.version import __version__

#: What makes the SQL, and the part of it for each role of a server. They need psycopg, which is not
#: there where no PostgreSQL is used.
_SCRIPT = "dagster_taskiq.servers.postgresql_schema:setup_script"
_PARTS = {
    "broker": "dagster_taskiq.brokers.postgresql:PART",
    "backend": "dagster_taskiq.backend.postgresql_schema:PART",
}


@click.command("sql")
@click.option("--role", required=True, help="The database user of workers, runs and daemon.")
@config_yaml_option
@say_errors
def database_sql(role: str, config_yaml: str | None) -> None:
    """Print the SQL that makes all that is needed in a PostgreSQL, for a role that may not.

    A database administrator executes it, with `psql -v ON_ERROR_STOP=1 -f -`, before the first
    start and before the start of each new version of this package. To execute it again is
    harmless. The settings say whether the broker, the backend or both are on PostgreSQL. Nothing
    is connected to.
    """
    servers = name_servers(read_settings(config_yaml))
    click.echo(_script(_on_postgresql(servers), role), nl=False)


def _on_postgresql(servers: Servers) -> dict[str, ServerOptions]:
    """How to reach the broker and the backend, those that are on PostgreSQL."""
    named = {"broker": servers.broker, "backend": servers.backend}
    found = {name: options for name, options in named.items() if options.kind is POSTGRESQL}
    if not found:
        raise ConfigError(
            f"Neither the broker ({servers.broker.address}) nor the backend "
            f"({servers.backend.address}) is on PostgreSQL, so there is nothing to make."
        )
    return found


def _script(found: dict[str, ServerOptions], role: str) -> str:
    parts = [options.load(_PARTS[name], name) for name, options in found.items()]
    name, one = next(iter(found.items()))
    lines = [f"For dagster-taskiq {__version__}, as the role {plain_name(role)}, in the database"]
    # of two databases each gets both parts: tables that nobody uses do no harm
    lines += dict.fromkeys(plain_name(options.address) for options in found.values())
    script = one.load(_SCRIPT, name)(one.key_prefix, parts, role)
    return "".join(f"-- {line}\n" for line in lines) + str(script)
