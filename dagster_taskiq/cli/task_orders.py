"""``task cancel``: end one attempt of a step."""

from __future__ import annotations

import click

from dagster_taskiq.cli.finding import full_id
from dagster_taskiq.cli.options import config_yaml_option, read_settings, reason_option, say_errors
from dagster_taskiq.cli.steering import overview_of, steer
from dagster_taskiq.cli.tables import plain_line
from dagster_taskiq.errors import DagsterTaskiqError
from dagster_taskiq.messages.queue_names import QueueKind
from dagster_taskiq.overview import TaskView
from dagster_taskiq.steering.helm import Helm
from dagster_taskiq.steering.tasks import MOST_LOOKED_THROUGH, CancelOutcome, cancel_task


@click.command("cancel")
@click.argument("task_id", metavar="ID")
@reason_option
@config_yaml_option
@say_errors
def task_cancel(task_id: str, reason: str, config_yaml: str | None) -> None:
    """Cancel an attempt of a step: it fails, with the reason and without a retry.

    One that is executed gets SIGTERM, and SIGKILL after its grace period. The beginning of an ID is
    enough. Tasks that wait in RabbitMQ cannot be found: terminate their run, or purge their queue.
    The exit code is 1 where no task in flight has the ID, or it has just ended.
    """

    async def cancel(helm: Helm) -> tuple[TaskView, CancelOutcome]:
        overview = await overview_of(helm, most_waiting=MOST_LOOKED_THROUGH)
        tasks = {it.task_id: it for it in overview.tasks()}
        found = tasks[full_id("No task in flight", task_id, tasks)]
        if found.kind is QueueKind.RUNS:
            raise DagsterTaskiqError(
                f"Task {found.task_id} is the whole run {found.run_id}: terminate it in Dagster."
            )
        return found, await cancel_task(helm, found, helm.who_and_why("Cancelled", reason))

    found, outcome = steer(read_settings(config_yaml), cancel)
    step = f"step {found.step_key or '(not yet known)'} of run {found.run_id}"
    said = {
        CancelOutcome.ENDED: f"Cancelled {step}, which no worker had started.",
        CancelOutcome.TOLD: f"Told the worker of {step} to stop it.",
    }
    if outcome not in said:
        gone = f"Nothing to cancel: {step} is over, or its run is judging it."
        raise DagsterTaskiqError(plain_line(gone))
    click.echo(plain_line(said[outcome]))
