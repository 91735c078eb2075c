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
    """Start, list, steer and stop workers."""


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
    Later(
        "doctor",
        "doctor:doctor",
        "Check what people get wrong: settings, servers, workers and Dagster's instance.",
    ),
    Later("queue", "queues:queue", "Show and steer queues."),
    Later("task", "tasks:task", "Show steps and runs that wait or are executed, and cancel them."),
    Later("run", "tasks:run", "Show runs in flight."),
    Later(
        "exporter",
        "exporter:exporter",
        "Serve metrics of queues, workers and servers for Prometheus, until it is told to stop.",
    ),
    Later(
        "dashboard",
        "dashboard:dashboard",
        "Show servers, workers, queues, runs and steps on a web page, until Ctrl-C.",
    ),
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
        "Show a worker: what it runs and since when, slots, queues, versions, last heard of.",
    ),
    Later(
        "ping",
        "worker_ping:worker_ping",
        "Ask a worker for a sign of life, and say how long its answer took.",
    ),
    Later(
        "terminate", "worker_orders:worker_terminate", "Tell a worker to finish its steps and stop."
    ),
    Later(
        "reload",
        "worker_orders:worker_reload",
        "Tell a worker to run new code: its children are replaced between steps.",
    ),
    Later(
        "pause",
        "worker_orders:worker_pause",
        "Have a worker take no new tasks until it is resumed; what runs goes on.",
    ),
    Later(
        "resume", "worker_orders:worker_resume", "Have a worker take tasks again that was paused."
    ),
    Later(
        "slots",
        "worker_orders:worker_slots",
        "Give a worker another number of slots, until it is restarted.",
    ),
    Later("queue", "worker_orders:worker_queue", "Change on which queues a worker listens."),
):
    worker.add_command(_command)

database.add_command(
    Later(
        "sql",
        "database:database_sql",
        "Print the SQL that makes all that is needed in a PostgreSQL, for a role that may not.",
    )
)
