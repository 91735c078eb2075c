"""How a Redis or Valkey is set."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

from dagster_taskiq.servers.facts import RedisFacts
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq.servers.redis_client import open_redis, server_errors


async def read_redis_facts(options: ServerOptions) -> RedisFacts:
    """See ``facts.read_facts``."""
    redis = open_redis(options, timeout_seconds=options.connect_timeout_seconds)
    with server_errors(options.address):
        async with aclosing(redis):
            info: Any = await redis.info()
    # not by TIME, for which a user may have no right
    microseconds = info.get("server_time_usec")
    return RedisFacts(
        role=str(info.get("role", "master")),
        is_cluster=bool(info.get("cluster_enabled", 0)),
        has_log=bool(info.get("aof_enabled", 0)),
        memory_limit_bytes=int(info.get("maxmemory", 0)),
        eviction=str(info.get("maxmemory_policy", "noeviction")),
        clock=microseconds / 1e6 if microseconds else None,
    )
