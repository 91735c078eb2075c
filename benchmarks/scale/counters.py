"""Everything that is counted while real steps are executed, at one moment."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psutil
import psycopg2  # type: ignore[import-untyped]
import redis

from benchmarks.processes import FailedError, cpu_seconds, tree
from benchmarks.scale.amqp_counts import AmqpCounts
from benchmarks.scale.redis_stats import RedisStats
from dagster_taskiq_tests.proxy import Proxy

#: PostgreSQL's own counters come up to half a second late, and longer for a session that waits.
POSTGRES_SETTLE_SECONDS = 1.5

_POSTGRES = """
SELECT xact_commit, sessions, tup_inserted,
       pg_current_wal_lsn() - '0/0',
       pg_total_relation_size('event_logs'),
       (SELECT count(*) FROM event_logs),
       (SELECT coalesce(sum(pg_column_size(event)), 0) FROM event_logs)
FROM pg_stat_database WHERE datname = current_database()
"""
_POSTGRES_NAMES = (
    "postgres_commits",
    "postgres_sessions",
    "postgres_rows",
    "postgres_wal_bytes",
    "postgres_table_bytes",
    "postgres_event_rows",
    "postgres_event_bytes",
)

_CONNECTIONS = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
"""


#: Asks for one row.
Ask = Callable[[str], Sequence[Any]]


@dataclass(frozen=True)
class Servers:
    """The servers of a measurement, which nobody else uses; the last two are RabbitMQ's, if any."""

    redis_url: str
    postgres_url: str
    postgres_pid: int
    rabbitmq_pid: int | None = None
    amqp: AmqpCounts | None = None
    tap: Proxy | None = None

    def count(self) -> dict[str, float]:
        """All counters of the servers; what happened is the difference of two looks."""
        counts: dict[str, float] = {**self._count_postgres()}
        with redis.Redis.from_url(self.redis_url) as client:
            # from nothing, so that what is a level becomes a difference too
            counts |= RedisStats.look(client).since(_NOTHING)
        counts["postgres_cpu_seconds"] = _cpu_with_past_children(self.postgres_pid)
        if self.rabbitmq_pid is not None and self.amqp is not None:
            counts["amqp_cpu_seconds"] = _cpu_with_past_children(self.rabbitmq_pid)
            counts |= {f"amqp_{name}": count for name, count in self.amqp.counts.items()}
        return counts

    def _count_postgres(self) -> dict[str, float]:
        time.sleep(POSTGRES_SETTLE_SECONDS)
        with session(self.postgres_url) as ask:
            values = ask(_POSTGRES)
        return {name: float(value) for name, value in zip(_POSTGRES_NAMES, values, strict=True)}

    def postgres_connections(self, ask: Ask | None = None) -> int:
        """Connections to the database but for the one that asks."""
        if ask is not None:
            return int(ask(_CONNECTIONS)[0])
        with session(self.postgres_url) as own:
            return int(own(_CONNECTIONS)[0])

    def record_bytes(self, run_id: str) -> int:
        """Memory that the record of a run takes, which outlives the run."""
        with redis.Redis.from_url(self.redis_url) as client:
            keys = client.scan_iter(match=f"*:run:{run_id}", count=1000)
            return sum(int(client.memory_usage(key, samples=0) or 0) for key in keys)

    def redis_connections(self) -> int:
        """Connections but for the one that asks."""
        with redis.Redis.from_url(self.redis_url) as client:
            return RedisStats.look(client).connections - 1


@contextmanager
def session(url: str) -> Iterator[Ask]:
    """A connection to PostgreSQL, as a function that answers with one row."""
    connection = psycopg2.connect(url)
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:

            def ask(statement: str) -> Sequence[Any]:
                cursor.execute(statement)
                row: Sequence[Any] = cursor.fetchone()
                return row

            yield ask
    finally:
        connection.close()


_NOTHING = RedisStats(0, 0, 0, 0, 0, 0.0, 0, 0, 0, 0, 0.0)


def difference(after: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """What happened between two looks."""
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


def _cpu_with_past_children(pid: int) -> float:
    """CPU seconds of a process and all below it, also of those that it has seen the end of."""
    total = 0.0
    for process in tree(pid):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


@dataclass(frozen=True)
class WorkerUse:
    """What a worker's processes have used and hold; the children are those of its slots."""

    worker_cpu_seconds: float
    child_cpu_seconds: float
    worker_files: int
    child_files: int
    children: int

    @classmethod
    def look(cls, processes: Sequence[psutil.Process]) -> WorkerUse:
        """The first of the processes is the worker itself."""
        worker, *others = processes
        own = worker.cmdline()
        # the fork server is a fork of the worker, or the standard library has started it
        forked = [it for it in others if it.cmdline() == own or "forkserver" in str(it.cmdline())]
        if not forked:
            raise FailedError("The worker has no children to be counted.")
        return cls(
            cpu_seconds([worker]),
            cpu_seconds(forked),
            worker.num_fds(),
            max(process.num_fds() for process in forked),
            len(forked),
        )
