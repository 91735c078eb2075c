"""The Redis broker's keys, and its Lua scripts, each of which is one atomic step.

A physical queue has these keys, and none of them while it is empty:

``<queue>:waiting``
    sorted set of the waiting task ids; the score is the task's place in the queue, made of its
    priority and of the number under which it was sent.
``<queue>:payloads``
    hash of the messages of waiting tasks and of those in hand.
``<queue>:in-hand``
    sorted set of the ids that a worker has taken and not settled; the score is the time (that of
    the server, in microseconds) at which its worker is held to be dead. A living one puts it off.
``<queue>:places``
    hash of the places that the tasks in hand go back to.
``<queue>:bell``
    list that idle workers block on. It has an element, without meaning of its own, for each
    waiting task up to ``BELL_LIMIT``, and at least one while a task waits.

``<key prefix>.sequence`` counts the tasks ever sent. No suffix ends in another one, so that no
name of a queue can make two queues share a key.

A script has the keys of a queue in the order of ``keys_of``.
"""

from __future__ import annotations

from dagster_taskiq.defaults import MAX_PRIORITY
from dagster_taskiq.servers.redis_calls import Script

#: How many rings a bell holds. More idle workers than that are woken by one another.
BELL_LIMIT = 1000


def keys_of(queue: str) -> tuple[str, ...]:
    """The keys of a physical queue."""
    return tuple(f"{queue}:{part}" for part in ("waiting", "payloads", "in-hand", "places", "bell"))


def priority_at(place: float) -> int:
    """The priority of a task by its place in its queue."""
    return MAX_PRIORITY - int(place // 2**48)


def places_of(priority: int) -> tuple[int, int]:
    """The first and the last place that a task of a priority can have."""
    first = (MAX_PRIORITY - priority) * 2**48
    return first, first + 2**48 - 1


# A server that is full, read-only or cannot write its file refuses the first write of a script or
# none, so no script stops halfway. A script that frees memory begins with a command that a full
# server allows.
#
# A place is exact in a double: (10 - priority) * 2^48 + the number, which stays below 2^52.
_PRELUDE = f"""
local function queue_at(first)
  return {{waiting = KEYS[first], payloads = KEYS[first + 1], in_hand = KEYS[first + 2],
           places = KEYS[first + 3], bell = KEYS[first + 4]}}
end

local function has_place(queue, id)
  return redis.call('ZSCORE', queue.waiting, id) or redis.call('ZSCORE', queue.in_hand, id)
end

-- Ring as often as said, and keep the bell in step with what waits. Blocked workers are served
-- when the script has ended, so what they find is what this leaves.
local function ring(queue, times)
  local depth = redis.call('ZCARD', queue.waiting)
  if depth == 0 then
    redis.call('DEL', queue.bell)
    return
  end
  local limit = math.min(depth, {BELL_LIMIT})
  for _ = 1, math.min(times, limit) do
    redis.call('RPUSH', queue.bell, '')
  end
  redis.call('LTRIM', queue.bell, 0, limit - 1)
  if redis.call('LLEN', queue.bell) == 0 then
    redis.call('RPUSH', queue.bell, '')
  end
end

-- From a worker's hands to where the task was taken from.
local function give_back(queue, id)
  local place = redis.call('HGET', queue.places, id)
  redis.call('ZREM', queue.in_hand, id)
  redis.call('HDEL', queue.places, id)
  if place then
    redis.call('ZADD', queue.waiting, place, id)
  end
end
"""


def _script(body: str) -> Script:
    return Script(_PRELUDE + body)


# KEYS: the queue, the sequence. ARGV: id, priority and payload of each task.
# A task that waits or is in hand already stays where it is: the sender was not sure.
SEND = _script(f"""
local queue, sent = queue_at(1), 0
for i = 1, #ARGV, 3 do
  local id, priority, payload = ARGV[i], tonumber(ARGV[i + 1]), ARGV[i + 2]
  redis.call('HSETNX', queue.payloads, id, payload)
  if not has_place(queue, id) then
    local place = ({MAX_PRIORITY} - priority) * 2^48 + redis.call('INCR', KEYS[6])
    redis.call('ZADD', queue.waiting, string.format('%.0f', place), id)
    sent = sent + 1
  end
end
ring(queue, sent)
""")

# KEYS: the queues, in the order to look at them. ARGV: microseconds that a task may be in hand.
# Returns which queue had one (from 0), the task's id, its payload, and the token of this delivery.
# Before it looks, it gives back what dead workers of the queue had in hand.
TAKE = _script("""
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
for first = 1, #KEYS, 5 do
  local queue = queue_at(first)
  local dead = redis.call('ZRANGEBYSCORE', queue.in_hand, '-inf', now, 'LIMIT', 0, 100)
  for _, id in ipairs(dead) do
    give_back(queue, id)
  end
  local best = redis.call('ZPOPMIN', queue.waiting)
  while best[1] do
    local id, place = best[1], best[2]
    local payload = redis.call('HGET', queue.payloads, id)
    if payload then
      local token = string.format('%.0f', now + ARGV[1])
      redis.call('ZADD', queue.in_hand, token, id)
      redis.call('HSET', queue.places, id, place)
      ring(queue, #dead)
      return {(first - 1) / 5, id, payload, token}
    end
    -- only a server that evicts keys loses a payload; the sender sees the task as absent
    best = redis.call('ZPOPMIN', queue.waiting)
  end
  ring(queue, 0)
end
return false
""")

# KEYS: the queue. ARGV: microseconds that a task may be in hand, then the id and the token of each
# delivery. Returns the deliveries' new tokens, empty for a task that is in other hands by now.
HOLD = _script("""
local queue, tokens = queue_at(1), {}
local time = redis.call('TIME')
local token = string.format('%.0f', time[1] * 1000000 + time[2] + ARGV[1])
for i = 2, #ARGV, 2 do
  local known = redis.call('ZSCORE', queue.in_hand, ARGV[i])
  local is_held = known and tonumber(known) == tonumber(ARGV[i + 1])
  if is_held then
    redis.call('ZADD', queue.in_hand, token, ARGV[i])
  end
  table.insert(tokens, is_held and token or '')
end
return tokens
""")

# KEYS: the queue. ARGV: the id. Wherever it is: a worker that was slow to ack has claimed the task,
# so a copy that went back to its queue meanwhile is of no use to anybody.
ACK = _script("""
local queue, id = queue_at(1), ARGV[1]
redis.call('ZREM', queue.in_hand, id)
redis.call('HDEL', queue.places, id)
redis.call('HDEL', queue.payloads, id)
if redis.call('ZREM', queue.waiting, id) == 1 then
  ring(queue, 0)
end
""")

# KEYS: the queue. ARGV: the id, the token of the delivery.
# Another token means that the task is in another worker's hands by now.
RELEASE = _script("""
local queue, id = queue_at(1), ARGV[1]
local token = redis.call('ZSCORE', queue.in_hand, id)
if token and tonumber(token) == tonumber(ARGV[2]) then
  give_back(queue, id)
  ring(queue, 1)
end
""")

# KEYS: the queue. ARGV: the ids. Returns those that waited.
WITHDRAW = _script("""
local queue, withdrawn = queue_at(1), {}
for _, id in ipairs(ARGV) do
  if redis.call('ZREM', queue.waiting, id) == 1 then
    redis.call('HDEL', queue.payloads, id)
    table.insert(withdrawn, id)
  end
end
ring(queue, 0)
return withdrawn
""")

# KEYS: the queue. ARGV: the ids. Returns those that a worker can no longer get.
ABSENT = _script("""
local queue, absent = queue_at(1), {}
for _, id in ipairs(ARGV) do
  if not has_place(queue, id) or redis.call('HEXISTS', queue.payloads, id) == 0 then
    table.insert(absent, id)
  end
end
return absent
""")

ALL = (SEND, TAKE, HOLD, ACK, RELEASE, WITHDRAW, ABSENT)
