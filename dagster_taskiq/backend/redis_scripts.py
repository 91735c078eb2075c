"""The Redis backend's Lua scripts: each is one atomic step of a task's life (see ``life``).

The scripts that open or renew a run, claim, renew, complete, inspect or cancel call ``epoch``
first. It
notices in the same atomic step whether the server is still in the life that the caller knows: the
key vanishes with a flush, and the server's own run id changes with a restart (perhaps from an older
snapshot) or a fail-over to a replica.

States in the run's record, field ``t:<task id>``: ``claimed``, ``done:<token>``,
``refused:<token>``, ``cancelled``,
``lost``; ``dropped:<epoch>`` where a worker has dropped the message in that epoch, in which nobody
had claimed it, and ``dropped:`` where the message was of an older epoch. Field ``c:<task id>`` is
the order to cancel that the task's worker was given, ``b:<task id>`` is there when a launched run
has begun. ``closed`` is there when the run's loop has come to its end; ``withheld`` is in
``redis_withheld``.
"""

from __future__ import annotations

from dagster_taskiq.defaults import CLOSED_RECORD_EXPIRES_SECONDS
from dagster_taskiq.servers.redis_calls import Script

_PRELUDE = """
-- the epoch's id; `fresh` becomes it when this is a new life of the server
local function epoch(key, fresh)
  local server = string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')
  local known = redis.pcall('HMGET', key, 'id', 'server')
  if known.err then
    -- no hash: none of ours wrote it, and every claim needs an epoch
    redis.call('DEL', key)
    known = {false, false}
  end
  -- nor is any other text than ours an epoch
  local is_ours = known[1] and string.match(known[1], '^%x+$')
  if is_ours and known[2] == server then return known[1] end
  redis.call('HSET', key, 'id', fresh, 'server', server)
  return fresh
end
"""

_KEEP = f"""
-- a record outlives its last change by so much, and by less when its run is over
local function keep(record, seconds)
  local is_over = redis.call('HEXISTS', record, 'closed') == 1
  redis.call('EXPIRE', record, is_over and {CLOSED_RECORD_EXPIRES_SECONDS} or seconds)
end
"""

_STATE = """
-- what the record of a run says of a task; false where that is nothing, or none of ours wrote it
local function task_state(record, task)
  local state = redis.call('HGET', record, 't:' .. task)
  local word = state and string.match(state, '^%a+')
  local words = {claimed=1, done=1, refused=1, cancelled=1, lost=1, dropped=1}
  return word and words[word] and state
end
"""

_IS_OPEN = """
-- whether nobody has ended or judged the task
local function is_open(state)
  return not state or state == 'claimed' or string.match(state, '^dropped') ~= nil
end
"""

#: KEYS epoch, record, loop. ARGV fresh epoch, generation, token, resumable, lease ms, expiry s.
#: Returns {epoch} or {false, live generation}.
OPEN_RUN = Script(
    _PRELUDE
    + """
local now = epoch(KEYS[1], ARGV[1])
local generation = tonumber(redis.call('HGET', KEYS[2], 'generation') or '-1') or -1
local live = redis.call('GET', KEYS[3])
if tonumber(ARGV[2]) < generation
    or (tonumber(ARGV[2]) == generation and live and live ~= ARGV[3]) then
  return {false, generation}
end
redis.call('HSET', KEYS[2], 'generation', ARGV[2], 'resumable', ARGV[4])
redis.call('HDEL', KEYS[2], 'closed')
redis.call('EXPIRE', KEYS[2], ARGV[6])
redis.call('SET', KEYS[3], ARGV[3], 'PX', ARGV[5])
return {now}
"""
)

#: KEYS epoch, record, loop. ARGV fresh epoch, generation, token, resumable, lease ms, expiry s.
#: Returns the epoch, or false when another loop has taken over.
RENEW_RUN = Script(
    _PRELUDE
    + """
local now = epoch(KEYS[1], ARGV[1])
local live = redis.call('GET', KEYS[3])
local generation = tonumber(redis.call('HGET', KEYS[2], 'generation') or '-1') or -1
local is_other = live and live ~= ARGV[3]
local is_over = is_other or redis.call('HEXISTS', KEYS[2], 'closed') == 1
-- a live loop with a lower number can only be there because a flush took the higher one with it
if generation > tonumber(ARGV[2]) or (generation == tonumber(ARGV[2]) and is_over) then
  return false
end
-- a record that a flush took with it is written again; what disown has said of the run stays
redis.call('HSET', KEYS[2], 'generation', ARGV[2])
redis.call('HSETNX', KEYS[2], 'resumable', ARGV[4])
redis.call('HDEL', KEYS[2], 'closed')
redis.call('EXPIRE', KEYS[2], ARGV[6])
redis.call('SET', KEYS[3], ARGV[3], 'PX', ARGV[5])
return now
"""
)

#: KEYS record, loop, mailbox. ARGV token.
CLOSE_RUN = Script(
    _KEEP
    + """
if redis.call('GET', KEYS[2]) == ARGV[1] then
  redis.call('DEL', KEYS[2], KEYS[3])
  redis.call('HDEL', KEYS[1], 'withheld')
  redis.call('HSET', KEYS[1], 'resumable', '0', 'closed', '1')
  keep(KEYS[1])
end
return 1
"""
)

#: KEYS record. ARGV record expiry s.
DISOWN_RUN = Script(
    _KEEP
    + """
redis.call('HSET', KEYS[1], 'resumable', '0')
keep(KEYS[1], ARGV[1])
return 1
"""
)

#: KEYS epoch, record, loop, claim, result. ARGV fresh epoch, task, epoch of the task, token,
#: place, lease ms, record expiry s, needs a live run, is ours until it has begun.
#: Returns {answer, epoch}.
CLAIM = Script(
    _PRELUDE
    + _KEEP
    + _STATE
    + """
local now = epoch(KEYS[1], ARGV[1])
local holder = redis.call('HGET', KEYS[4], 'token')
local waits = ARGV[9] == '1' and redis.call('HEXISTS', KEYS[2], 'b:' .. ARGV[2]) == 0
if holder then
  if holder ~= ARGV[4] then return {waits and 'pending' or 'claimed', now} end
  redis.call('PEXPIRE', KEYS[4], ARGV[6])
  return {'granted', now}
end
local field = 't:' .. ARGV[2]
local state = task_state(KEYS[2], ARGV[2])
local is_free = not state or string.match(state, '^dropped') or (waits and state == 'claimed')
if not is_free then return {string.match(state, '^%a+'), now} end
if redis.call('EXISTS', KEYS[5]) == 1 then return {'done', now} end
if ARGV[8] == '1' then
  -- not for a whole run: its sender may be gone, and it starts only if Dagster says that it waits
  local is_stale = ARGV[3] ~= now
  if is_stale or redis.call('EXISTS', KEYS[3]) == 0 then
    -- a loop that lives after all must not wait for what is in no queue any more
    redis.call('HSET', KEYS[2], field, 'dropped:' .. (is_stale and '' or now))
    keep(KEYS[2], ARGV[7])
    return {is_stale and 'stale' or 'run-gone', now}
  end
end
redis.call('HSET', KEYS[4], 'token', ARGV[4], 'place', ARGV[5])
redis.call('PEXPIRE', KEYS[4], ARGV[6])
redis.call('HSET', KEYS[2], field, 'claimed')
keep(KEYS[2], ARGV[7])
return {'granted', now}
"""
)

#: KEYS epoch, record, loop, claim. ARGV fresh epoch, task, epoch of the claim, token, place,
#: lease ms, record expiry s. Returns {held, cancel order or '', loop alive, resumable, epoch}.
RENEW = Script(
    _PRELUDE
    + _KEEP
    + _IS_OPEN
    + _STATE
    + """
local now = epoch(KEYS[1], ARGV[1])
local field = 't:' .. ARGV[2]
local held = redis.call('HGET', KEYS[4], 'token') == ARGV[4]
if not held and now ~= ARGV[3] and redis.call('EXISTS', KEYS[4]) == 0 then
  -- a new life of the server, which may have forgotten the claim: assert it again
  held = is_open(task_state(KEYS[2], ARGV[2]))
end
if held then
  redis.call('HSET', KEYS[4], 'token', ARGV[4], 'place', ARGV[5])
  redis.call('PEXPIRE', KEYS[4], ARGV[6])
  redis.call('HSET', KEYS[2], field, 'claimed')
  keep(KEYS[2], ARGV[7])
end
return {held and 1 or 0,
  redis.call('HGET', KEYS[2], 'c:' .. ARGV[2]) or '',
  redis.call('EXISTS', KEYS[3]),
  redis.call('HGET', KEYS[2], 'resumable') == '1' and 1 or 0,
  now}
"""
)

#: KEYS epoch, record, claim, result, mailbox. ARGV fresh epoch, task, epoch of the claim, token,
#: result, result expiry s, record expiry s, ``done`` or ``refused``. Returns 1, or 0 when the claim
#: is not held.
COMPLETE = Script(
    _PRELUDE
    + _KEEP
    + _IS_OPEN
    + _STATE
    + """
local now = epoch(KEYS[1], ARGV[1])
local field = 't:' .. ARGV[2]
local state = task_state(KEYS[2], ARGV[2])
local ended = ARGV[8] .. ':' .. ARGV[4]
if state == ended then return 1 end
local holder = redis.call('HGET', KEYS[3], 'token')
if holder ~= ARGV[4] then
  local forgotten = not holder and now ~= ARGV[3] and is_open(state)
  if not forgotten then return 0 end
end
redis.call('SET', KEYS[4], ARGV[5], 'EX', ARGV[6])
redis.call('HSET', KEYS[2], field, ended)
redis.call('HDEL', KEYS[2], 'c:' .. ARGV[2])
keep(KEYS[2], ARGV[7])
redis.call('DEL', KEYS[3])
redis.call('RPUSH', KEYS[5], ARGV[2])
redis.call('EXPIRE', KEYS[5], ARGV[7])
return 1
"""
)

#: KEYS record, claim. ARGV task, token, record expiry s.
BEGIN = Script(
    _KEEP
    + """
if redis.call('HGET', KEYS[2], 'token') == ARGV[2] then
  redis.call('HSET', KEYS[1], 'b:' .. ARGV[1], '1')
  keep(KEYS[1], ARGV[3])
end
return 1
"""
)

#: KEYS claim. ARGV token.
RELEASE = Script(
    """
if redis.call('HGET', KEYS[1], 'token') == ARGV[1] then redis.call('DEL', KEYS[1]) end
return 1
"""
)

#: KEYS mailbox. ARGV most, prefix of the results' keys, a task that was in the mailbox. Returns
#: {task, result, ...} for that one and for what is in the mailbox.
COLLECT = Script(
    """
local found = {}
local tasks = redis.call('LPOP', KEYS[1], ARGV[1]) or {}
tasks[#tasks + 1] = ARGV[3]
for _, task in ipairs(tasks) do
  local result = redis.call('GET', ARGV[2] .. task)
  if result then
    found[#found + 1] = task
    found[#found + 1] = result
  end
end
return found
"""
)

#: KEYS epoch, record. ARGV fresh epoch, prefix of the claims' keys, of the results' keys, tasks ...
#: Returns {epoch, state, place or '', ms that are left of the lease, ...}.
INSPECT = Script(
    _PRELUDE
    + """
local now = epoch(KEYS[1], ARGV[1])
local answer = {now}
for index = 4, #ARGV do
  local found = redis.call('HGET', KEYS[2], 't:' .. ARGV[index])
  local place = redis.call('HGET', ARGV[2] .. ARGV[index], 'place')
  local state = found and (string.match(found, '^%a+') or 'unreadable') or 'unknown'
  if place then
    state = 'claimed'
  elseif state == 'claimed' or (state == 'dropped' and found ~= 'dropped:' .. now) then
    state = 'expired'
  end
  if state == 'unknown' and redis.call('EXISTS', ARGV[3] .. ARGV[index]) == 1 then
    state = 'done'
  end
  answer[#answer + 1] = state
  answer[#answer + 1] = place or ''
  answer[#answer + 1] = place and redis.call('PTTL', ARGV[2] .. ARGV[index]) or 0
end
return answer
"""
)

#: KEYS epoch, record. ARGV fresh epoch, prefix of the claims' keys, of the results' keys, of the
#: control mailboxes' keys, mailbox expiry s, record expiry s, then each task and the order for its
#: worker, which may be signed. Returns {epoch, state, ...}.
CANCEL = Script(
    _PRELUDE
    + _KEEP
    + _IS_OPEN
    + _STATE
    + """
local answer = {epoch(KEYS[1], ARGV[1])}
local record = KEYS[2]
for index = 7, #ARGV, 2 do
  local task, order = ARGV[index], ARGV[index + 1]
  local state = task_state(record, task)
  local place = redis.call('HGET', ARGV[2] .. task, 'place')
  local has_result = not place and is_open(state) and redis.call('EXISTS', ARGV[3] .. task) == 1
  if has_result or (state and string.match(state, '^done')) then
    answer[#answer + 1] = 'done'
  elseif place then
    redis.call('HSET', record, 'c:' .. task, order)
    local is_json, where = pcall(cjson.decode, place)
    if is_json and type(where) == 'table' and type(where.worker_id) == 'string' then
      local mailbox = ARGV[4] .. where.worker_id
      redis.pcall('RPUSH', mailbox, order)
      redis.pcall('EXPIRE', mailbox, ARGV[5])
    end
    answer[#answer + 1] = 'claimed'
  elseif state == 'claimed' then
    -- it may have started, so it is for the loop to judge; a worker that lives is told
    redis.call('HSET', record, 'c:' .. task, order)
    answer[#answer + 1] = 'expired'
  elseif state == 'lost' then
    answer[#answer + 1] = 'lost'
  else
    redis.call('HSET', record, 't:' .. task, 'cancelled')
    answer[#answer + 1] = 'cancelled'
  end
end
keep(record, ARGV[6])
return answer
"""
)

#: KEYS record, claim, result. ARGV task, record expiry s. Returns 1, or 0 when there is a claim or
#: a result.
CONDEMN = Script(
    _KEEP
    + _STATE
    + """
local state = task_state(KEYS[1], ARGV[1])
if redis.call('EXISTS', KEYS[2], KEYS[3]) > 0 or (state and string.match(state, '^done')) then
  return 0
end
redis.call('HSET', KEYS[1], 't:' .. ARGV[1], 'lost')
keep(KEYS[1], ARGV[2])
return 1
"""
)

#: KEYS record, claim, result. ARGV task. Returns 1, or 0 when it is claimed, done or cancelled. The
#: result of a task that was refused goes with it.
REOPEN = Script(
    _IS_OPEN
    + _STATE
    + """
local state = task_state(KEYS[1], ARGV[1])
local is_refused = state and string.match(state, '^refused')
if is_refused then redis.call('DEL', KEYS[3]) end
if redis.call('EXISTS', KEYS[2], KEYS[3]) > 0 then return 0 end
if not is_refused and not is_open(state) then return 0 end
if redis.call('HEXISTS', KEYS[1], 'c:' .. ARGV[1]) == 1 then return 0 end
redis.call('HDEL', KEYS[1], 't:' .. ARGV[1], 'b:' .. ARGV[1])
return 1
"""
)

ALL = (
    OPEN_RUN,
    RENEW_RUN,
    CLOSE_RUN,
    DISOWN_RUN,
    CLAIM,
    RENEW,
    COMPLETE,
    BEGIN,
    RELEASE,
    COLLECT,
    INSPECT,
    CANCEL,
    CONDEMN,
    REOPEN,
)
