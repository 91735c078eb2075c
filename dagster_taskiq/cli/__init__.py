"""``dagster-taskiq``: start workers, look after them, and see what waits and runs."""

from __future__ import annotations

import click

from dagster_taskiq.cli.later import Later
from dagster_taskiq.version import __version__


@click.group()
@click.version_option(__version__, prog_name="dagster-taskiq")
def main() -> None:
    """Run Dagster steps and runs on Taskiq workers."""


@main.group()
def worker() -> None:
    """Start, list and stop workers."""


@main.group()
def database() -> None:
    """Prepare a PostgreSQL that is broker or backend."""


# each with the first sentence of its help, so that a listing imports none of them
for _command in (
    Later("demo", "demo:demo", "Show a job on two workers."),
    Later(
        "dev",
        "dev:dev",
        "Run Dagster's UI and daemon, and a worker with all that it needs, until Ctrl-C.",
    ),
    Later(
        "completion",
        "completion:completion",
        "Print a script for a shell that completes commands, options, workers and queues.",
    ),
    Later(
        "status", "status:status", "Show the servers, the queues and the workers that are alive."
    ),
    Later("queue", "queues:queue", "Show queues."),
    Later("task", "tasks:task", "Show steps and runs that wait or are executed."),
    Later("run", "tasks:run", "Show runs in flight."),
):
    main.add_command(_command)

for _command in (
    Later("start", "worker_start:start", "Start a worker that executes steps and launched runs."),
    Later(
        "list",
        "workers:worker_list",
        "List the running workers of all hosts; with NAME only those, and exit with 1 without any.",
    ),
    Later(
        "show",
        "worker_show:worker_show",
        "Show a worker: what it runs and since when, slots, queues, version, last heard of.",
    ),
    Later(
        "ping",
        "worker_ping:worker_ping",
        "Ask a worker for a sign of life, and say how long its answer took.",
    ),
    Later("terminate", "workers:worker_terminate", "Tell a worker to finish its steps and stop."),
    Later(
        "reload",
        "workers:worker_reload",
        "Tell a worker to run new code: its children are replaced between steps.",
    ),
):
    worker.add_command(_command)

database.add_command(
    Later(
        "sql",
        "database:database_sql",
        "Print the SQL that makes all that is needed in a PostgreSQL, for a role that may not.",
    )
)
