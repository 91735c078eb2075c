"""What runs hold back, on Redis: a field of the run's record, behind the token of its loop."""

from __future__ import annotations

from typing import Any

from dagster_taskiq.backend.redis_store import RedisStore
from dagster_taskiq.backend.withheld import WithheldBackend
from dagster_taskiq.defaults import RUN_RECORD_EXPIRES_SECONDS
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.messages.withheld_steps import Withheld, read_withheld, write_withheld
from dagster_taskiq.servers.redis_calls import Script

#: KEYS record, loop. ARGV token, what the loop holds back, record expiry s. Returns 1, or 0 where
#: the run has not that loop.
TELL = Script(
    """
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
if ARGV[2] == '' then
  redis.call('HDEL', KEYS[1], 'withheld')
else
  redis.call('HSET', KEYS[1], 'withheld', ARGV[1] .. ' ' .. ARGV[2])
  redis.call('EXPIRE', KEYS[1], ARGV[3])
end
return 1
"""
)


class RedisWithheld(WithheldBackend):
    """See ``WithheldBackend``."""

    _store: RedisStore
    _signer: Signer

    async def tell_withheld(self, run_id: str, withheld: Withheld, *, token: str) -> bool:
        """See ``WithheldBackend``."""
        data = write_withheld(self._signer, run_id, withheld) if withheld != Withheld() else b""
        keys = [self._store.record(run_id), self._store.loop(run_id)]
        arguments = [token, data, RUN_RECORD_EXPIRES_SECONDS]
        return bool(await self._store.run(TELL, keys, arguments))

    def _withheld_of(self, run_id: str, record: dict[bytes, bytes], loop: Any) -> Withheld:
        """What is told of a run.

        Args:
            record: of the run.
            loop: the token of its living loop; None where it has none.
        """
        token, _, data = record.get(b"withheld", b"").partition(b" ")
        return read_withheld(self._signer, run_id, data if token == loop else b"")
