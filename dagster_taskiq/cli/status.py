"""``status``: servers, queues and workers at a glance."""

from __future__ import annotations

import time
from collections.abc import Sequence

import click

from dagster_taskiq.cli.asking import read_workers
from dagster_taskiq.cli.celery_arguments import read_status_arguments
from dagster_taskiq.cli.looking import look_at_servers
from dagster_taskiq.cli.options import config_yaml_option, read_settings, say_errors
from dagster_taskiq.cli.queues import check_queues, echo_queues, queue_option
from dagster_taskiq.cli.shapes import queue_shape, server_shape, worker_shape
from dagster_taskiq.cli.tables import (
    count_of,
    echo_json,
    echo_sentence,
    echo_table,
    in_red,
    json_option,
    plain_line,
    time_since,
)
from dagster_taskiq.config.settings import Settings
from dagster_taskiq.errors import DagsterTaskiqError
from dagster_taskiq.messages.worker_records import WorkerRecord
from dagster_taskiq.overview import Overview, is_named

#: Between two looks of ``--watch``.
_WATCH_SECONDS = 2.0

_NOBODY = "No worker is running."


@click.command("status")
@click.option(
    "--app",
    "-A",
    help="As in dagster-celery: only say which workers are alive. The name itself has no effect.",
)
@click.option("--watch", "-w", is_flag=True, help="Look again every 2 s, until Ctrl-C.")
@queue_option
@json_option
@config_yaml_option
@click.argument("celery_arguments", nargs=-1, type=click.UNPROCESSED)
@say_errors
def status(
    app: str | None,
    watch: bool,
    queues: tuple[str, ...],
    as_json: bool,
    config_yaml: str | None,
    celery_arguments: tuple[str, ...],
) -> None:
    """Show the servers, the queues and the workers that are alive.

    The exit code is 1 where no worker is alive, a server is away, or tasks wait in a queue that no
    worker takes them from.

    With -A, or with Celery's `-d NAME` after --, output and exit code are those of `celery status`:
    1 where no worker is alive. It asks the backend alone, so a liveness probe does not depend on
    queues. A worker that was killed counts for at most 30 s more.
    """
    names = read_status_arguments(celery_arguments)
    settings = read_settings(config_yaml)
    if app or names:
        if watch or as_json:
            raise click.UsageError("-A and -d are for Celery's output: leave out --watch, --json.")
        records = read_workers(settings)
        _echo_nodes([it for it in _alive(records) if not names or _is_among(it, names)])
        return
    while watch:
        _watch_once(settings, queues, as_json)
        time.sleep(_WATCH_SECONDS)
    _show(look_at_servers(settings, *queues, most_waiting=0), as_json)


def _watch_once(settings: Settings, queues: tuple[str, ...], as_json: bool) -> None:
    try:
        overview = look_at_servers(settings, *queues, most_waiting=0)
        click.clear()  # after the look, or the screen would be empty meanwhile
        _show(overview, as_json)
    except (DagsterTaskiqError, click.ClickException) as error:
        sentence = in_red(plain_line(f"Error: {error}"))
        click.echo(sentence, err=as_json)  # or it would stand between the JSON


def _show(overview: Overview, as_json: bool) -> None:
    """Write it.

    Raises:
        ClickException: something is wrong.
    """
    if as_json:
        echo_json(
            {
                "servers": [server_shape(it) for it in overview.servers],
                "queues": [queue_shape(it) for it in overview.queues],
                "workers": [worker_shape(it) for it in overview.workers],
                "lost_workers": [worker_shape(it) for it in overview.lost_workers],
            }
        )
    elif overview.servers:
        _echo_servers(overview)
    if problems := [server.problem for server in overview.servers if server.problem]:
        raise DagsterTaskiqError(" ".join(problems))
    if overview.queues and not as_json:
        click.echo()
        echo_queues(overview.queues)
        click.echo()
    alive = _alive(overview.workers)
    if not as_json:
        _echo_lost(overview.lost_workers)
        _echo_nodes(alive)
    elif not alive:
        raise click.ClickException(_NOBODY)
    check_queues(overview.queues)


def _echo_servers(overview: Overview) -> None:
    rows: list[tuple[str, str]] = []
    for server in overview.servers:
        product, seconds = server.product, server.seconds
        answer = "away" if seconds is None else f"answers within {max(1, round(1000 * seconds))} ms"
        rows += [
            (" and ".join(server.roles), f"{product}, {answer}" if product else answer),
            ("", server.address),  # in a line of its own, since it may be long
        ]
    echo_table(rows, red=[2 * n for n, it in enumerate(overview.servers) if it.problem])


def _echo_nodes(records: list[WorkerRecord]) -> None:
    """What ``celery status`` says of workers; probes look for ``HOST: OK`` in it."""
    for record in records:
        click.echo(f"->  {record.name}: OK")
    if not records:
        raise click.ClickException(_NOBODY)
    click.echo(f"\n{count_of(len(records), 'node')} online.")


def _echo_lost(records: Sequence[WorkerRecord]) -> None:
    for record in records:
        ago = time_since(record.sent_at)
        echo_sentence(f"->  {record.name}: lost, last heard of {ago} ago", is_red=True)


def _alive(records: Sequence[WorkerRecord]) -> list[WorkerRecord]:
    return [record for record in records if not record.is_outdated]


def _is_among(record: WorkerRecord, names: tuple[str, ...]) -> bool:
    return any(is_named(record, name) for name in names)
