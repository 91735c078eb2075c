"""``worker show`` and ``worker ping``: one worker from near."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import click

from dagster_taskiq.backend import Backend
from dagster_taskiq.cli.asking import ask_backend
from dagster_taskiq.cli.finding import no_worker
from dagster_taskiq.cli.options import config_yaml_option, read_settings, say_errors
from dagster_taskiq.cli.shapes import task_shape, worker_shape
from dagster_taskiq.cli.tables import (
    DASH,
    echo_fields,
    echo_json,
    echo_table,
    json_option,
    plain_line,
    short_id,
    time_since,
)
from dagster_taskiq.cli.tasks import title_of
from dagster_taskiq.cli.worker_orders import timeout_option
from dagster_taskiq.cli.workers import explain_names, state_of
from dagster_taskiq.errors import DagsterTaskiqError
from dagster_taskiq.messages.control import OrderKind
from dagster_taskiq.messages.worker_records import WorkerRecord
from dagster_taskiq.overview import Overview, TaskView, is_named, read_backend
from dagster_taskiq.steering.workers import answers_of, give_order


@click.command("show")
@click.argument("name")
@json_option
@config_yaml_option
@say_errors
@explain_names
def worker_show(name: str, as_json: bool, config_yaml: str | None) -> None:
    """Show a worker: what it runs and since when, slots, queues, version, last heard of.

    The exit code is 1 where no worker of that name is running.
    """
    overview = ask_backend(read_settings(config_yaml), read_backend) or Overview()
    records = [it for it in overview.workers if is_named(it, name)]
    tasks = {it.worker_id: overview.tasks_of_worker(it) for it in records}
    if as_json:
        shapes = [
            {**worker_shape(it), "tasks": list(map(task_shape, tasks[it.worker_id]))}
            for it in records
        ]
        echo_json({"workers": shapes})
    for number, record in enumerate([] if as_json else records):
        if number:
            click.echo()
        _echo_worker(record, tasks[record.worker_id])
    if all(it.is_outdated for it in records):
        raise DagsterTaskiqError(no_worker(name, overview.workers))


def _echo_worker(record: WorkerRecord, tasks: Sequence[TaskView]) -> None:
    steps, runs = (record.busy_slots, record.slots), (record.busy_run_slots, record.run_slots)
    echo_fields(
        {
            "worker": record.name,
            "state": state_of(record),
            "queues": ", ".join(record.queues),
            "slots": f"{steps[0]} of {steps[1]} for steps busy, {runs[0]} of {runs[1]} for runs",
            "lives": f"for {time_since(record.started_at)}, pid {record.pid}",
            "heard of": f"{time_since(record.sent_at)} ago",
            "version": f"{record.version}, protocol {record.protocol}",
            "broker": record.broker or DASH,
            "keys": ", ".join(record.key_ids) or "none",
            "refused": f"{record.refused} messages",
        }
    )
    if not tasks:
        click.echo("runs      nothing")
        return
    rows = [("runs", "run", "step", "try", "for", "queue", "slot", "pid")]
    for it in tasks:
        attempt = DASH if it.attempt is None else str(it.attempt)
        slot, pid = (str(it.place.slot), str(it.place.pid)) if it.place else (DASH, DASH)
        age, queue = time_since(it.claimed_at), it.queue or DASH
        run, task = short_id(it.run_id), short_id(it.task_id)
        rows.append((task, run, title_of(it), attempt, age, queue, slot, pid))
    click.echo()
    echo_table(rows)


@click.command("ping")
@click.argument("name")
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
