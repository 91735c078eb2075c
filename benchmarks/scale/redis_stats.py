"""What a Redis or Valkey server says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import redis

#: Counters since the server's start, by their names in ``INFO``: commands are also those that
#: scripts call, and requests are reads from a connection that had something, so about round trips.
_COUNTERS = {
    "commands": "total_commands_processed",
    "requests": "total_reads_processed",
    "input_bytes": "total_net_input_bytes",
    "output_bytes": "total_net_output_bytes",
    "memory_bytes": "used_memory",
    "file_bytes": "aof_current_size",
}

_RATES = ("commands", "requests", "script_calls", "input_bytes", "output_bytes")


@dataclass(frozen=True)
class RedisStats:
    """One answer of a server about itself.

    Attributes:
        info: ``INFO everything``, as redis-py reads it.
        at_seconds: the server's own clock.
    """

    info: Mapping[str, Any]
    at_seconds: float

    @classmethod
    def look(cls, client: redis.Redis) -> RedisStats:
        """Ask the server."""
        seconds, microseconds = client.time()
        info = cast("Mapping[str, Any]", client.info("everything"))
        return cls(info, seconds + microseconds / 1e6)

    @property
    def server(self) -> str:
        """The server's kind and version."""
        if "valkey_version" in self.info:
            return f"Valkey {self.info['valkey_version']}"
        return f"Redis {self.info['redis_version']}"

    @property
    def counts(self) -> dict[str, float]:
        """What is counted; what happened is the difference of two looks."""
        scripts = [self.info.get(f"cmdstat_{name}", {}) for name in ("eval", "evalsha")]
        return {
            **{name: self.info.get(key, 0) for name, key in _COUNTERS.items()},
            "script_calls": sum(it.get("calls", 0) for it in scripts),
            "cpu_seconds": self.info["used_cpu_user"] + self.info["used_cpu_sys"],
        }

    def figures_since(self, before: RedisStats) -> dict[str, Any]:
        """What happened in each second since an earlier look, and what holds now."""
        seconds, counts = self.at_seconds - before.at_seconds, before.counts
        rates = {name: (count - counts[name]) / seconds for name, count in self.counts.items()}
        return {
            "server": self.server,
            **{f"{name}_per_s": rates[name] for name in _RATES},
            "cpu_percent": 100 * rates["cpu_seconds"],
            "connections": self.info["connected_clients"],
            "memory_bytes": self.info["used_memory"],
            "client_memory_bytes": self.info.get("mem_clients_normal", 0),
        }
