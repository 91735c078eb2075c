"""``task list``, ``task show`` and ``run show``: what is in flight, where, and why it waits."""

from __future__ import annotations

from collections.abc import Sequence

import click

from dagster_taskiq.cli.finding import full_id
from dagster_taskiq.cli.later import Later
from dagster_taskiq.cli.looking import look
from dagster_taskiq.cli.options import config_yaml_option, read_settings, say_errors
from dagster_taskiq.cli.shapes import task_shape, unseen_shape
from dagster_taskiq.cli.tables import (
    DASH,
    count_of,
    echo_fields,
    echo_json,
    echo_sentence,
    echo_table,
    json_option,
    plain_line,
    short_id,
    time_since,
)
from dagster_taskiq.overview import MOST_WAITING, Overview, QueueView, TaskStatus, TaskView

#: What a task is called of which only the id is known: its worker has not told it, or is gone.
_UNTOLD = "(not told)"

#: Why tasks that wait are not shown by a server that could.
_ONLY_NEXT = f"Only the next {MOST_WAITING} are."
_UNREADABLE = "They are too long for a look, or not signed as they must be by the settings here."


@click.group()
def task() -> None:
    """Show steps and runs that wait or are executed, and cancel them."""


@click.group()
def run() -> None:
    """Show runs in flight."""


@task.command("list")
@click.option("--run", "run_id", help="Only those of a run, by its id or the beginning of it.")
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice([status.value for status in TaskStatus]),
    help="Only those in this state; may be repeated.",
)
@json_option
@config_yaml_option
@say_errors
def task_list(
    run_id: str | None, states: tuple[str, ...], as_json: bool, config_yaml: str | None
) -> None:
    """List the tasks in flight, by run.

    An ID in the table is the beginning of the whole one, which --json and `task show` have.
    """
    overview = look(read_settings(config_yaml))
    tasks = list(overview.tasks())
    if run_id is not None:
        run_id = full_id("No run in flight", run_id, _run_ids(overview))
        tasks = [it for it in tasks if it.run_id == run_id]
    tasks = [it for it in tasks if not states or it.status.value in states]
    if as_json:
        echo_json({"tasks": list(map(task_shape, tasks)), "unseen": unseen_shape(overview)})
        return
    if tasks:
        echo_tasks(tasks)
    elif overview.servers:
        click.echo("No task is in flight that can be seen.", err=True)
    if not states or TaskStatus.WAITING.value in states:
        echo_unseen(overview.queues)


@task.command("show")
@click.argument("task_id", metavar="ID")
@json_option
@config_yaml_option
@say_errors
def task_show(task_id: str, as_json: bool, config_yaml: str | None) -> None:
    """Show a task in flight; ID is its id or the beginning of it."""
    overview = look(read_settings(config_yaml))
    by_id = {it.task_id: it for it in reversed(list(overview.tasks()))}
    found = by_id[full_id("No task in flight", task_id, by_id)]
    if as_json:
        echo_json({"task": task_shape(found)})
    else:
        _echo_task(found, overview)


@run.command("show")
@click.argument("run_id")
@json_option
@config_yaml_option
@say_errors
def run_show(run_id: str, as_json: bool, config_yaml: str | None) -> None:
    """Show a run in flight and its tasks; RUN_ID is its id or the beginning of it."""
    overview = look(read_settings(config_yaml))
    run_id = full_id("No run in flight", run_id, _run_ids(overview))
    known = next((it for it in overview.runs if it.run_id == run_id), None)
    tasks = [it for it in overview.tasks() if it.run_id == run_id]
    if as_json:
        shape = {
            "run_id": run_id,
            "has_loop": known is not None and known.has_loop,
            "is_resumable": None if known is None else known.is_resumable,
            "tasks": list(map(task_shape, tasks)),
        }
        echo_json({"run": shape, "unseen": unseen_shape(overview)})
        return
    if known is None:
        loop = "not begun: it waits in a queue"
    elif known.has_loop:
        loop = "alive"
    else:
        loop = "gone, may be resumed" if known.is_resumable else "gone"
    echo_fields({"run": run_id, "loop": loop})
    if tasks:
        click.echo()
        echo_tasks(tasks)
    echo_unseen(overview.queues)


def _run_ids(overview: Overview) -> set[str]:
    return {it.run_id for it in overview.runs} | {it.run_id for it in overview.tasks()}


def _echo_task(found: TaskView, overview: Overview) -> None:
    place, priority = found.place, found.priority
    echo_fields(
        {
            "task": found.task_id,
            "run": found.run_id,
            "job": found.job or DASH,
            "step": title_of(found),
            "attempt": DASH if found.attempt is None else str(found.attempt),
            "state": f"{found.status.value} for {time_since(found.since)}",
            "queue": found.queue or DASH,
            "place": _position_in(found, overview.queues),
            "priority": DASH if priority is None else str(priority),
            "worker": f"{place.worker}, slot {place.slot}, pid {place.pid}" if place else DASH,
            "reason": found.reason or DASH,
        }
    )


def title_of(found: TaskView) -> str:
    """What a task executes."""
    if found.step_key is None:
        return _UNTOLD
    return found.step_key or "(the run)"


def echo_tasks(tasks: Sequence[TaskView]) -> None:
    """Write tables of tasks, one for each run, and below each why its tasks wait."""
    for number, run_id in enumerate(dict.fromkeys(it.run_id for it in tasks)):
        if number:
            click.echo()
        click.echo(plain_line(f"run {run_id}"))
        own = [it for it in tasks if it.run_id == run_id]
        _echo_tasks_of_run(own)


def _echo_tasks_of_run(tasks: Sequence[TaskView]) -> None:
    rows = [("task", "step", "try", "state", "for", "where")]
    rows += [
        (
            short_id(it.task_id),
            title_of(it),
            DASH if it.attempt is None else str(it.attempt),
            it.status.value,
            time_since(it.since),
            _where(it),
        )
        for it in tasks
    ]
    echo_table(rows, indent="  ")
    for reason in sorted({it.reason for it in tasks if it.reason}):
        echo_sentence(reason, indent="  ")


def _where(found: TaskView) -> str:
    if found.place:
        return found.place.worker
    if found.queue is None:
        return DASH
    return f"queue {found.queue}" + (f", place {found.position}" if found.position else "")


def _position_in(found: TaskView, queues: Sequence[QueueView]) -> str:
    if found.position is None:
        return DASH
    depths = [it.depth for it in queues if (it.name, it.kind) == (found.queue, found.kind)]
    return f"{found.position} of {depths[0]}" if depths else str(found.position)


def echo_unseen(queues: Sequence[QueueView]) -> None:
    """Say of each queue how many of its tasks are not shown, where there are any."""
    for it in queues:
        if it.unseen:
            is_long = it.depth > MOST_WAITING
            why = it.blindness or (_ONLY_NEXT if is_long else _UNREADABLE)
            tasks = count_of(it.unseen, "more task" if it.waiting else "task")
            text = f"Not shown: {tasks} in queue {it.name} ({it.kind.value}). {why}"
            echo_sentence(text, is_aside=True)


task.add_command(
    Later(
        "cancel",
        "task_orders:task_cancel",
        "Cancel an attempt of a step: it fails, with the reason and without a retry.",
    )
)
