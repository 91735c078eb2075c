"""``queue list`` and ``queue show``: what waits where, and for whom."""

from __future__ import annotations

from collections.abc import Sequence

import click

from dagster_taskiq.cli.completing import complete_queue
from dagster_taskiq.cli.finding import nearest
from dagster_taskiq.cli.later import Later
from dagster_taskiq.cli.looking import look
from dagster_taskiq.cli.options import config_yaml_option, read_settings, say_errors
from dagster_taskiq.cli.shapes import queue_shape, task_shape
from dagster_taskiq.cli.tables import (
    DASH,
    echo_json,
    echo_sentence,
    echo_table,
    json_option,
    plain_line,
    time_since,
)
from dagster_taskiq.cli.tasks import echo_tasks, echo_unseen
from dagster_taskiq.errors import DagsterTaskiqError
from dagster_taskiq.overview import QueueView

queue_option = click.option(
    "--queue",
    "-q",
    "queues",
    multiple=True,
    shell_complete=complete_queue,
    help="Show this queue too; may be repeated. RabbitMQ does not list those without a worker.",
)


@click.group()
def queue() -> None:
    """Show and steer queues."""


@queue.command("list")
@queue_option
@json_option
@config_yaml_option
@say_errors
def queue_list(queues: tuple[str, ...], as_json: bool, config_yaml: str | None) -> None:
    """List the queues in which tasks wait or on which workers listen.

    The exit code is 1 where tasks wait in one that no worker takes them from.
    """
    found = look(read_settings(config_yaml), *queues).queues
    if as_json:
        echo_json({"queues": [queue_shape(it) for it in found]})
    elif found:
        echo_queues(found)
    check_queues(found)


@queue.command("show")
@click.argument("name", shell_complete=complete_queue)
@json_option
@config_yaml_option
@say_errors
def queue_show(name: str, as_json: bool, config_yaml: str | None) -> None:
    """Show a queue, the tasks that wait in it, and the workers that listen.

    The exit code is 1 where tasks wait that no worker takes, and where nobody knows of the queue.
    """
    settings = read_settings(config_yaml)
    everywhere = look(settings, name).queues
    queues = [it for it in everywhere if it.name == name]
    # asked for, it is there: also one in which nothing waits and on which nobody listens
    if name != settings.default_queue and not any(it.depth or it.workers for it in queues):
        known = [it.name for it in everywhere if it.name != name]
        raise DagsterTaskiqError(
            f"Nothing waits in a queue {name!r}, and no worker listens on it.{nearest(name, known)}"
        )
    if as_json:
        waiting = [it.waiting for it in queues]
        shapes = [
            {**queue_shape(it), "waiting": None if tasks is None else list(map(task_shape, tasks))}
            for it, tasks in zip(queues, waiting, strict=True)
        ]
        echo_json({"queues": shapes})
    else:
        _echo_whole(queues)
    check_queues(queues)


def _echo_whole(queues: Sequence[QueueView]) -> None:
    echo_queues(queues)
    for it in queues:
        workers = ", ".join(it.workers) or "none"
        echo_sentence(f"workers of {it.kind.value}: {workers}")
    if tasks := [task for it in queues for task in it.waiting or ()]:
        click.echo()
        echo_tasks(tasks)
    echo_unseen(queues)


def check_queues(queues: Sequence[QueueView]) -> None:
    """Raise where tasks wait that no worker takes.

    Raises:
        DagsterTaskiqError: the sentence names the queues.
    """
    if stuck := [f"{it.name} ({it.kind.value})" for it in queues if it.is_stuck]:
        names = plain_line(", ".join(stuck))
        raise DagsterTaskiqError(f"Tasks wait that no worker takes, in queue {names}.")


def echo_queues(queues: Sequence[QueueView]) -> None:
    """Write a table of queues, and below it why tasks wait in those where they do."""
    rows = [("queue", "of", "waiting", "oldest", "by priority", "running", "workers")]
    for it in queues:
        groups = (it.priorities or {}).items()
        rows.append(
            (
                it.name,
                it.kind.value,
                str(it.depth),
                time_since(it.oldest_sent_at),
                ", ".join(f"{priority}: {count}" for priority, count in groups) or DASH,
                str(it.running),
                str(len(it.workers)) if it.workers else "none",
            )
        )
    echo_table(rows, red=[number for number, it in enumerate(queues, 1) if it.is_stuck])
    for it in queues:
        if it.depth and it.wait:
            echo_sentence(f"{it.name}, {it.kind.value}: {it.wait.reason}", is_red=it.is_stuck)
    for sentence in sorted({it.blindness for it in queues if it.blindness}):
        echo_sentence(f"{DASH}: {sentence}")


for _command in (
    Later(
        "pause",
        "queue_orders:queue_pause",
        "Have no worker take steps or runs from a queue until it is resumed; what runs goes on.",
    ),
    Later(
        "resume",
        "queue_orders:queue_resume",
        "Have workers take from a queue again that was paused.",
    ),
    Later(
        "purge",
        "queue_orders:queue_purge",
        "End everything that waits in a queue; what workers execute goes on.",
    ),
    Later(
        "move",
        "queue_orders:queue_move",
        "Send what waits in a queue to the queue TO; what workers execute goes on.",
    ),
):
    queue.add_command(_command)
