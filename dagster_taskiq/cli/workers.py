"""Commands that look after workers that run, on whatever host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from dagster_taskiq.cli.asking import read_workers
from dagster_taskiq.cli.finding import no_worker
from dagster_taskiq.cli.options import config_yaml_option, read_settings, say_errors
from dagster_taskiq.cli.shapes import worker_shape
from dagster_taskiq.cli.tables import echo_json, echo_table, json_option
from dagster_taskiq.messages.envelope import PROTOCOL
from dagster_taskiq.messages.worker_records import WorkerRecord
from dagster_taskiq.overview import is_named

NOBODY = "No worker is running."

_name_argument = click.argument("name", required=False)

F = TypeVar("F", bound=Callable[..., Any])


def explain_names(command: F) -> F:
    """Add to a command's help how its NAME is read."""
    command.__doc__ = f"""{command.__doc__}

    NAME is a worker's name, NAME@HOST one of several workers of that name, @HOST means all workers
    of a host. Each may be a pattern, in quotes: 'short-*'."""
    return command


@click.command("list")
@_name_argument
@json_option
@config_yaml_option
@say_errors
@explain_names
def worker_list(name: str | None, as_json: bool, config_yaml: str | None) -> None:
    """List the running workers of all hosts; with NAME only those, and exit with 1 without any."""
    running = read_workers(read_settings(config_yaml))
    records = [it for it in running if name is None or is_named(it, name)]
    if as_json:
        echo_json({"workers": list(map(worker_shape, records))})
    elif records:
        echo_table(_rows(records))
    if name is not None and all(record.is_outdated for record in records):
        raise click.ClickException(no_worker(name, running))
    if not records and not as_json:
        click.echo(NOBODY)


def _other_protocol(record: WorkerRecord) -> str:
    return "" if record.protocol == PROTOCOL else f" (protocol {record.protocol})"


def state_of(record: WorkerRecord) -> str:
    """A worker's state, with what is to be said about it or about its record."""
    other = record.other_backend
    given_back = f" (gives back tasks whose backend is {other})" if other else ""
    if record.is_outdated:
        return f"{record.state}{given_back} (outdated)"
    return record.state + given_back + ("" if record.is_trusted else " (not signed)")


def _rows(records: Sequence[WorkerRecord]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("worker", "queues", "steps", "runs", "state", "pid", "version", "refused")
    ]
    return rows + [
        (
            record.name,
            ", ".join(record.queues),
            f"{record.busy_slots}/{record.slots}",
            f"{record.busy_run_slots}/{record.run_slots}",
            state_of(record),
            str(record.pid),
            record.version + _other_protocol(record),
            str(record.refused),
        )
        for record in records
    ]
