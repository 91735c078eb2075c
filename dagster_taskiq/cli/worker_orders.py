"""Commands that tell workers what to do: one sentence for each that was told, and an exit code."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click

from dagster_taskiq.backend import Backend
from dagster_taskiq.cli.asking import ask_backend
from dagster_taskiq.cli.completing import complete_queue, complete_worker
from dagster_taskiq.cli.finding import explain_names, no_worker
from dagster_taskiq.cli.options import (
    config_yaml_option,
    read_settings,
    reason_option,
    say_errors,
    timeout_option,
)
from dagster_taskiq.cli.tables import count_of, plain_line
from dagster_taskiq.cli.workers import NOBODY
from dagster_taskiq.errors import ConfigError, DagsterTaskiqError
from dagster_taskiq.messages.control import OrderKind
from dagster_taskiq.messages.queue_names import QueueKind
from dagster_taskiq.messages.worker_records import WorkerRecord, is_named
from dagster_taskiq.steering.workers import Told, answers_of, give_order
from dagster_taskiq.worker.steering import MOST_SLOTS

F = TypeVar("F", bound=Callable[..., Any])

#: What ``worker terminate`` means without a name, as in dagster-celery.
_DEFAULT_NAME = "dagster"

#: Pause between two looks whether workers that were told to stop are gone.
_LOOK_SECONDS = 0.5


_queues_argument = click.argument(
    "queues", metavar="QUEUE...", nargs=-1, required=True, shell_complete=complete_queue
)


def _names_workers(verb: str) -> Callable[[F], F]:
    """Give a command the argument NAME and the option ``--all``."""

    def add(command: F) -> F:
        all_option = click.option("--all", "-a", "all_", is_flag=True, help=f"{verb} all workers.")
        return click.argument("name", required=False, shell_complete=complete_worker)(
            all_option(command)
        )

    return add


# --- stop and reload, without waiting for the answer, as in dagster-celery ---


@click.command("terminate")
@_names_workers("Stop")
@click.option("--now", is_flag=True, help="Cancel what runs; without it, that may finish.")
@click.option("--wait", is_flag=True, help="Wait until they are gone, however long that takes.")
@config_yaml_option
@say_errors
@explain_names
def worker_terminate(
    name: str | None, all_: bool, now: bool, wait: bool, config_yaml: str | None
) -> None:
    """Tell a worker to finish its steps and stop. Told twice, it stops now.

    Without NAME and --all it tells the worker named "dagster", as dagster-celery does. The exit
    code is 0 if no worker is running, and 1 if others are, but none of that NAME.
    """
    is_default = not name and not all_
    name = _DEFAULT_NAME if is_default else name
    orders = _Orders(name, all_, config_yaml, may_be_nobody=is_default)
    # told twice it stops now, whatever its version
    told = orders.give(OrderKind.TERMINATE, times=2 if now else 1)
    for record in told:
        _say(f"Told {record.name} to stop{' now' if now else ''}.")
    if wait and told:
        orders.await_end(told)


@click.command("reload")
@_names_workers("Reload")
@config_yaml_option
@say_errors
@explain_names
def worker_reload(name: str | None, all_: bool, config_yaml: str | None) -> None:
    """Tell a worker to run new code: its children are replaced between steps.

    The exit code is 0 if no worker is running, and 1 if others are, but none of that NAME.
    """
    for record in _Orders(name, all_, config_yaml).give(OrderKind.RELOAD):
        _say(f"Told {record.name} to reload.")


# --- orders whose answer is waited for ---


@click.command("pause")
@_names_workers("Pause")
@reason_option
@timeout_option
@config_yaml_option
@say_errors
@explain_names
def worker_pause(
    name: str | None, all_: bool, reason: str, timeout: float, config_yaml: str | None
) -> None:
    """Have a worker take no new tasks until it is resumed; what runs goes on.

    The worker stays listed, and a restart ends its pause. The exit code is 1 where a worker has not
    answered within --timeout.
    """
    orders = _Orders(name, all_, config_yaml)
    orders.have_done(OrderKind.PAUSE, timeout, _paused, reason=reason)


def _paused(record: WorkerRecord) -> str:
    running = record.busy_slots + record.busy_run_slots
    return f"{record.name} is paused; {running} of its tasks go on."


@click.command("resume")
@_names_workers("Resume")
@timeout_option
@config_yaml_option
@say_errors
@explain_names
def worker_resume(name: str | None, all_: bool, timeout: float, config_yaml: str | None) -> None:
    """Have a worker take tasks again that was paused.

    The exit code is 1 where a worker has not answered within --timeout.
    """
    orders = _Orders(name, all_, config_yaml)
    orders.have_done(OrderKind.RESUME, timeout, lambda it: f"{it.name} takes tasks again.")


@click.command("slots")
@click.argument("name", shell_complete=complete_worker)
@click.argument("count", type=click.IntRange(1, MOST_SLOTS))
@click.option("--runs", is_flag=True, help="Slots for whole runs, not for steps.")
@timeout_option
@config_yaml_option
@say_errors
@explain_names
def worker_slots(
    name: str, count: int, runs: bool, timeout: float, config_yaml: str | None
) -> None:
    """Give a worker another number of slots, until it is restarted.

    A slot more is ready at once; a slot less goes when its task has ended. The exit code is 1 where
    a worker has not answered within --timeout.
    """
    kind = QueueKind.RUNS if runs else QueueKind.STEPS

    def check(record: WorkerRecord) -> str:
        if record.run_slots if runs else record.slots:
            return ""
        option = "--run-slots" if runs else "-c"
        return f"{record.name} executes no {kind.value}: start it with {option}."

    def say(record: WorkerRecord) -> str:
        busy, slots = (
            (record.busy_run_slots, record.run_slots) if runs else (record.busy_slots, record.slots)
        )
        task = "its task ends" if busy - slots == 1 else "their tasks end"
        more = f", and {busy - slots} more until {task}" if busy > slots else ""
        return f"{record.name} has {count_of(slots, 'slot')} for {kind.value}{more}."

    orders = _Orders(name, False, config_yaml, check)
    orders.have_done(OrderKind.SLOTS, timeout, say, queue_kind=kind.value, slots=count)


@click.group("queue")
def worker_queue() -> None:
    """Change on which queues a worker listens."""


def _listens(record: WorkerRecord) -> str:
    return f"{record.name} listens on {', '.join(record.queues) or 'no queue'}."


@worker_queue.command("add")
@click.argument("name", shell_complete=complete_worker)
@click.argument(
    "queues", metavar="QUEUE...", nargs=-1, required=True, shell_complete=complete_queue
)
@timeout_option
@config_yaml_option
@say_errors
@explain_names
def worker_queue_add(
    name: str, queues: tuple[str, ...], timeout: float, config_yaml: str | None
) -> None:
    """Have a worker listen on more queues, until it is restarted.

    The exit code is 1 where a worker has not answered within --timeout.
    """
    orders = _Orders(name, False, config_yaml)
    orders.have_done(OrderKind.ADD_QUEUES, timeout, _listens, queues=list(queues))


@worker_queue.command("remove")
@click.argument("name", shell_complete=complete_worker)
@click.argument(
    "queues", metavar="QUEUE...", nargs=-1, required=True, shell_complete=complete_queue
)
@timeout_option
@config_yaml_option
@say_errors
@explain_names
def worker_queue_remove(
    name: str, queues: tuple[str, ...], timeout: float, config_yaml: str | None
) -> None:
    """Have a worker listen on fewer queues, until it is restarted; what runs goes on.

    The exit code is 1 where a worker has not answered within --timeout.
    """

    def check(record: WorkerRecord) -> str:
        if set(record.queues) <= set(queues):
            return f"{record.name} would listen on no queue at all: pause it instead."
        if not set(record.queues) & set(queues):
            return f"{record.name} listens on none of these: {', '.join(record.queues)}."
        return ""

    orders = _Orders(name, False, config_yaml, check)
    orders.have_done(OrderKind.REMOVE_QUEUES, timeout, _listens, queues=list(queues))


# --- how they are given ---


class _Orders:
    """Gives orders to the workers of a name, or to all.

    Args:
        check: why a worker cannot obey, a sentence; empty where it can.
        may_be_nobody: whether it is no error that others run, but none of that name.
    """

    def __init__(
        self,
        name: str | None,
        all_: bool,
        config_yaml: str | None,
        check: Callable[[WorkerRecord], str] = lambda _: "",
        *,
        may_be_nobody: bool = False,
    ) -> None:
        if bool(name) == all_:
            raise click.UsageError("Give either the NAME of a worker or --all.")
        self._name = None if all_ else name
        self._settings = read_settings(config_yaml)
        self._check = check
        self._may_be_nobody = may_be_nobody

    def give(self, kind: str, times: int = 1) -> Sequence[WorkerRecord]:
        """Tell them, perhaps more than once; those that were told.

        Raises:
            DagsterTaskiqError: none can obey.
        """

        async def tell(backend: Backend) -> Told:
            told = await self._tell(backend, kind)
            for _ in range(times - 1):  # the same ones: the first order may have ended them
                await give_order(backend, self._settings.signer(), told.records, kind)
            return told

        told = ask_backend(self._settings, tell)
        if told is None or not told.records:
            self._say_nobody()
            return []
        return told.records

    def have_done(
        self,
        kind: str,
        timeout_seconds: float,
        say: Callable[[WorkerRecord], str],
        **details: Any,
    ) -> None:
        """Tell them, and say of each what it is like when it has obeyed.

        Raises:
            DagsterTaskiqError: none can obey, or one has not answered in time.
        """

        async def ask(backend: Backend) -> tuple[Told, Mapping[str, float], list[WorkerRecord]]:
            told = await self._tell(backend, kind, **details)
            answers = await answers_of(backend, told, timeout_seconds)
            return told, answers, await backend.workers()

        asked = ask_backend(self._settings, ask)
        if asked is None or not asked[0].records:
            raise DagsterTaskiqError(NOBODY)
        told, answers, now = asked
        for record in now:
            if record.worker_id in answers:
                _say(say(record))
        silent = [it.name for it in told.records if it.worker_id not in answers]
        if silent:
            raise DagsterTaskiqError(
                plain_line(
                    f"No answer within {timeout_seconds:g} s from {', '.join(silent)}: it obeys "
                    "when it finds the order, if its version knows it."
                )
            )

    def await_end(self, told: Sequence[WorkerRecord]) -> None:
        """Wait until workers have left the list, and say so of each."""
        left = {record.worker_id: record.name for record in told}
        while left:
            time.sleep(_LOOK_SECONDS)
            now = ask_backend(self._settings, lambda backend: backend.workers()) or []
            present = {record.worker_id for record in now}
            for worker_id in [it for it in left if it not in present]:
                _say(f"{left.pop(worker_id)} is gone.")

    async def _tell(self, backend: Backend, kind: str, **details: Any) -> Told:
        running = await backend.workers()
        records = [it for it in running if self._name is None or is_named(it, self._name)]
        if running and not records and not self._may_be_nobody:
            raise click.ClickException(no_worker(str(self._name), running))
        unable = [problem for record in records if (problem := self._check(record))]
        if unable:
            raise ConfigError(" ".join(unable))
        told = await give_order(backend, self._settings.signer(), records, kind, **details)
        for refusal in told.refusals:
            if not told.records:
                raise ConfigError(f"The order to {kind} would be of no use: {refusal}")
            warnings.warn(f"Not told to {kind}: {refusal}", stacklevel=1)
        return told

    def _say_nobody(self) -> None:
        # no error, as in dagster-celery: scripts stop the workers of a host that has none
        advice = f"{no_worker(str(self._name), [])} Give a NAME, or --all."
        warnings.warn(advice if self._may_be_nobody else NOBODY, stacklevel=1)


def _say(text: str) -> None:
    click.echo(plain_line(text))
