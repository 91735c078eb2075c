"""Commands that look after workers that run, on whatever host."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import click

from dagster_taskiq.backend import Backend, WorkerRecord, open_backend
from dagster_taskiq.cli.options import config_yaml_option, read_settings, say_errors
from dagster_taskiq.config import Settings
from dagster_taskiq.connections import find_running_backend
from dagster_taskiq.control import refuses, worker_order
from dagster_taskiq.errors import ConfigError


@click.command("list")
@config_yaml_option
@say_errors
def worker_list(config_yaml: str | None) -> None:
    """List the running workers, on all hosts."""
    records = asyncio.run(_with_backend(read_settings(config_yaml), lambda it: it.workers()))
    if not records:
        click.echo("No worker is running.")
        return
    # here, as a worker that starts has no use for it
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(
        "worker",
        "queues",
        "steps",
        "runs",
        "state",
        "pid",
        "version",
        "refused",
        box=None,
        padding=(0, 2, 0, 0),
    )
    for record in records:
        table.add_row(
            record.name,
            ", ".join(record.queues),
            f"{record.busy_slots}/{record.slots}",
            f"{record.busy_run_slots}/{record.run_slots}",
            record.state,
            str(record.pid),
            record.version,
            str(record.refused),
        )
    Console(soft_wrap=True).print(table)


@click.command("terminate")
@click.argument("name", required=False)
@click.option("--all", "-a", "all_", is_flag=True, help="Stop all workers.")
@config_yaml_option
@say_errors
def worker_terminate(name: str | None, all_: bool, config_yaml: str | None) -> None:
    """Tell a worker, on whatever host, to finish its steps and stop. Twice: to stop now."""
    for told in _tell_workers("terminate", name, all_, config_yaml):
        click.echo(f"Told {told} to stop.")


@click.command("reload")
@click.argument("name", required=False)
@click.option("--all", "-a", "all_", is_flag=True, help="Reload all workers.")
@config_yaml_option
@say_errors
def worker_reload(name: str | None, all_: bool, config_yaml: str | None) -> None:
    """Tell a worker, on whatever host, to run new code: its children are replaced between steps."""
    for told in _tell_workers("reload", name, all_, config_yaml):
        click.echo(f"Told {told} to reload.")


def _tell_workers(kind: str, name: str | None, all_: bool, config_yaml: str | None) -> list[str]:
    """Send a control message to the worker of that name or to all; the names of who was told."""
    if bool(name) == all_:
        raise click.UsageError("Give either the NAME of a worker or --all.")

    settings = read_settings(config_yaml)

    async def tell(backend: Backend) -> list[str]:
        records = [item for item in await backend.workers() if all_ or _is_named(item, str(name))]
        for record in records:
            await _send_order(backend, settings, record, kind)
        return [record.name for record in records]

    names: list[str] = asyncio.run(_with_backend(settings, tell))
    if not names:
        what = "No worker is running." if all_ else f"No worker named {name!r} is running."
        raise click.ClickException(what)
    return names


async def _send_order(
    backend: Backend, settings: Settings, record: WorkerRecord, kind: str
) -> None:
    signer = settings.signer()
    if reason := refuses(signer, record):
        raise ConfigError(f"The order to {kind} would be of no use: {reason}")
    await backend.send_control(record.worker_id, worker_order(signer, record.worker_id, kind))


def _is_named(record: WorkerRecord, name: str) -> bool:
    return name in (record.name, record.name.partition("@")[0])


async def _with_backend(settings: Settings, use: Callable[[Backend], Any]) -> Any:
    options = find_running_backend(settings)
    if options is None:
        return []  # nobody uses the embedded server, so there is no worker either
    backend = open_backend(options)
    try:
        await backend.startup()
        return await use(backend)
    finally:
        await backend.shutdown()
