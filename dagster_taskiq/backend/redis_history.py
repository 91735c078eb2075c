"""The Redis backend's history of ended attempts, and its counters."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from dagster_taskiq.backend.history import BATCH_EXPIRES_SECONDS, HistoryBackend
from dagster_taskiq.backend.redis_store import RedisStore, text_of
from dagster_taskiq.defaults import HISTORY_ENDS, HISTORY_EXPIRES_SECONDS
from dagster_taskiq.messages.attempt_ends import (
    AttemptEnd,
    Counter,
    EndGroup,
    HistoryBatch,
    readable_counts,
    readable_ends,
    write_counter,
    write_end,
)
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.servers.redis_calls import Script
from dagster_taskiq.servers.redis_rights import commands_of

#: Each group has a list of its own, by its place here.
_GROUPS = tuple(EndGroup)

#: KEYS batch, counts, the list of each group. ARGV how long the batch is known in s, how many ends
#: are kept, for how long in s, how many counters grow; the name of each and by how much; then for
#: each group how many ends it gets, and these.
#:
#: What none of ours has put there under one of the keys makes room.
_ADD = Script(
    """
if not redis.call('SET', KEYS[1], '1', 'NX', 'EX', ARGV[1]) then return 0 end
local next = 5
for _ = 1, tonumber(ARGV[4]) do
  local name, by = ARGV[next], ARGV[next + 1]
  if type(redis.pcall('HINCRBY', KEYS[2], name, by)) ~= 'number' then
    if type(redis.pcall('HDEL', KEYS[2], name)) ~= 'number' then redis.call('DEL', KEYS[2]) end
    redis.call('HINCRBY', KEYS[2], name, by)
  end
  next = next + 2
end
for index = 3, #KEYS do
  local list, last = KEYS[index], next + tonumber(ARGV[next])
  if last > next then
    if type(redis.pcall('LPUSH', list, unpack(ARGV, next + 1, last))) ~= 'number' then
      redis.call('DEL', list)
      redis.call('LPUSH', list, unpack(ARGV, next + 1, last))
    end
    redis.call('LTRIM', list, 0, ARGV[2] - 1)
    redis.call('EXPIRE', list, ARGV[3])
  end
  next = last + 1
end
return 1
"""
)

#: What the user of the server must be allowed.
COMMANDS = commands_of([_ADD.text])


class RedisHistory(HistoryBackend):
    """See ``HistoryBackend``.

    An end goes from its list when newer ones have pushed it out, and when none was added for as
    long as ends are kept; readers leave out what is older.
    """

    _store: RedisStore
    _signer: Signer

    async def add_history(self, batch: HistoryBatch) -> None:
        """See ``HistoryBackend``."""
        arguments: list[Any] = [BATCH_EXPIRES_SECONDS, HISTORY_ENDS, HISTORY_EXPIRES_SECONDS]
        arguments.append(len(batch.counts))
        for counter, count in batch.counts.items():
            arguments += [write_counter(counter), count]
        for group in _GROUPS:
            # more would push each other out, and are more than a script can take at once
            ends = [end for end in batch.ends if end.group is group][-HISTORY_ENDS:]
            arguments += [len(ends), *(write_end(self._signer, end) for end in ends)]
        keys = [self._store.key("batch:", batch.batch_id), self._counts, *self._lists]
        await self._store.run(_ADD, keys, arguments)

    async def ended(self, most: int = HISTORY_ENDS) -> list[AttemptEnd]:
        """See ``HistoryBackend``."""
        if most < 1:
            return []
        commands = [("LRANGE", key, 0, most - 1) for key in self._lists]
        lists = await self._store.run_all(commands)
        stored = [data for found in lists for data in found]
        return readable_ends(self._signer, stored, time.time())

    async def counts(self) -> dict[Counter, int]:
        """See ``HistoryBackend``."""
        (found,) = await self._store.run_all([("HGETALL", self._counts)])
        counts = {}
        for name, value in found.items():
            with suppress(ValueError):
                counts[text_of(name)] = int(value)
        return readable_counts(counts)

    @property
    def _counts(self) -> str:
        return self._store.key("counts")

    @property
    def _lists(self) -> list[str]:
        return [self._store.key("history:", group.value) for group in _GROUPS]
