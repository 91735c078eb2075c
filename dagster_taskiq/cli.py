"""``dagster-taskiq``: start workers and look after them."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import signal
import socket
import subprocess
import sys
import uuid
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table

from dagster_taskiq.backend import Backend, WorkerRecord, open_backend
from dagster_taskiq.config import Settings, check_config, load_yaml
from dagster_taskiq.connections import Servers, find_running_backend, find_servers
from dagster_taskiq.control import refuses, worker_order
from dagster_taskiq.defaults import DEFAULT_QUEUE, DRAIN_TIMEOUT_SECONDS
from dagster_taskiq.errors import ConfigError, DagsterTaskiqError
from dagster_taskiq.version import __version__
from dagster_taskiq.worker.celery_arguments import read_celery_arguments
from dagster_taskiq.worker.worker import Worker, WorkerOptions

#: Exit code of a worker that had to cancel steps in order to stop.
EXIT_CUT_SHORT = 3

LOG_LEVELS = ("CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG")

F = TypeVar("F", bound=Callable[..., Any])

config_yaml_option = click.option(
    "--config-yaml",
    "-y",
    type=click.Path(exists=True, dir_okay=False),
    help="YAML file with the settings, the same as the run's: execution: config: broker: ...",
)


def say_errors(command: F) -> F:
    """Turn errors of ours into one line and an exit code; anything else keeps its traceback."""

    @wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                return command(*args, **kwargs)
            except DagsterTaskiqError as error:
                raise click.ClickException(str(error)) from error

    return wrapper  # type: ignore[return-value]


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(f"Warning: {message}", err=True)


@click.group()
@click.version_option(__version__, prog_name="dagster-taskiq")
def main() -> None:
    """Run Dagster steps and runs on Taskiq workers."""


@main.command()
@say_errors
def demo() -> None:
    """Show a job on two workers: starts all it needs, and stops it again."""
    _check_platform()
    # here, as it brings the demo's job with it
    from dagster_taskiq.demo.run import run_demo  # noqa: PLC0415

    sys.exit(run_demo())


@main.group()
def worker() -> None:
    """Start, list and stop workers."""


@worker.command("start")
@click.option("--name", "-n", help="Name of the worker. Default: a unique one.")
@config_yaml_option
@click.option("--queue", "-q", "queues", multiple=True, help="Queue to listen on; repeatable.")
@click.option("--background", "-d", is_flag=True, help="Run in the background.")
@click.option("--includes", "-i", multiple=True, help="Module to import first; repeatable.")
@click.option(
    "--loglevel",
    "-l",
    default="INFO",
    type=click.Choice(LOG_LEVELS, case_sensitive=False),
    help="Log level. Default: INFO.",
)
@click.option("--app", "-A", help="Accepted for dagster-celery's command lines; not needed.")
@click.option("--concurrency", "-c", type=click.IntRange(min=0), help="Slots: steps at once.")
@click.option(
    "--run-slots", type=click.IntRange(min=0), help="Whole runs at once. Default: as --concurrency."
)
@click.option("--max-tasks-per-child", type=click.IntRange(min=1), help="Replace a child after.")
@click.option("--max-memory-per-child", type=click.IntRange(min=1), help="... above so many KiB.")
@click.option(
    "--drain-timeout",
    type=click.FloatRange(min=0),
    default=DRAIN_TIMEOUT_SECONDS,
    help="Seconds that running steps may take when the worker is told to stop. Default: 3600.",
)
@click.option("--ready-fd", type=int, hidden=True, help="Descriptor to write to when ready.")
@click.argument("celery_arguments", nargs=-1, type=click.UNPROCESSED)
@say_errors
def worker_start(
    name: str | None,
    config_yaml: str | None,
    queues: tuple[str, ...],
    background: bool,
    includes: tuple[str, ...],
    loglevel: str,
    app: str | None,
    concurrency: int | None,
    run_slots: int | None,
    max_tasks_per_child: int | None,
    max_memory_per_child: int | None,
    drain_timeout: float,
    ready_fd: int | None,
    celery_arguments: tuple[str, ...],
) -> None:
    """Start a worker. Celery's own arguments may follow after --."""
    del app
    _check_platform()
    settings = _settings(config_yaml)
    celery = read_celery_arguments(celery_arguments)
    name = name or celery.name or f"dagster-{uuid.uuid4().hex[:6]}"
    if background:
        _start_in_background(name)
        return
    source = settings.source
    slots = next(
        (
            count
            for count in (concurrency, celery.concurrency, source.worker_concurrency)
            if count is not None
        ),
        os.cpu_count() or 1,
    )
    if not slots and not run_slots:
        raise ConfigError("A worker without slots does nothing: set --concurrency or --run-slots.")
    options = WorkerOptions(
        name=name.partition("@")[0],
        queues=_queues((*queues, *celery.queues), settings),
        slots=slots,
        run_slots=slots if run_slots is None else run_slots,
        include=tuple(dict.fromkeys((*settings.include, *includes, *celery.include))),
        log_level=(celery.log_level or loglevel).upper(),
        max_tasks_per_child=(
            max_tasks_per_child
            or celery.max_tasks_per_child
            or source.worker_max_tasks_per_child
            or 0
        ),
        max_memory_per_child_kib=(
            max_memory_per_child
            or celery.max_memory_per_child
            or source.worker_max_memory_per_child
            or 0
        ),
        drain_timeout_seconds=drain_timeout,
        result_expires_seconds=source.result_expires,
        secrets=_take_secrets(settings),
    )
    _configure_logging(options.log_level)
    sys.exit(asyncio.run(_run_worker(find_servers(settings), options, ready_fd)))


def _take_secrets(settings: Settings) -> dict[str, str]:
    """Take the signing keys out of the environment, which every process of ours would inherit."""
    found = {name: os.environ.pop(name, None) for name in settings.signing_variables}
    return {name: value for name, value in found.items() if value is not None}


async def _run_worker(servers: Servers, options: WorkerOptions, ready_fd: int | None) -> int:
    def say_ready() -> None:
        if ready_fd is not None:
            os.write(ready_fd, b"r")
            os.close(ready_fd)

    this = Worker(servers, options, say_ready)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, this.drain)
    is_complete = await this.run()
    if not is_complete:
        click.echo("Stopped; steps that were still running have been cancelled.", err=True)
    return 0 if is_complete else EXIT_CUT_SHORT


def _check_platform() -> None:
    if platform.system() == "Darwin":
        click.echo("Warning: macOS is for development; use Linux in production.", err=True)
    elif platform.system() != "Linux":
        click.echo(f"Warning: nobody has tried this on {platform.system()}; use Linux.", err=True)


def _queues(names: tuple[str, ...], settings: Settings) -> tuple[str, ...]:
    if any(not name.strip() for name in names):
        raise ConfigError("A queue's name is empty; check the -q options.")
    default = settings.default_queue or DEFAULT_QUEUE
    return tuple(dict.fromkeys(name.strip() for name in names)) or (default,)


def _configure_logging(level: str) -> None:
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s")
    if level != "DEBUG":
        # one line a task from a library that does not know which step it is
        for noisy in ("taskiq", "aio_pika", "aiormq"):
            logging.getLogger(noisy).setLevel(logging.WARNING)


def _settings(config_yaml: str | None) -> Settings:
    config = load_yaml(config_yaml) if config_yaml else check_config({}, "settings")
    return Settings.from_config(config)


def _start_in_background(name: str) -> None:
    arguments = [item for item in sys.argv[1:] if item not in ("-d", "--background")]
    if not {"-n", "--name"} & set(arguments):
        arguments[2:2] = ["--name", name]
    home = Path(os.getenv("DAGSTER_HOME") or ".").expanduser()
    log = home / "dagster_taskiq" / "logs" / f"{name}.log"
    home.mkdir(parents=True, exist_ok=True)
    for directory in (log.parent.parent, log.parent):
        directory.mkdir(exist_ok=True, mode=0o700)
    reader, writer = os.pipe()
    arguments[2:2] = ["--ready-fd", str(writer)]
    with os.fdopen(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "dagster_taskiq", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[writer],
            start_new_session=True,
        )
    os.close(writer)
    if not os.read(reader, 1):  # it has ended without a word
        lines = log.read_text(encoding="utf8", errors="replace").splitlines()
        reason = lines[-1].removeprefix("Error: ") if lines else "it said nothing"
        raise DagsterTaskiqError(f"The worker did not start: {reason} (log: {log})")
    click.echo(f"Started worker {name}@{socket.gethostname()}, pid {process.pid}, log {log}")


@worker.command("list")
@config_yaml_option
@say_errors
def worker_list(config_yaml: str | None) -> None:
    """List the running workers, on all hosts."""
    records = asyncio.run(_with_backend(_settings(config_yaml), lambda it: it.workers()))
    if not records:
        click.echo("No worker is running.")
        return
    table = Table(
        "worker",
        "queues",
        "steps",
        "runs",
        "state",
        "pid",
        "version",
        "refused",
        box=None,
        padding=(0, 2, 0, 0),
    )
    for record in records:
        table.add_row(
            record.name,
            ", ".join(record.queues),
            f"{record.busy_slots}/{record.slots}",
            f"{record.busy_run_slots}/{record.run_slots}",
            record.state,
            str(record.pid),
            record.version,
            str(record.refused),
        )
    Console(soft_wrap=True).print(table)


@worker.command("terminate")
@click.argument("name", required=False)
@click.option("--all", "-a", "all_", is_flag=True, help="Stop all workers.")
@config_yaml_option
@say_errors
def worker_terminate(name: str | None, all_: bool, config_yaml: str | None) -> None:
    """Tell a worker, on whatever host, to finish its steps and stop. Twice: to stop now."""
    if bool(name) == all_:
        raise click.UsageError("Give either the NAME of a worker or --all.")

    settings = _settings(config_yaml)

    async def terminate(backend: Backend) -> list[WorkerRecord]:
        records = [item for item in await backend.workers() if all_ or _is_named(item, str(name))]
        for record in records:
            await _send_order(backend, settings, record, "terminate")
        return records

    records = asyncio.run(_with_backend(settings, terminate))
    if not records:
        what = "No worker is running." if all_ else f"No worker named {name!r} is running."
        raise click.ClickException(what)
    for record in records:
        click.echo(f"Told {record.name} to stop.")


async def _send_order(
    backend: Backend, settings: Settings, record: WorkerRecord, kind: str
) -> None:
    signer = settings.signer()
    if reason := refuses(signer, record):
        raise ConfigError(f"The order to {kind} would be of no use: {reason}")
    await backend.send_control(record.worker_id, worker_order(signer, record.worker_id, kind))


def _is_named(record: WorkerRecord, name: str) -> bool:
    return name in (record.name, record.name.partition("@")[0])


async def _with_backend(settings: Settings, use: Callable[[Backend], Any]) -> Any:
    options = find_running_backend(settings)
    if options is None:
        return []  # nobody uses the embedded server, so there is no worker either
    backend = open_backend(options)
    try:
        await backend.startup()
        return await use(backend)
    finally:
        await backend.shutdown()


if __name__ == "__main__":
    main()
