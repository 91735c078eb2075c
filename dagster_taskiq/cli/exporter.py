"""``exporter``: metrics of what belongs to no worker."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import click

from dagster_taskiq.cli.monitoring import DEFAULT_HOST, load_metrics
from dagster_taskiq.cli.options import config_yaml_option, read_settings, say_errors
from dagster_taskiq.cli.queues import queue_option
from dagster_taskiq.connections import find_running_servers
from dagster_taskiq.worker.log_writer import log_to_standard_error

logger = logging.getLogger(__name__)


@click.command("exporter")
@click.option(
    "--port",
    "-p",
    type=click.IntRange(0, 65535),
    required=True,
    help="Port of the page /metrics; 0 picks a free one.",
)
@click.option(
    "--host",
    default=DEFAULT_HOST,
    show_default=True,
    help="Address to listen on; 0.0.0.0 lets other hosts in.",
)
@queue_option
@config_yaml_option
@say_errors
def exporter(port: int, host: str, queues: tuple[str, ...], config_yaml: str | None) -> None:
    """Serve metrics of queues, workers and servers for Prometheus, until it is told to stop.

    They are read from the servers when they are scraped, so one exporter is enough for a
    deployment. With it a queue without any worker is seen, and can be scaled from zero.
    """
    make = load_metrics("exporter:Exporter")
    settings = read_settings(config_yaml)
    find_running_servers(settings)  # so that a mistake in the settings ends the command
    names = dict.fromkeys([settings.default_queue, *queues])
    with (
        _signals_kept() as wait_for_one,
        log_to_standard_error("INFO", "%(asctime)s %(levelname)s %(message)s"),
        closing(make(host, port, lambda: find_running_servers(settings), names)) as served,
    ):
        served.start()
        logger.info(
            "Metrics are on %s/metrics, health on /health, the demand of queues on /demand.",
            served.url,
        )
        served.read()  # says in the log which server is away
        wait_for_one()
        logger.info("Stopping.")


@contextmanager
def _signals_kept() -> Iterator[Callable[[], object]]:
    """Have SIGINT and SIGTERM wait until they are asked for.

    For all threads that are started meanwhile: a handler that wakes the main thread could find it
    holding the very lock that it needs for that.
    """
    numbers = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield lambda: signal.sigwait(numbers)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
