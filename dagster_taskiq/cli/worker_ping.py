"""``worker ping``: a health check, which imports neither Dagster nor Taskiq.

Dagster is imported after all where the servers are found by a dagster.yaml that names a storage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import click

from dagster_taskiq.backend import Backend
from dagster_taskiq.cli.asking import ask_backend
from dagster_taskiq.cli.completing import complete_worker
from dagster_taskiq.cli.finding import explain_names, no_worker
from dagster_taskiq.cli.options import config_yaml_option, read_settings, say_errors, timeout_option
from dagster_taskiq.cli.tables import plain_line
from dagster_taskiq.errors import DagsterTaskiqError
from dagster_taskiq.messages.control import OrderKind
from dagster_taskiq.messages.worker_records import WorkerRecord, is_named
from dagster_taskiq.steering.workers import answers_of, give_order


@click.command("ping")
@click.argument("name", shell_complete=complete_worker)
@timeout_option
@config_yaml_option
@say_errors
@explain_names
def worker_ping(name: str, timeout: float, config_yaml: str | None) -> None:
    """Ask a worker for a sign of life, and say how long its answer took.

    The exit code is 1 where it does not answer in time, or one of several does not.
    """
    settings = read_settings(config_yaml)

    async def ping(backend: Backend) -> tuple[Sequence[WorkerRecord], Mapping[str, float]]:
        running = await backend.workers()
        named = [it for it in running if is_named(it, name)]
        if not named:
            raise DagsterTaskiqError(no_worker(name, running))
        told = await give_order(backend, settings.signer(), named, OrderKind.PING)
        for refusal in told.refusals:
            raise DagsterTaskiqError(f"The ping would be of no use: {refusal}")
        return named, await answers_of(backend, told, timeout)

    records, seconds = ask_backend(settings, ping) or ([], {})
    for record in records:
        if record.worker_id in seconds:
            milliseconds = 1000 * seconds[record.worker_id]
            click.echo(plain_line(f"{record.name} has answered within {milliseconds:.0f} ms."))
    silent = ", ".join(it.name for it in records if it.worker_id not in seconds)
    if silent or not records:
        has_not = plain_line(f"No answer within {timeout:g} s from {silent}.")
        raise DagsterTaskiqError(has_not if silent else no_worker(name, []))
