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
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from dagster_taskiq.backend import Backend, WorkerRecord, open_backend
from dagster_taskiq.config import Settings, check_config, load_yaml
from dagster_taskiq.connections import Servers, find_running_backend, find_servers
from dagster_taskiq.control import refuses, worker_order
from dagster_taskiq.defaults import (
    DEFAULT_QUEUE,
    DRAIN_TIMEOUT_SECONDS,
    LONGEST_TIME_LIMIT_SECONDS,
)
from dagster_taskiq.errors import ConfigError, DagsterTaskiqError
from dagster_taskiq.time_limits import TimeLimits
from dagster_taskiq.version import __version__
from dagster_taskiq.worker.celery_arguments import CeleryArguments, read_celery_arguments
from dagster_taskiq.worker.fork_server import EarlyForkServer, start_early, take_variables
from dagster_taskiq.worker.worker import Worker, WorkerOptions

#: Exit code of a worker that had to cancel steps in order to stop.
EXIT_CUT_SHORT = 3

LOG_LEVELS = ("CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG")

_SECONDS = click.FloatRange(min=0, max=LONGEST_TIME_LIMIT_SECONDS)

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
    "--soft-time-limit",
    type=_SECONDS,
    help="Seconds until a step gets an exception, unless its tags say otherwise.",
)
@click.option(
    "--time-limit", type=_SECONDS, help="Seconds until a step is killed, unless its tags say ..."
)
@click.option(
    "--reload", is_flag=True, help="For development: run changed code of this directory at once."
)
@click.option(
    "--drain-timeout",
    type=click.FloatRange(min=0),
    default=DRAIN_TIMEOUT_SECONDS,
    help="Seconds that running steps may take when the worker is told to stop. Default: 3600.",
)
@click.option("--ready-fd", type=int, hidden=True, help="Descriptor to write to when ready.")
@click.argument("celery_arguments", nargs=-1, type=click.UNPROCESSED)
def worker_start(app: str | None, background: bool, **given: Any) -> None:
    """Start a worker. Celery's own arguments may follow after --."""
    del app
    if background:
        _start_worker(None, **given)
        return
    # first of all: what is read, opened or changed from here on stays out of the children
    with _stoppable(), closing(start_early()) as server:
        _start_worker(server, **given)


@contextmanager
def _stoppable() -> Iterator[None]:
    """End with all clean-up if a SIGTERM comes before the worker listens to signals itself."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@say_errors
def _start_worker(
    server: EarlyForkServer | None,
    *,
    config_yaml: str | None,
    ready_fd: int | None,
    celery_arguments: tuple[str, ...],
    **given: Any,
) -> None:
    _check_platform()
    settings = _settings(config_yaml)
    celery = read_celery_arguments(celery_arguments)
    given["name"] = given["name"] or celery.name or f"dagster-{uuid.uuid4().hex[:6]}"
    if server is None:
        _start_in_background(given["name"])
        return
    options = _worker_options(given, celery, settings)
    server.begin(forget=settings.signing_variables)
    _configure_logging(options.log_level)
    sys.exit(asyncio.run(_run_worker(find_servers(settings), options, ready_fd)))


def _worker_options(
    given: Mapping[str, Any], celery: CeleryArguments, settings: Settings
) -> WorkerOptions:
    """What the command line says; else Celery's arguments after --; else the settings."""
    source = settings.source
    slots = _first(given["concurrency"], celery.concurrency, source.worker_concurrency)
    slots = (os.cpu_count() or 1) if slots is None else slots
    run_slots = _first(given["run_slots"], slots)
    if not slots and not run_slots:
        raise ConfigError("A worker without slots does nothing: set --concurrency or --run-slots.")
    return WorkerOptions(
        name=given["name"].partition("@")[0],
        queues=_queues((*given["queues"], *celery.queues), settings),
        slots=slots,
        run_slots=run_slots,
        include=tuple(dict.fromkeys((*settings.include, *given["includes"], *celery.include))),
        log_level=(celery.log_level or given["loglevel"]).upper(),
        max_tasks_per_child=_first(
            given["max_tasks_per_child"],
            celery.max_tasks_per_child,
            source.worker_max_tasks_per_child,
            0,
        ),
        max_memory_per_child_kib=_first(
            given["max_memory_per_child"],
            celery.max_memory_per_child,
            source.worker_max_memory_per_child,
            0,
        ),
        drain_timeout_seconds=given["drain_timeout"],
        result_expires_seconds=source.result_expires,
        limits=TimeLimits(given["soft_time_limit"], given["time_limit"])
        .or_else(TimeLimits(celery.soft_time_limit, celery.time_limit))
        .or_else(TimeLimits(source.task_soft_time_limit, source.task_time_limit)),
        keeps_connections=not source.database_short_lived_sessions,
        secrets=_take_secrets(settings),
        watch=Path.cwd() if given["reload"] else None,
    )


def _first(*values: Any) -> Any:
    """The first that is given."""
    return next((value for value in values if value is not None), None)


def _take_secrets(settings: Settings) -> dict[str, str]:
    """Take the signing keys out of the environment, which every process of ours would inherit."""
    return take_variables(settings.signing_variables)


async def _run_worker(servers: Servers, options: WorkerOptions, ready_fd: int | None) -> int:
    def say_ready() -> None:
        if ready_fd is not None:
            os.write(ready_fd, b"r")
            os.close(ready_fd)

    this = Worker(servers, options, say_ready)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, this.drain)
    # under nohup the worker is meant to outlive its terminal
    ends_with_terminal = _has_terminal() and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    loop.add_signal_handler(signal.SIGHUP, _on_hangup, this, ends_with_terminal)
    is_complete = await this.run()
    if not is_complete:
        click.echo("Stopped; steps that were still running have been cancelled.", err=True)
    return 0 if is_complete else EXIT_CUT_SHORT


def _on_hangup(this: Worker, ends_with_terminal: bool) -> None:
    """SIGHUP asks for fresh children, but from a terminal that was closed it means the end."""
    if ends_with_terminal and not _has_terminal():
        this.drain()
    else:
        this.reload()


def _has_terminal() -> bool:
    try:
        os.close(os.open(os.ctermid(), os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


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
    # here, as a worker that starts has no use for it
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

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
    for told in _tell_workers("terminate", name, all_, config_yaml):
        click.echo(f"Told {told} to stop.")


@worker.command("reload")
@click.argument("name", required=False)
@click.option("--all", "-a", "all_", is_flag=True, help="Reload all workers.")
@config_yaml_option
@say_errors
def worker_reload(name: str | None, all_: bool, config_yaml: str | None) -> None:
    """Tell a worker, on whatever host, to run new code: its children are replaced between steps."""
    for told in _tell_workers("reload", name, all_, config_yaml):
        click.echo(f"Told {told} to reload.")


def _tell_workers(kind: str, name: str | None, all_: bool, config_yaml: str | None) -> list[str]:
    """Send a control message to the worker of that name or to all; the names of who was told."""
    if bool(name) == all_:
        raise click.UsageError("Give either the NAME of a worker or --all.")

    settings = _settings(config_yaml)

    async def tell(backend: Backend) -> list[str]:
        records = [item for item in await backend.workers() if all_ or _is_named(item, str(name))]
        for record in records:
            await _send_order(backend, settings, record, kind)
        return [record.name for record in records]

    names: list[str] = asyncio.run(_with_backend(settings, tell))
    if not names:
        what = "No worker is running." if all_ else f"No worker named {name!r} is running."
        raise click.ClickException(what)
    return names


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
