"""Commands that look after workers that run, on whatever host."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from dagster_taskiq.backend import Backend
from dagster_taskiq.cli.asking import ask_backend, read_workers
from dagster_taskiq.cli.finding import no_worker
from dagster_taskiq.cli.options import config_yaml_option, read_settings, say_errors
from dagster_taskiq.cli.shapes import worker_shape
from dagster_taskiq.cli.tables import (
    DASH,
    echo_json,
    echo_table,
    fits,
    json_option,
    size_in_words,
    time_since,
)
from dagster_taskiq.errors import ConfigError
from dagster_taskiq.messages.control import refuses, worker_order
from dagster_taskiq.messages.envelope import PROTOCOL
from dagster_taskiq.messages.worker_records import LOST, WorkerRecord
from dagster_taskiq.overview import is_named

#: What ``worker terminate`` means without a name, as in dagster-celery.
_DEFAULT_NAME = "dagster"

_NOBODY = "No worker is running."

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
    """List the running workers of all hosts; with NAME only those, and exit with 1 without any.

    A worker that has ended without a word is listed as lost for ten minutes, and counts for
    nothing. `worker show` tells more of each.
    """
    running, lost = ask_backend(read_settings(config_yaml), read_workers) or ([], [])
    records, gone = (
        [it for it in found if name is None or is_named(it, name)] for found in (running, lost)
    )
    if as_json:
        shapes = (list(map(worker_shape, found)) for found in (records, gone))
        echo_json(dict(zip(("workers", "lost_workers"), shapes, strict=True)))
    elif records or gone:
        _echo_workers([*records, *gone])
    if name is not None and all(record.is_outdated for record in records):
        raise click.ClickException(no_worker(name, running))
    if not records and not as_json:
        click.echo(_NOBODY)


@click.command("terminate")
@_name_argument
@click.option("--all", "-a", "all_", is_flag=True, help="Stop all workers.")
@config_yaml_option
@say_errors
@explain_names
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
@explain_names
def worker_reload(name: str | None, all_: bool, config_yaml: str | None) -> None:
    """Tell a worker to run new code: its children are replaced between steps.

    The exit code is 0 if no worker is running, and 1 if others are, but none of that NAME.
    """
    for told in _tell_workers("reload", name, all_, config_yaml):
        click.echo(f"Told {told} to reload.")


def _other_protocol(record: WorkerRecord) -> str:
    return "" if record.protocol == PROTOCOL else f" (protocol {record.protocol})"


def state_of(record: WorkerRecord) -> str:
    """A worker's state, with what is to be said about it or about its record."""
    if record.state == LOST:
        return f"lost {time_since(record.sent_at)} ago"
    other = record.other_backend
    given_back = f" (gives back tasks whose backend is {other})" if other else ""
    if record.is_outdated:
        return f"{record.state}{given_back} (outdated)"
    return record.state + given_back + ("" if record.is_trusted else " (not signed)")


def _echo_workers(records: Sequence[WorkerRecord]) -> None:
    """Write the table; what is too long for a terminal stands below its row there."""
    rows: list[tuple[str, ...]] = [
        ("worker", "steps", "runs", "done", "failed", "memory"),
        *(
            (
                it.name,
                f"{it.busy_slots}/{it.slots}",
                f"{it.busy_run_slots}/{it.run_slots}",
                str(it.done),
                str(it.failed),
                memory_of(it),
            )
            for it in records
        ),
    ]
    ends = [("refused", "version", "state", "queues"), *map(_words_of, records)]
    red = [number for number, it in enumerate(records, 1) if it.state == LOST]
    whole = [(*row, *end) for row, end in zip(rows, ends, strict=True)]
    if fits(whole):
        echo_table(whole, red=red)
        return
    below = {
        number: f"{state}; version {version}; {refused} refused; queues {queues}"
        for number, (refused, version, state, queues) in enumerate(ends)
        if number
    }
    if not fits(rows):  # the names are too long even so
        below = {number: f"{rows[number][0]}; {text}" for number, text in below.items()}
        rows = [row[1:] for row in rows]
    echo_table(rows, red=red, below=below)


def _words_of(record: WorkerRecord) -> tuple[str, ...]:
    version = record.version + _other_protocol(record)
    return str(record.refused), version, state_of(record), ", ".join(record.queues)


def memory_of(record: WorkerRecord) -> str:
    """How much memory a worker takes, in words."""
    return size_in_words(record.memory_bytes) if record.memory_bytes else DASH


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
            raise click.ClickException(no_worker(str(name), running))
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

    names = ask_backend(settings, tell) or []
    if not names:
        # no error, as in dagster-celery: scripts stop the workers of a host that has none
        advice = f"{no_worker(str(name), [])} Give a NAME, or --all."
        warnings.warn(advice if may_be_nobody else _NOBODY, stacklevel=1)
    return names
