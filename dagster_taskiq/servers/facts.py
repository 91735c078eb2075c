"""What a server says of how it is set, as the doctor asks it; no client library is needed here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dagster_taskiq.servers.kinds import ServerOptions


@dataclass(frozen=True)
class RedisFacts:
    """Of a Redis or Valkey, by its ``INFO``.

    Attributes:
        role: ``master``, or ``slave`` for a replica.
        is_cluster: whether it is a node of a cluster, where keys are spread over nodes.
        has_log: whether it writes an append-only file.
        memory_limit_bytes: 0 without a limit.
        eviction: what it does at that limit, ``noeviction`` or another policy.
        clock: its time, in seconds since the epoch; None from a release that does not say.
    """

    role: str
    is_cluster: bool
    has_log: bool
    memory_limit_bytes: int
    eviction: str
    clock: float | None


@dataclass(frozen=True)
class PostgresqlFacts:
    """Of a PostgreSQL.

    Attributes:
        version: ``server_version_num``: 150004 for 15.4.
        max_connections: that it takes from users who are no superusers.
        is_standby: whether it replays the log of another one.
        is_read_only: whether transactions of the user are read-only unless they say otherwise.
        has_fsync: whether a commit is on the disk when it returns.
        is_pooled: whether a pooler lies between: who answers is not who we connected to.
        clock: its time, in seconds since the epoch.
    """

    version: int
    max_connections: int
    is_standby: bool
    is_read_only: bool
    has_fsync: bool
    is_pooled: bool
    clock: float


async def read_facts(options: ServerOptions, role: str) -> Any:
    """The facts of a server, of the type of its kind; None for a kind without any.

    Args:
        role: of the server, for errors.

    Raises:
        ServerError: it is away or refuses.
        ConfigError: its client library is not installed.
    """
    name = options.kind.facts
    return await options.load(name, role)(options) if name else None
