"""``dagster-taskiq``: start workers, look after them, and see what waits and runs."""

from __future__ import annotations

import sys

import click

from dagster_taskiq.cli.database import database_sql
from dagster_taskiq.cli.options import check_platform, say_errors
from dagster_taskiq.cli.queue_orders import queue_move, queue_pause, queue_purge, queue_resume
from dagster_taskiq.cli.queues import queue
from dagster_taskiq.cli.status import status
from dagster_taskiq.cli.task_orders import task_cancel
from dagster_taskiq.cli.tasks import run, task
from dagster_taskiq.cli.worker_orders import (
    worker_pause,
    worker_queue,
    worker_reload,
    worker_resume,
    worker_slots,
    worker_terminate,
)
from dagster_taskiq.cli.worker_show import worker_ping, worker_show
from dagster_taskiq.cli.worker_start import start
from dagster_taskiq.cli.workers import worker_list
from dagster_taskiq.version import __version__


@click.group()
@click.version_option(__version__, prog_name="dagster-taskiq")
def main() -> None:
    """Run Dagster steps and runs on Taskiq workers."""


@main.command()
@say_errors
def demo() -> None:
    """Show a job on two workers. It starts what it needs, and stops it again."""
    check_platform()
    # here, as it brings the demo's job with it
    from dagster_taskiq.demo.run import run_demo  # noqa: PLC0415

    sys.exit(run_demo())


@main.group()
def worker() -> None:
    """Start, list, steer and stop workers."""


@main.group()
def database() -> None:
    """Prepare a PostgreSQL that is broker or backend."""


database.add_command(database_sql)
for _command in (
    start,
    worker_list,
    worker_show,
    worker_ping,
    worker_terminate,
    worker_reload,
    worker_pause,
    worker_resume,
    worker_slots,
    worker_queue,
):
    worker.add_command(_command)
for _command in (queue_pause, queue_resume, queue_purge, queue_move):
    queue.add_command(_command)
task.add_command(task_cancel)
for _command in (status, queue, task, run):
    main.add_command(_command)
