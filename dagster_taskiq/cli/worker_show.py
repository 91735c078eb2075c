"""``worker show``: one worker from near."""

from __future__ import annotations

from collections.abc import Sequence

import click

from dagster_taskiq.cli.asking import ask_backend
from dagster_taskiq.cli.completing import complete_worker
from dagster_taskiq.cli.finding import explain_names, no_worker
from dagster_taskiq.cli.options import config_yaml_option, read_settings, say_errors
from dagster_taskiq.cli.shapes import task_shape, worker_shape
from dagster_taskiq.cli.tables import (
    DASH,
    echo_fields,
    echo_json,
    echo_table,
    json_option,
    short_id,
    time_since,
)
from dagster_taskiq.cli.tasks import title_of
from dagster_taskiq.cli.workers import memory_of, state_of
from dagster_taskiq.errors import DagsterTaskiqError
from dagster_taskiq.messages.worker_records import WorkerRecord
from dagster_taskiq.overview import Overview, TaskView, is_named, read_backend


@click.command("show")
@click.argument("name", shell_complete=complete_worker)
@json_option
@config_yaml_option
@say_errors
@explain_names
def worker_show(name: str, as_json: bool, config_yaml: str | None) -> None:
    """Show a worker: what it runs and since when, slots, queues, versions, last heard of.

    The exit code is 1 where no worker of that name is running; one that is lost is shown for ten
    minutes.
    """
    overview = ask_backend(read_settings(config_yaml), read_backend) or Overview()
    alive, lost = (
        [it for it in found if is_named(it, name)]
        for found in (overview.workers, overview.lost_workers)
    )
    records = [*alive, *lost]
    tasks = {it.worker_id: overview.tasks_of_worker(it) for it in records}
    if as_json:
        shapes = {
            it.worker_id: {
                **worker_shape(it),
                "tasks": list(map(task_shape, tasks[it.worker_id])),
            }
            for it in records
        }
        echo_json(
            {
                "workers": [shapes[it.worker_id] for it in alive],
                "lost_workers": [shapes[it.worker_id] for it in lost],
            }
        )
    for number, record in enumerate([] if as_json else records):
        if number:
            click.echo()
        _echo_worker(record, tasks[record.worker_id])
    if all(it.is_outdated for it in alive):
        raise DagsterTaskiqError(no_worker(name, overview.workers))


def _state_and_why(record: WorkerRecord) -> str:
    why = f": {record.pause_reason}" if record.pause_reason else ""
    return state_of(record) + why


def _echo_worker(record: WorkerRecord, tasks: Sequence[TaskView]) -> None:
    steps, runs = (record.busy_slots, record.slots), (record.busy_run_slots, record.run_slots)
    echo_fields(
        {
            "worker": record.name,
            "state": _state_and_why(record),
            "queues": ", ".join(record.queues),
            "slots": f"{steps[0]} of {steps[1]} for steps busy, {runs[0]} of {runs[1]} for runs",
            "ended": f"{record.done} tasks done, {record.failed} failed, since its start",
            "started": f"{time_since(record.started_at)} ago, pid {record.pid}",
            "heard of": f"{time_since(record.sent_at)} ago",
            "memory": f"{memory_of(record)} with its children" if record.memory_bytes else DASH,
            "warm code": record.warm_code,
            "cold code": record.cold_code,
            "version": f"{record.version}, protocol {record.protocol}",
            "dagster": f"{record.dagster} on Python {record.python}" if record.dagster else DASH,
            "storage": record.storage or DASH,
            "broker": record.broker or DASH,
            "keys": ", ".join(record.key_ids) or "none",
            "refused": f"{record.refused} messages",
        }
    )
    if not tasks:
        click.echo("runs      nothing")
        return
    rows = [("runs", "run", "job", "step", "try", "for", "queue", "slot", "pid")]
    for it in tasks:
        attempt = DASH if it.attempt is None else str(it.attempt)
        slot, pid = (str(it.place.slot), str(it.place.pid)) if it.place else (DASH, DASH)
        age, queue = time_since(it.claimed_at), it.queue or DASH
        run, task = short_id(it.run_id), short_id(it.task_id)
        rows.append((task, run, it.job or DASH, title_of(it), attempt, age, queue, slot, pid))
    click.echo()
    echo_table(rows)
