"""Commands that look after workers that run, on whatever host."""

from __future__ import annotations

from collections.abc import Sequence

import click

from dagster_taskiq.cli.asking import read_all_workers
from dagster_taskiq.cli.completing import complete_worker
from dagster_taskiq.cli.finding import explain_names, no_worker
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
from dagster_taskiq.messages.queue_names import PROTOCOL
from dagster_taskiq.messages.worker_records import LOST, WorkerRecord
from dagster_taskiq.overview import is_named

NOBODY = "No worker is running."

#: Columns of the list, and those that are left of them in a narrow terminal.
_HEAD: tuple[str, ...] = (
    *("worker", "queues", "steps", "runs", "state", "pid", "version", "refused"),
    *("done", "failed", "memory"),
)
_NARROW_HEAD: tuple[str, ...] = ("worker", "steps", "runs", "done", "failed", "memory")

_name_argument = click.argument("name", required=False, shell_complete=complete_worker)


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
    running, lost = read_all_workers(read_settings(config_yaml))
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
        click.echo(NOBODY)


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
    whole, narrow, below = [_HEAD], [_NARROW_HEAD], {}
    for number, it in enumerate(records, 1):
        steps, runs = f"{it.busy_slots}/{it.slots}", f"{it.busy_run_slots}/{it.run_slots}"
        queues, state = ", ".join(it.queues), state_of(it)
        version = it.version + _other_protocol(it)
        ended = str(it.done), str(it.failed), memory_of(it)
        words = (state, str(it.pid), version, str(it.refused))
        whole.append((it.name, queues, steps, runs, *words, *ended))
        narrow.append((it.name, steps, runs, *ended))
        below[number] = f"{state}; version {version}; {it.refused} refused; queues {queues}"
    red = [number for number, it in enumerate(records, 1) if it.state == LOST]
    if fits(whole):
        echo_table(whole, red=red)
        return
    if not fits(narrow):  # the names are too long even so
        below = {number: f"{narrow[number][0]}; {text}" for number, text in below.items()}
        narrow = [row[1:] for row in narrow]
    echo_table(narrow, red=red, below=below)


def memory_of(record: WorkerRecord) -> str:
    """How much memory a worker takes, in words."""
    return size_in_words(record.memory_bytes) if record.memory_bytes else DASH
