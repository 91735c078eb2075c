"""Arguments of Celery's commands that teams pass after ``--``, read for what they mean here."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dagster_taskiq.defaults import LONGEST_TIME_LIMIT_SECONDS
from dagster_taskiq.errors import ConfigError


@dataclass(frozen=True)
class CeleryArguments:
    """What of Celery's command line has a meaning here; None or empty where it was not given."""

    name: str | None
    queues: tuple[str, ...]
    include: tuple[str, ...]
    concurrency: int | None
    log_level: str | None
    max_tasks_per_child: int | None
    max_memory_per_child: int | None
    soft_time_limit: float | None
    time_limit: float | None


#: Options of ``celery worker`` (5.6) that mean nothing here, in all their spellings, and whether
#: each takes a value.
_MEANINGLESS: Mapping[tuple[str, ...], bool] = {
    ("--autoscale",): True,
    ("--beat", "-B"): False,
    ("--detach", "-D"): False,
    ("--disable-prefetch",): False,
    ("--exclude-queues", "-X"): True,
    ("--executable",): True,
    ("--gid",): True,
    ("--heartbeat-interval",): True,
    ("--logfile", "-f"): True,
    ("--optimization", "-O"): True,
    ("--pidfile",): True,
    ("--pool", "-P"): True,
    ("--pool-start-method",): True,
    ("--prefetch-multiplier",): True,
    ("--purge", "--discard"): False,
    ("--schedule-filename", "--schedule", "-s"): True,
    ("--scheduler",): True,
    ("--statedb", "-S"): True,
    ("--task-events", "--events", "-E"): False,
    ("--uid",): True,
    ("--umask",): True,
    ("--without-gossip",): False,
    ("--without-heartbeat",): False,
    ("--without-mingle",): False,
}

#: The same for ``celery status``.
_MEANINGLESS_FOR_STATUS: Mapping[tuple[str, ...], bool] = {
    ("--timeout", "-t"): True,
    ("--json", "-j"): False,
}

#: Celery's names of log levels, and Python's for them.
LOG_LEVELS = {
    "CRITICAL": "CRITICAL",
    "FATAL": "CRITICAL",
    "ERROR": "ERROR",
    "WARNING": "WARNING",
    "INFO": "INFO",
    "DEBUG": "DEBUG",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError(f"Cannot read the Celery arguments after --: {message}.")


def read_celery_arguments(arguments: Sequence[str]) -> CeleryArguments:
    """Read what follows ``--``; warns of each argument that means nothing here.

    Raises:
        ConfigError: an argument is none of Celery's, or its value is of the wrong type.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("-n", "--hostname")
    parser.add_argument("-Q", "--queues", action="append", default=[])
    parser.add_argument("-I", "--include", action="append", default=[])
    parser.add_argument("-c", "--concurrency", type=_count)
    parser.add_argument("-l", "--loglevel", type=str.upper, choices=LOG_LEVELS)
    parser.add_argument("--max-tasks-per-child", type=_count)
    parser.add_argument("--max-memory-per-child", type=_count)
    parser.add_argument("--soft-time-limit", type=_seconds)
    parser.add_argument("--time-limit", type=_seconds)
    values = _parse(parser, _MEANINGLESS, arguments)
    return CeleryArguments(
        name=values.hostname.partition("@")[0] if values.hostname else None,
        queues=split_names(values.queues),
        include=split_names(values.include),
        concurrency=values.concurrency,
        log_level=LOG_LEVELS[values.loglevel] if values.loglevel else None,
        max_tasks_per_child=values.max_tasks_per_child,
        max_memory_per_child=values.max_memory_per_child,
        soft_time_limit=values.soft_time_limit,
        time_limit=values.time_limit,
    )


def read_status_arguments(arguments: Sequence[str]) -> tuple[str, ...]:
    """The names that Celery's ``status`` is asked for, of what follows ``--``; none means all.

    Raises:
        ConfigError: an argument is none of Celery's.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("-d", "--destination", action="append", default=[])
    return split_names(_parse(parser, _MEANINGLESS_FOR_STATUS, arguments).destination)


def _parse(
    parser: argparse.ArgumentParser,
    meaningless: Mapping[tuple[str, ...], bool],
    arguments: Sequence[str],
) -> argparse.Namespace:
    """Parse the arguments, with a warning for each that means nothing here."""
    for spellings, takes_value in meaningless.items():
        action = "store" if takes_value else "store_true"
        parser.add_argument(*spellings, action=action, dest=spellings[0])
    values, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        raise ConfigError(f"Not an argument of Celery's: {' '.join(unknown)}.")
    for spellings in meaningless:
        if getattr(values, spellings[0]):
            names = " or ".join(spellings)
            warnings.warn(f"Celery's {names} means nothing here; it is ignored.", stacklevel=3)
    return values


def _count(text: str) -> int:
    count = int(text)
    if count < 0:  # 0 is Celery's word for its default, as it is for ours
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return count


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds <= LONGEST_TIME_LIMIT_SECONDS:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return seconds


def split_names(values: Iterable[str]) -> tuple[str, ...]:
    """The names that an option gives which may be repeated and may hold several with commas."""
    return tuple(item.strip() for value in values for item in value.split(",") if item.strip())
