"""Everything that is counted while real steps are executed, at one moment."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

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
SELECT xact_commit AS commits, sessions, tup_inserted AS rows,
       pg_current_wal_lsn() - '0/0' AS wal_bytes,
       pg_total_relation_size('event_logs') AS table_bytes,
       (SELECT count(*) FROM event_logs) AS event_rows,
       (SELECT coalesce(sum(pg_column_size(event)), 0) FROM event_logs) AS event_bytes
FROM pg_stat_database WHERE datname = current_database()
"""

#: Connections of clients to the database but for the one that asks; autovacuum has some too.
CONNECTIONS = """
SELECT count(*) AS connections FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
      AND backend_type = 'client backend'
"""

#: Asks for one row; its figures by the names of their columns.
Ask = Callable[[str], dict[str, float]]


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
        time.sleep(POSTGRES_SETTLE_SECONDS)
        with session(self.postgres_url) as ask:
            postgres = ask(_POSTGRES)
        postgres["cpu_seconds"] = cpu_seconds(tree(self.postgres_pid), with_past=True)
        with redis.Redis.from_url(self.redis_url) as client:
            counts = {"postgres": postgres, "redis": RedisStats.look(client).counts}
        if self.rabbitmq_pid is not None and self.amqp is not None:
            used = cpu_seconds(tree(self.rabbitmq_pid), with_past=True)
            counts["amqp"] = {"cpu_seconds": used, **self.amqp.counts}
        return {f"{server}_{name}": it for server in counts for name, it in counts[server].items()}

    def connections(self) -> dict[str, float]:
        """Connections now, but for those that ask."""
        with session(self.postgres_url) as ask, redis.Redis.from_url(self.redis_url) as client:
            return {
                "postgres_connections": ask(CONNECTIONS)["connections"],
                "redis_connections": RedisStats.look(client).info["connected_clients"] - 1,
                "amqp_connections": self.tap.connections if self.tap else 0,
            }

    def record_bytes(self, run_id: str) -> int:
        """Memory that the record of a run takes, which outlives the run."""
        with redis.Redis.from_url(self.redis_url) as client:
            keys = client.scan_iter(match=f"*:run:{run_id}", count=1000)
            return sum(int(client.memory_usage(key, samples=0) or 0) for key in keys)


@contextmanager
def session(url: str) -> Iterator[Ask]:
    """A connection to PostgreSQL, as a function that answers with one row."""
    with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        connection.autocommit = True

        def ask(statement: str) -> dict[str, float]:
            cursor.execute(statement)
            names = [column.name for column in cursor.description]
            return dict(zip(names, map(float, cursor.fetchone()), strict=True))

        yield ask


def difference(after: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """What happened between two looks."""
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


def children_of(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """The children of a worker's slots; the first of the processes is the worker itself.

    Raises:
        FailedError: there are none.
    """
    worker, *others = processes
    own = worker.cmdline()
    # the fork server is a fork of the worker, or the standard library has started it
    forked = [it for it in others if it.cmdline() == own or "forkserver" in str(it.cmdline())]
    if not forked:
        raise FailedError("The worker has no children to be counted.")
    return forked
