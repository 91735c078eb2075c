"""``queue pause``, ``resume``, ``purge`` and ``move``."""

from __future__ import annotations

import asyncio
import os

import click
from dagster import DagsterInstance

from dagster_taskiq.cli.completing import complete_queue
from dagster_taskiq.cli.finding import nearest
from dagster_taskiq.cli.options import (
    ANSWER_SECONDS,
    config_yaml_option,
    read_settings,
    reason_option,
    say_errors,
)
from dagster_taskiq.cli.steering import overview_of, steer, yes_option
from dagster_taskiq.cli.tables import count_of, plain_line
from dagster_taskiq.config.settings import Settings
from dagster_taskiq.errors import DagsterTaskiqError
from dagster_taskiq.steering.helm import Helm
from dagster_taskiq.steering.queues import (
    CancelRun,
    Emptied,
    move_tasks,
    pause_queue,
    purge,
    resume_queue,
)
from dagster_taskiq.steering.workers import Told, answers_of


@click.command("pause")
@click.argument("name", shell_complete=complete_queue)
@reason_option
@config_yaml_option
@say_errors
def queue_pause(name: str, reason: str, config_yaml: str | None) -> None:
    """Have no worker take steps or runs from a queue until it is resumed; what runs goes on.

    It holds for workers that start later too. A worker that is not told now finds out within half a
    minute.
    """

    async def pause(helm: Helm) -> str:
        return await _heard(helm, await pause_queue(helm, name, reason))

    _say(f"Queue {name} is paused{steer(read_settings(config_yaml), pause)}.")


@click.command("resume")
@click.argument("name", shell_complete=complete_queue)
@config_yaml_option
@say_errors
def queue_resume(name: str, config_yaml: str | None) -> None:
    """Have workers take from a queue again that was paused.

    The exit code is 1 where it was not.
    """

    async def resume(helm: Helm) -> str:
        told = await resume_queue(helm, name)
        if told is None:
            paused = await helm.backend.paused_queues()
            known = f" Paused: {', '.join(sorted(paused)) or 'none'}.{nearest(name, paused)}"
            raise DagsterTaskiqError(plain_line(f"Queue {name!r} is not paused.{known}"))
        return await _heard(helm, told)

    _say(f"Queue {name} is resumed{steer(read_settings(config_yaml), resume)}.")


async def _heard(helm: Helm, told: Told) -> str:
    answers = await answers_of(helm.backend, told, ANSWER_SECONDS)
    silent = [it.name for it in told.records if it.worker_id not in answers]
    obey = "obeys" if len(answers) == 1 else "obey"
    text = f"; {count_of(len(answers), 'worker')} {obey}"
    return text + (f", no answer yet from {', '.join(silent)}" if silent else "")


@click.command("purge")
@click.argument("name", shell_complete=complete_queue)
@reason_option
@yes_option
@config_yaml_option
@say_errors
def queue_purge(name: str, reason: str, yes: bool, config_yaml: str | None) -> None:
    """End everything that waits in a queue; what workers execute goes on.

    Waiting steps fail, with the reason and without a retry, and their runs decide what is next.
    Waiting runs are cancelled in the Dagster instance of DAGSTER_HOME; without one they stay.
    """
    settings = read_settings(config_yaml)
    if not yes:
        _ask(settings, name, "End")

    async def end(helm: Helm) -> Emptied:
        why = helm.who_and_why(f'Removed from queue "{name}"', reason)
        return await purge(helm, name, why, _run_canceller())

    _say_emptied("Ended", f"queue {name}", steer(settings, end))


@click.command("move")
@click.argument("name", shell_complete=complete_queue)
@click.argument("to_name", metavar="TO", shell_complete=complete_queue)
@reason_option
@yes_option
@config_yaml_option
@say_errors
def queue_move(name: str, to_name: str, reason: str, yes: bool, config_yaml: str | None) -> None:
    """Send what waits in a queue to the queue TO; what workers execute goes on.

    Their runs send them, within some seconds. A step that is retried goes to its own queue again.
    """
    if name == to_name:
        raise click.UsageError("The two queues are the same.")
    settings = read_settings(config_yaml)
    if not yes:
        _ask(settings, name, "Move", f" to {to_name}")

    async def move(helm: Helm) -> Emptied:
        return await move_tasks(helm, name, to_name, helm.who_and_why("It was moved", reason))

    _say_emptied("Moved", f"queue {name} to {to_name}", steer(settings, move))


# --- for them ---


def _ask(settings: Settings, name: str, verb: str, where_to: str = "") -> None:
    """Ask before something is done with what waits in a queue; click ends the command at a no."""

    async def depths(helm: Helm) -> dict[str, int]:
        overview = await overview_of(helm, name)
        return {it.kind.value: it.depth for it in overview.queues if it.name == name}

    found = steer(settings, depths)
    steps, runs = count_of(found.get("steps", 0), "step"), count_of(found.get("runs", 0), "run")
    question = f"{verb} {steps} and {runs} that wait in queue {name}{where_to}?"
    click.confirm(plain_line(question), abort=True)


def _run_canceller() -> CancelRun | None:
    """What cancels a whole run in Dagster; None without a DAGSTER_HOME."""
    if not os.getenv("DAGSTER_HOME"):
        return None

    def cancel(run_id: str, reason: str) -> bool:
        try:
            with DagsterInstance.get() as instance:
                run = instance.get_run_by_id(run_id)
                if run is not None and not run.is_finished:
                    instance.report_run_canceled(run, f"The run was cancelled. {reason}")
        except Exception as error:
            # whatever a storage raises; what waits behind this run stays too
            text = " ".join(str(error).split())
            raise DagsterTaskiqError(
                f"Run {run_id} stays in its queue: Dagster could not cancel it: {text}"
            ) from error
        return run is not None

    return lambda run_id, reason: asyncio.to_thread(cancel, run_id, reason)


def _say_emptied(verb: str, where: str, emptied: Emptied) -> None:
    done = f"{count_of(emptied.steps, 'step')} and {count_of(emptied.runs, 'run')}"
    further = {
        "whose task was over": emptied.over,
        "that no worker could have read": emptied.unreadable,
    }
    dropped = ", ".join(f"{count_of(n, 'message')} {what}" for what, n in further.items() if n)
    _say(f"{verb} {done} from {where}." + (f" Dropped {dropped}." if dropped else ""))
    if emptied.left:
        _say(
            f"{emptied.left} stay: they are another deployment's, or being executed, or whole runs "
            "that the Dagster instance of DAGSTER_HOME does not know; without one all runs stay."
        )


def _say(text: str) -> None:
    click.echo(plain_line(text))
