"""What a Redis or Valkey server says of itself, and what happened between two looks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import redis

#: Commands of ours that reach the server by themselves and not inside a script.
_SCRIPT_CALLS = ("eval", "evalsha")


@dataclass(frozen=True)
class RedisStats:
    """Counters since the server's start, and what holds at the moment of the look.

    Attributes:
        commands: also those that scripts call.
        requests: reads from a connection that had something: about the round trips.
        script_calls: of all kinds.
        connections, memory_bytes, client_memory_bytes, file_bytes: now; the last is the
            append-only file's.
        at_seconds: the server's own clock.
    """

    commands: int
    requests: int
    script_calls: int
    input_bytes: int
    output_bytes: int
    cpu_seconds: float
    connections: int
    memory_bytes: int
    client_memory_bytes: int
    file_bytes: int
    at_seconds: float

    @classmethod
    def look(cls, client: redis.Redis) -> RedisStats:
        """Ask the server."""
        seconds, microseconds = client.time()
        return cls.from_info(
            cast("Mapping[str, Any]", client.info("everything")), seconds + microseconds / 1e6
        )

    @classmethod
    def from_info(cls, info: Mapping[str, Any], at_seconds: float) -> RedisStats:
        """From what redis-py makes of ``INFO everything``."""
        calls = [info.get(f"cmdstat_{name}", {}).get("calls", 0) for name in _SCRIPT_CALLS]
        return cls(
            commands=info["total_commands_processed"],
            requests=info["total_reads_processed"],
            script_calls=sum(calls),
            input_bytes=info["total_net_input_bytes"],
            output_bytes=info["total_net_output_bytes"],
            cpu_seconds=info["used_cpu_user"] + info["used_cpu_sys"],
            connections=info["connected_clients"],
            memory_bytes=info["used_memory"],
            client_memory_bytes=info.get("mem_clients_normal", 0),
            file_bytes=info.get("aof_current_size", 0),
            at_seconds=at_seconds,
        )

    def since(self, before: RedisStats) -> dict[str, float]:
        """What happened since an earlier look, as counts."""
        return {
            "redis_commands": self.commands - before.commands,
            "redis_requests": self.requests - before.requests,
            "redis_script_calls": self.script_calls - before.script_calls,
            "redis_input_bytes": self.input_bytes - before.input_bytes,
            "redis_output_bytes": self.output_bytes - before.output_bytes,
            "redis_cpu_seconds": self.cpu_seconds - before.cpu_seconds,
            "redis_memory_bytes": self.memory_bytes - before.memory_bytes,
            "redis_file_bytes": self.file_bytes - before.file_bytes,
        }


def server_name(client: redis.Redis) -> str:
    """The server's kind and version."""
    info = cast("Mapping[str, Any]", client.info("server"))
    if "valkey_version" in info:
        return f"Valkey {info['valkey_version']}"
    return f"Redis {info['redis_version']}"
