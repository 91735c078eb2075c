"""Arguments of ``celery worker`` that teams pass after ``--``, read for what they mean here."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterable, Sequence
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


#: Options of ``celery worker`` (5.6) that mean nothing here, and whether each takes a value.
_MEANINGLESS = {
    "--autoscale": True,
    "--detach": False,
    "--executable": True,
    "--gid": True,
    "--heartbeat-interval": True,
    "--logfile": True,
    "--optimization": True,
    "--pidfile": True,
    "--pool": True,
    "--prefetch-multiplier": True,
    "--purge": False,
    "--scheduler": True,
    "--schedule-filename": True,
    "--statedb": True,
    "--task-events": False,
    "--uid": True,
    "--umask": True,
    "--without-gossip": False,
    "--without-heartbeat": False,
    "--without-mingle": False,
    "--disable-prefetch": False,
    "--exclude-queues": True,
    "--beat": False,
    "-B": False,
    "-E": False,
    "-O": True,
    "-P": True,
    "-X": True,
    "-s": True,
    "-S": True,
    "-f": True,
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
    parser.add_argument("-l", "--loglevel")
    parser.add_argument("--max-tasks-per-child", type=_count)
    parser.add_argument("--max-memory-per-child", type=_count)
    parser.add_argument("--soft-time-limit", type=_seconds)
    parser.add_argument("--time-limit", type=_seconds)
    for option, takes_value in _MEANINGLESS.items():
        action = "store" if takes_value else "store_true"
        parser.add_argument(option, action=action, dest=option)
    values, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        raise ConfigError(f"Not an argument of a Celery worker: {' '.join(unknown)}.")
    for option in _MEANINGLESS:
        if getattr(values, option):
            warnings.warn(f"Celery's {option} means nothing here; it is ignored.", stacklevel=2)
    return CeleryArguments(
        name=values.hostname.partition("@")[0] if values.hostname else None,
        queues=split_names(values.queues),
        include=split_names(values.include),
        concurrency=values.concurrency,
        log_level=values.loglevel,
        max_tasks_per_child=values.max_tasks_per_child,
        max_memory_per_child=values.max_memory_per_child,
        soft_time_limit=values.soft_time_limit,
        time_limit=values.time_limit,
    )


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
