"""Commands that look after workers that run, on whatever host."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import click

from dagster_taskiq.backend import Backend, open_backend
from dagster_taskiq.cli.celery_arguments import read_status_arguments
from dagster_taskiq.cli.options import config_yaml_option, read_settings, say_errors
from dagster_taskiq.config.settings import Settings
from dagster_taskiq.connections import find_running_backend
from dagster_taskiq.errors import ConfigError
from dagster_taskiq.messages.control import refuses, worker_order
from dagster_taskiq.messages.envelope import PROTOCOL
from dagster_taskiq.messages.worker_records import WorkerRecord
from dagster_taskiq.overview import is_named, read_workers

#: What ``worker terminate`` means without a name, as in dagster-celery.
_DEFAULT_NAME = "dagster"

_NOBODY = "No worker is running."

_name_argument = click.argument("name", required=False)

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


def _explain_names(command: F) -> F:
    """Add to a command's help how its NAME is read."""
    command.__doc__ = f"""{command.__doc__}

    NAME is a worker's name, NAME@HOST one of several workers of that name, @HOST means all workers
    of a host."""
    return command


@click.command("list")
@_name_argument
@config_yaml_option
@say_errors
@_explain_names
def worker_list(name: str | None, config_yaml: str | None) -> None:
    """List the running workers of all hosts; with NAME only those, and exit with 1 without any."""
    records = _running_workers(read_settings(config_yaml), name)
    if records:
        click.echo(_table(records))
    if name is not None and all(record.is_outdated for record in records):
        raise click.ClickException(_nobody(name))
    if not records:
        click.echo(_NOBODY)


@click.command("status")
@click.option("--app", "-A", help="Accepted for dagster-celery's command lines; it has no effect.")
@config_yaml_option
@click.argument("celery_arguments", nargs=-1, type=click.UNPROCESSED)
@say_errors
def status(app: str | None, config_yaml: str | None, celery_arguments: tuple[str, ...]) -> None:
    """Say which workers are alive, one per line, and exit with 1 without any.

    The output is that of `celery status`. A worker that was killed is listed for at most 30 s
    more. Celery's `-d NAME` may follow after --.
    """
    del app
    names = read_status_arguments(celery_arguments)
    settings = read_settings(config_yaml)
    records = [
        record
        for record in _running_workers(settings)
        if not record.is_outdated and (not names or any(is_named(record, name) for name in names))
    ]
    for record in records:
        click.echo(f"->  {record.name}: OK")
    if not records:
        raise click.ClickException(_NOBODY)
    click.echo(f"\n{len(records)} {'node' if len(records) == 1 else 'nodes'} online.")


@click.command("terminate")
@_name_argument
@click.option("--all", "-a", "all_", is_flag=True, help="Stop all workers.")
@config_yaml_option
@say_errors
@_explain_names
def worker_terminate(name: str | None, all_: bool, config_yaml: str | None) -> None:
    """Tell a worker to finish its steps and stop. Told twice, it stops now.

    Without NAME and --all it tells the worker named "dagster", as dagster-celery does. The exit
    code is 0 if no worker is running, and 1 if others are, but none of that NAME.
    """
    is_default = not name and not all_
    name = _DEFAULT_NAME if is_default else name
    for told in _tell_workers("terminate", name, all_, config_yaml, may_be_nobody=is_default):
        click.echo(f"Told {told} to stop.")


@click.command("reload")
@_name_argument
@click.option("--all", "-a", "all_", is_flag=True, help="Reload all workers.")
@config_yaml_option
@say_errors
@_explain_names
def worker_reload(name: str | None, all_: bool, config_yaml: str | None) -> None:
    """Tell a worker to run new code: its children are replaced between steps.

    The exit code is 0 if no worker is running, and 1 if others are, but none of that NAME.
    """
    for told in _tell_workers("reload", name, all_, config_yaml):
        click.echo(f"Told {told} to reload.")


def _other_protocol(record: WorkerRecord) -> str:
    return "" if record.protocol == PROTOCOL else f" (protocol {record.protocol})"


def _doubt(record: WorkerRecord) -> str:
    """Why nothing is decided by a record, for the listing; empty where it counts."""
    if record.is_outdated:
        return " (outdated)"
    return "" if record.is_trusted else " (not signed)"


def _given_back(record: WorkerRecord) -> str:
    other = record.other_backend
    return f" (gives back tasks whose backend is {other})" if other else ""


def _table(records: Sequence[WorkerRecord]) -> str:
    """The records in columns, each as wide as its longest text: nothing is ever cut."""
    rows = [("worker", "queues", "steps", "runs", "state", "pid", "version", "refused")]
    rows += [
        (
            record.name,
            ", ".join(record.queues),
            f"{record.busy_slots}/{record.slots}",
            f"{record.busy_run_slots}/{record.run_slots}",
            record.state + _given_back(record) + _doubt(record),
            str(record.pid),
            record.version + _other_protocol(record),
            str(record.refused),
        )
        for record in records
    ]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _running_workers(settings: Settings, name: str | None = None) -> list[WorkerRecord]:
    """The running workers; those of a name, where it is given."""
    return asyncio.run(_ask_backend(settings, lambda backend: read_workers(backend, name)))


def _tell_workers(
    kind: str,
    name: str | None,
    all_: bool,
    config_yaml: str | None,
    *,
    may_be_nobody: bool = False,
) -> list[str]:
    """Send an order to the workers of that name or to all; the names of those that were told.

    Args:
        may_be_nobody: whether it is no error that others run, but none of that name.
    """
    if bool(name) == all_:
        raise click.UsageError("Give either the NAME of a worker or --all.")

    settings = read_settings(config_yaml)

    async def tell(backend: Backend) -> list[str]:
        running = await backend.workers()
        records = [item for item in running if all_ or is_named(item, str(name))]
        if running and not records and not may_be_nobody:
            raise click.ClickException(_nobody(str(name)))
        refusals = [refuses(settings.signer(), record) for record in records]
        told = [it for it, refusal in zip(records, refusals, strict=True) if not refusal]
        for refusal in filter(None, refusals):
            if not told:
                raise ConfigError(f"The order to {kind} would be of no use: {refusal}")
            warnings.warn(f"Not told to {kind}: {refusal}", stacklevel=1)
        for record in told:
            await backend.send_control(
                record.worker_id, worker_order(settings.signer(), record, kind)
            )
        return [record.name for record in told]

    names = asyncio.run(_ask_backend(settings, tell))
    if not names:
        # no error, as in dagster-celery: scripts stop the workers of a host that has none
        nobody = f"{_nobody(str(name))} Give a NAME, or --all." if may_be_nobody else _NOBODY
        warnings.warn(nobody, stacklevel=1)
    return names


def _nobody(name: str) -> str:
    if name.startswith("@"):
        return f"No worker is running on host {name[1:]!r}."
    return f"No worker named {name!r} is running."


async def _ask_backend(settings: Settings, ask: Callable[[Backend], Awaitable[list[T]]]) -> list[T]:
    """What a question about workers brings; nothing where no process uses the embedded server."""
    options = find_running_backend(settings)
    if options is None:
        return []
    backend = open_backend(options, settings.signer())
    try:
        await backend.startup()
        return await ask(backend)
    finally:
        await backend.shutdown()
