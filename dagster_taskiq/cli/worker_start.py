"""``dagster-taskiq worker start``."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dagster_taskiq.cli.app_module import app_module, import_app
from dagster_taskiq.cli.background import READY, WAITING, start_in_background
from dagster_taskiq.cli.celery_arguments import (
    LOG_LEVELS,
    CeleryArguments,
    read_celery_arguments,
    split_names,
)
from dagster_taskiq.cli.completing import complete_queue
from dagster_taskiq.cli.monitoring import DEFAULT_HOST, worker_pages
from dagster_taskiq.cli.options import (
    check_platform,
    config_yaml_option,
    read_settings,
    say_errors,
)
from dagster_taskiq.config.settings import Settings
from dagster_taskiq.connections import Servers, find_servers
from dagster_taskiq.defaults import (
    DEFAULT_QUEUE,
    DRAIN_TIMEOUT_SECONDS,
    LONGEST_TIME_LIMIT_SECONDS,
)
from dagster_taskiq.errors import ConfigError
from dagster_taskiq.messages.plain_text import plain_name
from dagster_taskiq.messages.time_limits import TimeLimits
from dagster_taskiq.telemetry.traces import find_tracing
from dagster_taskiq.worker.fork_server import EarlyForkServer, start_early, take_variables
from dagster_taskiq.worker.log_writer import log_to_standard_error
from dagster_taskiq.worker.options import WorkerOptions
from dagster_taskiq.worker.worker import Worker

if TYPE_CHECKING:
    from dagster_taskiq.monitoring.worker_pages import WorkerPages

logger = logging.getLogger(__name__)

#: Exit code of a worker that had to cancel steps in order to stop.
EXIT_CUT_SHORT = 3

#: Each of them tells a worker to stop.
_STOPPING = (signal.SIGINT, signal.SIGTERM)

_SECONDS = click.FloatRange(min=0, max=LONGEST_TIME_LIMIT_SECONDS)


@click.command("start")
@click.option(
    "--name", "-n", help="Name of the worker; its host is added. A unique one is made by default."
)
@config_yaml_option
@click.option(
    "--queue",
    "-q",
    "queues",
    multiple=True,
    shell_complete=complete_queue,
    help="Queue to listen on. Repeat it, or give several with commas.",
)
@click.option(
    "--background",
    "-d",
    is_flag=True,
    help="Leave the worker running, with a log file in DAGSTER_HOME, once it is ready.",
)
@click.option(
    "--includes",
    "-i",
    multiple=True,
    help="Module that each child imports first. Repeat it, or give several with commas.",
)
@click.option(
    "--loglevel",
    "-l",
    default="INFO",
    show_default=True,
    type=click.Choice(list(LOG_LEVELS), case_sensitive=False),
    help="Least severe level of what is logged.",
)
@click.option(
    "--app",
    "-A",
    help="Module that sets up logging and the like: imported by the worker and by each child.",
)
@click.option(
    "--concurrency",
    "-c",
    type=click.IntRange(min=0),
    help="How many steps run at once. The number of cores by default.",
)
@click.option(
    "--run-slots",
    type=click.IntRange(min=0),
    help="How many launched runs go on at once. The same as --concurrency by default.",
)
@click.option(
    "--max-tasks-per-child",
    type=click.IntRange(min=1),
    help="Replace a child process after it has executed this number of steps.",
)
@click.option(
    "--max-memory-per-child",
    type=click.IntRange(min=1),
    help="Replace a child process after a step if it holds more than this number of KiB.",
)
@click.option(
    "--soft-time-limit",
    type=_SECONDS,
    help="Raise an exception in a step after this number of seconds. The step's tags go first.",
)
@click.option(
    "--time-limit",
    type=_SECONDS,
    help="Kill a step after this number of seconds. The step's tags go first.",
)
@click.option(
    "--reload",
    is_flag=True,
    help="For development: run new code when a Python file of this directory has changed.",
)
@click.option(
    "--no-warm-code",
    is_flag=True,
    help="Have each child load its code itself, rather than load it once for all of them.",
)
@click.option(
    "--drain-timeout",
    type=click.FloatRange(min=0),
    default=DRAIN_TIMEOUT_SECONDS,
    show_default=True,
    help="Seconds that running steps may still take when the worker is told to stop.",
)
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65535),
    help="Serve /metrics for Prometheus and /health on this port; 0 picks a free one.",
)
@click.option(
    "--metrics-host",
    default=DEFAULT_HOST,
    show_default=True,
    help="Address for that; 0.0.0.0 lets other hosts in.",
)
@click.option("--ready-fd", type=int, hidden=True, help="Descriptor to write to when ready.")
@click.argument("celery_arguments", nargs=-1, type=click.UNPROCESSED)
def start(background: bool, **given: Any) -> None:
    """Start a worker that executes steps and launched runs.

    Arguments of Celery's worker may follow after --. Those that mean nothing here give a warning.
    """
    if background:
        _start_worker(None, **given)
        return
    # first of all: what is read, opened or changed from here on stays out of the children
    with _stoppable(), closing(start_early()) as server:
        _start_worker(server, **given)


@contextmanager
def _stoppable() -> Iterator[None]:
    """End with all clean-up if a SIGTERM comes before the worker listens to signals itself."""

    def end(*_: object) -> None:
        sys.exit(0)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is end:
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
    check_platform()
    settings = read_settings(config_yaml)
    celery = read_celery_arguments(celery_arguments)
    name = given["name"] or celery.name or f"dagster-{uuid.uuid4().hex[:6]}"
    given["name"] = _checked_name(name)
    if server is None:
        start_in_background(click.get_current_context(), given["name"])
        return
    options = _worker_options(given, celery, settings)
    server.begin(forget=settings.signing_variables)
    with _logging(options.log_level):
        # after our own set-up of logging, which it may change, and before anything is started
        if module := app_module(given["app"]):
            import_app(module)
        with worker_pages(given["metrics_host"], given["metrics_port"], options) as pages:
            servers = find_servers(settings)
            if servers.notice:
                logger.log(servers.notice_level, servers.notice)
            exit_code = asyncio.run(_run_worker(servers, options, ready_fd, pages))
    sys.exit(exit_code)


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
        include=tuple(
            dict.fromkeys(
                (
                    *filter(None, [app_module(given["app"])]),
                    *settings.include,
                    *split_names(given["includes"]),
                    *celery.include,
                )
            )
        ),
        log_level=celery.log_level or LOG_LEVELS[given["loglevel"].upper()],
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
        server_patience_seconds=settings.server_patience_seconds,
        database_idle_seconds=source.kept_connection_seconds,
        has_warm_code=not given["no_warm_code"],
        code_max_age_seconds=source.code_max_age_seconds,
        tracing=find_tracing,
        secrets=_take_secrets(settings),
        watch=Path.cwd() if given["reload"] else None,
    )


def _first(*values: Any) -> Any:
    """The first that is given."""
    return next((value for value in values if value is not None), None)


def _take_secrets(settings: Settings) -> dict[str, str]:
    """Take the signing keys out of the environment, which every process of ours would inherit."""
    return take_variables(settings.signing_variables)


async def _run_worker(
    servers: Servers, options: WorkerOptions, ready_fd: int | None, pages: WorkerPages | None
) -> int:
    def tell_starter(word: bytes) -> None:
        """The process that has started the worker in the background reads one word."""
        nonlocal ready_fd
        if ready_fd is not None:
            os.write(ready_fd, word)
            os.close(ready_fd)
            ready_fd = None

    def on_ready() -> None:
        if pages is not None:
            pages.ready()
        tell_starter(READY)

    observer = pages.observer if pages is not None else None
    this = Worker(servers, options, on_ready, lambda: tell_starter(WAITING), observer)
    if pages is not None:
        pages.watch(this)
    loop = asyncio.get_running_loop()
    for number in _STOPPING:
        loop.add_signal_handler(number, this.drain)
    # under nohup the worker is meant to outlive its terminal
    ends_with_terminal = _has_terminal() and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    loop.add_signal_handler(signal.SIGHUP, _on_hangup, this, ends_with_terminal)
    try:
        is_complete = await this.run()
    finally:
        if pages is not None:
            pages.unwatch()
        # the process only ends from here on, and what it removes then is not to be left behind
        for number in _STOPPING:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
    if not is_complete:
        logger.warning("Stopped; steps that were still running have been cancelled.")
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


def _checked_name(name: str) -> str:
    """The name of a worker, which is also that of its log file.

    Raises:
        ConfigError: it would lead to another directory, or cannot be shown.
    """
    if "/" in name or name.startswith((".", "@")) or plain_name(name) != name:
        raise ConfigError(
            f"The worker cannot be named {plain_name(name)!r}: a name has no '/', no control "
            "characters, at most 255 characters, and does not begin with '.' or '@'."
        )
    return name


def _queues(names: tuple[str, ...], settings: Settings) -> tuple[str, ...]:
    if any(not name.strip(" ,") for name in names):
        raise ConfigError("A queue's name is empty; check the -q options.")
    default = settings.default_queue or DEFAULT_QUEUE
    return tuple(dict.fromkeys(split_names(names))) or (default,)


@contextmanager
def _logging(level: str) -> Iterator[None]:
    if level != "DEBUG":
        # one line a task from a library that does not know which step it is
        for noisy in ("taskiq", "aio_pika", "aiormq"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
    with log_to_standard_error(level, "%(asctime)s %(levelname)s %(message)s"):
        yield
