"""A PostgreSQL whose users may create nothing, and the SQL with which a DBA prepares it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import urlsplit

from dagster_taskiq.cli import main
from dagster_taskiq.defaults import BROKER_URL_VARIABLE
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq_tests.cli_runner import cli_runner
from dagster_taskiq_tests.server_nodes import execute_sql
from dagster_taskiq_tests.servers import missing, postgres_database, unique_prefix

PASSWORD = "opensesame"


@contextmanager
def database_and_role() -> Iterator[tuple[str, str]]:
    """URL of a new database, and the name of a user who may create nothing there."""
    name = unique_prefix()
    with postgres_database() as url:
        execute_sql(url, f"CREATE ROLE \"{name}\" LOGIN PASSWORD '{PASSWORD}'")
        try:
            yield url, name
        finally:
            execute_sql(url, f'DROP OWNED BY "{name}"; DROP ROLE "{name}"')


def as_role(url: str, name: str) -> str:
    """The URL of the same database for the user of ``database_and_role``."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=f"{name}:{PASSWORD}@{host}").geturl()


def printed_setup(arguments: Sequence[str], broker_url: str) -> str:
    """What ``dagster-taskiq`` prints with these arguments, where a URL is broker and backend."""
    result = cli_runner().invoke(main, arguments, env={BROKER_URL_VARIABLE: broker_url})
    assert result.exit_code == 0, result.stderr
    return str(result.stdout)


def run_psql(url: str, script: str) -> None:
    """Execute a script as a DBA does."""
    psql = shutil.which("psql") or missing("no psql on PATH")
    command = [psql, "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", url, "-f", "-"]
    done = subprocess.run(command, input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@contextmanager
def prepared_postgres() -> Iterator[ServerOptions]:
    """A PostgreSQL that a DBA has prepared, for a user who may create nothing."""
    with database_and_role() as (url, name):
        mine = as_role(url, name)
        run_psql(url, printed_setup(["database", "sql", "--role", name], mine))
        yield ServerOptions(mine)
