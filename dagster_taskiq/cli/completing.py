"""What a shell completes: names of workers and of queues, as the backend has them now.

The shell waits meanwhile, so whatever fails, or takes too long, is no name and no word.
"""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import click
from click.shell_completion import CompletionItem

from dagster_taskiq.cli.asking import ask_servers
from dagster_taskiq.cli.options import read_settings
from dagster_taskiq.connections import find_running_servers
from dagster_taskiq.messages.worker_records import WorkerRecord

#: How long a shell waits for the backend's answer.
ANSWER_SECONDS = 1.0


def complete_worker(
    context: click.Context, _: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Names of workers: without their host where one alone has it, and hosts behind an ``@``."""
    records, _default = _ask(context)
    own = Counter(it.name.partition("@")[0] for it in records)
    found: dict[str, str] = {}
    for record in records:
        name, _at, host = record.name.partition("@")
        if incomplete.startswith("@"):
            found[f"@{host}"] = ""
        elif "@" in incomplete or own[name] > 1:
            found[record.name] = ", ".join(record.queues)
        else:
            found[name] = f"{host}: {', '.join(record.queues)}"
    return _items(found, incomplete)


def complete_queue(
    context: click.Context, _: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Names of the queues on which workers listen, and of the default one."""
    records, default = _ask(context)
    served = Counter(queue for it in records for queue in it.queues)
    found = {default: "no worker"} if default else {}
    found |= {queue: f"workers: {count}" for queue, count in served.items()}
    return _items(found, incomplete)


def _items(found: dict[str, str], incomplete: str) -> list[CompletionItem]:
    names = sorted(it for it in found if it.startswith(incomplete))
    return [CompletionItem(name, help=found[name] or None) for name in names]


def _ask(context: click.Context) -> tuple[Sequence[WorkerRecord], str]:
    """The workers, and the default queue's name; nothing where that cannot be told."""
    with suppress(Exception), _silence():
        settings = read_settings(context.params.get("config_yaml"))
        servers = find_running_servers(settings)
        if servers is None:
            return [], settings.default_queue
        with _time_limit(ANSWER_SECONDS):
            return ask_servers(servers, lambda it: it.workers()), settings.default_queue
    return [], ""


@contextmanager
def _silence() -> Iterator[None]:
    """Keep what would be written into the line that somebody is typing."""
    logging.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """End the process without a word after that time.

    Nothing else is sure to: a thread that looks up the name of a host cannot be interrupted, and
    Python waits for it at its end.
    """
    before = signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
