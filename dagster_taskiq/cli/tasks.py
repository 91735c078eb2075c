"""``task list``, ``task show`` and ``run show``: what is in flight, where, and why it waits.

And what has ended lately, as ``ended_tasks`` shows it.
"""

from __future__ import annotations

from collections.abc import Sequence

import click

from dagster_taskiq.cli.ended_tasks import (
    Wanted,
    echo_end,
    echo_ended,
    echo_ended_of_run,
    since_option,
    states_option,
)
from dagster_taskiq.cli.finding import full_id
from dagster_taskiq.cli.later import Later
from dagster_taskiq.cli.looking import look, look_at_backend
from dagster_taskiq.cli.options import config_yaml_option, read_settings, say_errors
from dagster_taskiq.cli.shapes import task_shape, unseen_shape, withheld_shape
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
from dagster_taskiq.cli.withheld_steps import echo_withheld
from dagster_taskiq.defaults import HISTORY_ENDS
from dagster_taskiq.messages.attempt_ends import AttemptEnd
from dagster_taskiq.overview import MOST_WAITING, Overview, QueueView, TaskStatus, TaskView

#: What a task is called of which only the id is known: its worker has not told it, or is gone.
_UNTOLD = "(not told)"

#: Begins the sentence that no run has an id; whether it might also have ended.
_NO_RUN = {False: "No run in flight", True: "No run in flight or ended lately"}

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
@states_option
@since_option
@json_option
@config_yaml_option
@say_errors
def task_list(
    run_id: str | None,
    states: frozenset[str],
    since_seconds: float | None,
    as_json: bool,
    config_yaml: str | None,
) -> None:
    """List the tasks in flight, or the attempts that have ended lately, by run.

    What failed in the night: task list --state failed,lost --since 12h

    An ID in the table is the beginning of the whole one, which --json and `task show` have.
    """
    wanted = Wanted(states, since_seconds)
    settings = read_settings(config_yaml)
    most_ended = HISTORY_ENDS if wanted.over else 0
    if TaskStatus.WAITING.value in wanted.in_flight:
        overview = look(settings, most_ended=most_ended)
    else:
        overview = look_at_backend(settings, most_ended=most_ended)
    if run_id is not None:
        run_id = full_id(_NO_RUN[bool(wanted.over)], run_id, _run_ids(overview))
    tasks = [
        it
        for it in overview.tasks()
        if it.status.value in wanted.in_flight and run_id in (None, it.run_id)
    ]
    ended = [it for it in wanted.of(overview.ended) if run_id in (None, it.run_id)]
    if as_json:
        shapes = [*map(task_shape, tasks), *map(task_shape, ended)]
        echo_json({"tasks": shapes, "unseen": unseen_shape(overview)})
        return
    echo_tasks(tasks)
    if tasks and ended:
        click.echo()
    echo_ended(ended)
    if not tasks and not ended:
        ways = ["is in flight"] * bool(wanted.in_flight) + ["has ended lately"] * bool(wanted.over)
        click.echo(f"No task {' or '.join(ways)} that can be seen.", err=True)
    if TaskStatus.WAITING.value in wanted.in_flight:
        echo_unseen(overview.queues)


@task.command("show")
@click.argument("task_id", metavar="ID")
@json_option
@config_yaml_option
@say_errors
def task_show(task_id: str, as_json: bool, config_yaml: str | None) -> None:
    """Show a task in flight, or one that has ended lately; ID may be the beginning of its id."""
    overview = look(read_settings(config_yaml), most_ended=HISTORY_ENDS)
    ended = {it.task_id: it for it in overview.ended}
    by_id = ended | {it.task_id: it for it in reversed(list(overview.tasks()))}
    found = by_id[full_id("No task in flight or ended lately", task_id, by_id)]
    if as_json:
        echo_json({"task": task_shape(found)})
    elif isinstance(found, AttemptEnd):
        echo_end(found)
    else:
        _echo_task(found, overview)


@run.command("show")
@click.argument("run_id")
@json_option
@config_yaml_option
@say_errors
def run_show(run_id: str, as_json: bool, config_yaml: str | None) -> None:
    """Show a run in flight or one of which attempts have ended lately, with its tasks.

    RUN_ID is its id or the beginning of it.
    """
    overview = look(read_settings(config_yaml), most_ended=HISTORY_ENDS)
    run_id = full_id(_NO_RUN[True], run_id, _run_ids(overview))
    ended = [it for it in overview.ended if it.run_id == run_id]
    known = next((it for it in overview.runs if it.run_id == run_id), None)
    tasks = [it for it in overview.tasks() if it.run_id == run_id]
    withheld = overview.withheld_of(run_id)
    if as_json:
        shape = {
            "run_id": run_id,
            "has_loop": known is not None and known.has_loop,
            "is_resumable": None if known is None else known.is_resumable,
            "tasks": list(map(task_shape, tasks)),
            "ended": list(map(task_shape, ended)),
            "held_back": withheld_shape(withheld),
            "held_back_more": withheld.more,
        }
        echo_json({"run": shape, "unseen": unseen_shape(overview)})
        return
    if known is None:
        loop = "not begun: it waits in a queue" if tasks else "over"
    elif known.has_loop:
        loop = "alive"
    else:
        loop = "gone, may be resumed" if known.is_resumable else "gone"
    echo_fields({"run": run_id, "loop": loop})
    if tasks:
        click.echo()
        echo_tasks(tasks)
    echo_withheld(withheld)
    if ended:
        click.echo("\nended lately")
        echo_ended_of_run(ended)
    echo_unseen(overview.queues)


def _run_ids(overview: Overview) -> set[str]:
    found = (overview.runs, overview.tasks(), overview.ended)
    return {it.run_id for part in found for it in part}


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
