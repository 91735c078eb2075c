"""The backend on Redis or Valkey.

Keys, all under the prefix: ``epoch``; for a run its record ``run:<id>``, the lease of its loop
``run:<id>:loop`` and the mailbox ``run:<id>:mailbox``; for a task ``claim:<id>`` and
``result:<id>``; for a worker ``worker:<id>`` and its mailbox ``control:<id>``, with all of them
in ``workers``. What must happen at once is in ``redis_scripts``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

from redis.asyncio import Redis
from redis.commands.core import AsyncScript
from redis.exceptions import NoScriptError, ReadOnlyError

from dagster_taskiq.backend import redis_scripts as scripts
from dagster_taskiq.backend.base import (
    CONTROL_EXPIRES_SECONDS,
    Backend,
    Claim,
    ClaimAnswer,
    Renewal,
    TaskReport,
    TaskState,
    superseded_error,
)
from dagster_taskiq.defaults import RUN_RECORD_EXPIRES_SECONDS
from dagster_taskiq.errors import MalformedResultError
from dagster_taskiq.messages.plain_text import plain_name
from dagster_taskiq.messages.results import Place
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.messages.worker_records import WorkerRecord, read_record, write_record
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq.servers.redis_client import open_redis, server_errors
from dagster_taskiq.servers.redis_rights import check_rights, commands_of

logger = logging.getLogger(__name__)

_RENEW_DIGEST = hashlib.sha1(scripts.RENEW.encode(), usedforsecurity=False).hexdigest()

#: How many tasks one script looks at: it holds up every other client of the server meanwhile.
_BATCH = 500

#: How many keys are said to hold what cannot be read.
_MOST_SAID = 100

#: So many connections are no crowd.
_IDLE_CONNECTIONS = 4

#: The longest a blocking command may wait, and what its connection allows for the answer.
_LONGEST_WAIT_SECONDS = 20.0
_BLOCKING_TIMEOUT_SECONDS = 30.0


#: What the user of the server must be allowed.
_COMMANDS = {
    *commands_of(text for text in vars(scripts).values() if isinstance(text, str)),
    *"BLPOP EVALSHA MGET SCRIPT UNLINK ZADD ZRANGE ZREM ZREMRANGEBYSCORE".split(),
}


class RedisBackend(Backend):
    """See ``Backend``.

    What cannot be decoded counts as unknown and is said once: anybody who can write to the server
    can have put it there, and it must not end a worker or a run that it is not about.

    Args:
        options: how to reach the server.
        signer: of workers' records.
    """

    def __init__(self, options: ServerOptions, signer: Signer) -> None:
        self._signer = signer
        self._said: set[str] = set()
        self.address = options.address
        self._prefix = options.key_prefix + ":"
        self._redis = open_redis(options, timeout_seconds=options.connect_timeout_seconds)
        # a connection that waits for a message must not time out before the wait is over
        self._blocking = open_redis(options, timeout_seconds=_BLOCKING_TIMEOUT_SECONDS)
        self._runs: dict[str, tuple[int, bool]] = {}
        self._scripts: dict[str, AsyncScript] = {}
        # calls under way at the same time, each on a connection of its own: now, at most since the
        # last heartbeat, at most since idle connections were closed
        self._calls = self._recent_peak = self._peak = 0

    async def startup(self) -> None:
        """Reach the server, as a user that may do what is done there."""
        async with self._server():
            await self._redis.ping()
            await check_rights(self._redis, self.address, self._key("rights"), _COMMANDS)

    async def shutdown(self) -> None:
        """Close the connections."""
        await self._redis.aclose()
        await self._blocking.aclose()

    # --- the execution loop's side ---

    async def open_run(
        self, run_id: str, *, generation: int, token: str, is_resumable: bool, lease_seconds: float
    ) -> str:
        """See ``RunBackend``."""
        self._runs[run_id] = (generation, is_resumable)
        answer = await self._run_script(scripts.OPEN_RUN, run_id, token, lease_seconds)
        if answer[0] is None:
            raise superseded_error(run_id, answer[1])
        return _text(answer[0])

    async def renew_run(self, run_id: str, *, token: str, lease_seconds: float) -> str | None:
        """See ``RunBackend``."""
        answer = await self._run_script(scripts.RENEW_RUN, run_id, token, lease_seconds)
        return None if answer is None else _text(answer)

    async def _run_script(self, script: str, run_id: str, token: str, lease_seconds: float) -> Any:
        generation, is_resumable = self._runs[run_id]
        return await self._script(
            script,
            [self._epoch_key, self._record(run_id), self._loop(run_id)],
            [
                _fresh(),
                generation,
                token,
                int(is_resumable),
                _milliseconds(lease_seconds),
                RUN_RECORD_EXPIRES_SECONDS,
            ],
        )

    async def close_run(self, run_id: str, *, token: str) -> None:
        """See ``RunBackend``."""
        keys = [self._record(run_id), self._loop(run_id), self._mailbox(run_id)]
        await self._script(scripts.CLOSE_RUN, keys, [token])
        self._runs.pop(run_id, None)

    async def disown_run(self, run_id: str) -> None:
        """See ``RunBackend``."""
        arguments = [RUN_RECORD_EXPIRES_SECONDS]
        await self._script(scripts.DISOWN_RUN, [self._record(run_id)], arguments)

    async def wait_for_results(self, run_id: str, timeout_seconds: float) -> dict[str, bytes]:
        """See ``RunBackend``."""
        mailbox = self._mailbox(run_id)
        task_id = await self._wait_on(mailbox, timeout_seconds)
        if task_id is None:
            return {}
        arguments = [_BATCH, self._key("result:"), task_id]
        found = await self._script(scripts.COLLECT, [mailbox], arguments)
        return {_text(found[i]): found[i + 1] for i in range(0, len(found), 2)}

    async def read_results(self, run_id: str, task_ids: Sequence[str]) -> dict[str, bytes]:
        """See ``RunBackend``."""
        found: dict[str, bytes] = {}
        for batch in _batches(task_ids):
            async with self._server():
                values: Any = await self._redis.mget([self._key("result:", task) for task in batch])
            found |= {
                task: value for task, value in zip(batch, values, strict=True) if value is not None
            }
        return found

    async def forget_results(self, run_id: str, task_ids: Sequence[str]) -> None:
        """See ``RunBackend``."""
        for batch in _batches(task_ids):
            async with self._server():
                await self._redis.unlink(*[self._key("result:", task) for task in batch])

    async def inspect(
        self, run_id: str, task_ids: Sequence[str]
    ) -> tuple[str, dict[str, TaskReport]]:
        """See ``RunBackend``."""
        keys = [self._epoch_key, self._record(run_id)]
        epoch = ""
        reports: dict[str, TaskReport] = {}
        for batch in _batches(task_ids) or [[]]:
            arguments = [_fresh(), self._key("claim:"), self._key("result:"), *batch]
            first, *rest = await self._script(scripts.INSPECT, keys, arguments)
            epoch = _text(first)
            for task, state, place, left_ms in zip(
                batch, rest[::3], rest[1::3], rest[2::3], strict=True
            ):
                reports[task] = TaskReport(
                    self._state(run_id, task, state), _place_of(place), max(0, left_ms) / 1000
                )
        return epoch, reports

    async def cancel(self, run_id: str, orders: Mapping[str, str]) -> dict[str, TaskState]:
        """See ``RunBackend``."""
        states: dict[str, TaskState] = {}
        for batch in _batches(list(orders)):
            prefixes = [self._key(name) for name in ("claim:", "result:", "control:")]
            expiries = [CONTROL_EXPIRES_SECONDS, RUN_RECORD_EXPIRES_SECONDS]
            pairs = [part for task in batch for part in (task, orders[task])]
            arguments = [*prefixes, *expiries, *pairs]
            answer = await self._script(scripts.CANCEL, [self._record(run_id)], arguments)
            states |= {
                task: self._state(run_id, task, state)
                for task, state in zip(batch, answer, strict=True)
            }
        return states

    async def condemn(self, run_id: str, task_id: str) -> bool:
        """See ``RunBackend``."""
        arguments = [task_id, RUN_RECORD_EXPIRES_SECONDS]
        return bool(
            await self._script(scripts.CONDEMN, self._task_keys(run_id, task_id), arguments)
        )

    async def reopen(self, run_id: str, task_id: str) -> bool:
        """See ``RunBackend``."""
        return bool(await self._script(scripts.REOPEN, self._task_keys(run_id, task_id), [task_id]))

    # --- the worker's side ---

    async def claim(
        self, claim: Claim, *, needs_live_run: bool, until_begun: bool = False
    ) -> ClaimAnswer:
        """See ``ClaimBackend``."""
        answer = await self._script(
            scripts.CLAIM,
            [
                self._epoch_key,
                self._record(claim.run_id),
                self._loop(claim.run_id),
                self._key("claim:", claim.task_id),
                self._key("result:", claim.task_id),
            ],
            [*_claim_arguments(claim), int(needs_live_run), int(until_begun)],
        )
        return ClaimAnswer(_text(answer[0]))

    async def begin(self, claim: Claim) -> None:
        """See ``ClaimBackend``."""
        await self._script(
            scripts.BEGIN,
            [self._record(claim.run_id), self._key("claim:", claim.task_id)],
            [claim.task_id, claim.token, RUN_RECORD_EXPIRES_SECONDS],
        )

    async def renew(self, claims: Sequence[Claim]) -> list[Renewal]:
        """See ``ClaimBackend``."""
        async with self._server():
            answers = await self._renew(claims)
            if any(isinstance(answer, NoScriptError) for answer in answers):
                # the server has been restarted; to renew a claim twice does no harm
                await self._redis.script_load(scripts.RENEW)
                answers = await self._renew(claims)
            for answer in answers:
                if isinstance(answer, Exception):
                    raise answer
        return [
            Renewal(
                is_held=bool(held),
                cancel_order=order.decode(errors="replace") or None,
                is_run_alive=bool(alive),
                is_resumable=bool(resumable),
                epoch=_text(epoch),
            )
            for held, order, alive, resumable, epoch in answers
        ]

    async def _renew(self, claims: Sequence[Claim]) -> list[Any]:
        async with self._redis.pipeline(transaction=False) as pipeline:
            for claim in claims:
                keys = [
                    self._epoch_key,
                    self._record(claim.run_id),
                    self._loop(claim.run_id),
                    self._key("claim:", claim.task_id),
                ]
                pipeline.evalsha(_RENEW_DIGEST, len(keys), *keys, *_claim_arguments(claim))
            answers: list[Any] = await pipeline.execute(raise_on_error=False)
        return answers

    async def complete(
        self, claim: Claim, result: bytes, *, expires_seconds: float, is_refused: bool = False
    ) -> bool:
        """See ``ClaimBackend``."""
        answer = await self._script(
            scripts.COMPLETE,
            [
                self._epoch_key,
                self._record(claim.run_id),
                self._key("claim:", claim.task_id),
                self._key("result:", claim.task_id),
                self._mailbox(claim.run_id),
            ],
            [
                _fresh(),
                claim.task_id,
                claim.epoch,
                claim.token,
                result,
                max(1, int(expires_seconds)),
                RUN_RECORD_EXPIRES_SECONDS,
                "refused" if is_refused else "done",
            ],
        )
        return bool(answer)

    # --- the list of workers, and messages to them ---

    async def heartbeat(self, record: WorkerRecord, *, expires_seconds: float) -> None:
        """See ``ControlBackend``."""
        expires_ms = _milliseconds(expires_seconds)
        async with self._server(), self._redis.pipeline(transaction=True) as pipeline:
            key = self._key("worker:", record.worker_id)
            pipeline.set(key, write_record(self._signer, record), px=expires_ms)
            pipeline.zadd(self._workers_key, {record.worker_id: time.time() + expires_seconds})
            await pipeline.execute()
        await self._close_idle_connections()

    async def goodbye(self, worker_id: str) -> None:
        """See ``ControlBackend``."""
        async with self._server(), self._redis.pipeline(transaction=True) as pipeline:
            pipeline.zrem(self._workers_key, worker_id)
            pipeline.unlink(self._key("worker:", worker_id), self._key("control:", worker_id))
            await pipeline.execute()

    async def workers(self) -> list[WorkerRecord]:
        """See ``ControlBackend``."""
        async with self._server():
            # records expire by themselves; the set only says which to look for, so hosts whose
            # clocks differ do no harm if what is old is dropped late
            await self._redis.zremrangebyscore(self._workers_key, 0, time.time() - 3600)
            members: Any = await self._redis.zrange(self._workers_key, 0, -1)
            ids = [_text(item) for item in members]
            if not ids:
                return []
            values: Any = await self._redis.mget([self._key("worker:", item) for item in ids])
        pairs = zip(ids, values, strict=True)
        records = [self._record_of(worker_id, value) for worker_id, value in pairs if value]
        return sorted((it for it in records if it), key=lambda record: record.name)

    def _record_of(self, worker_id: str, data: bytes) -> WorkerRecord | None:
        try:
            return read_record(self._signer, worker_id, data, time.time())
        except ValueError as error:
            self._say_unreadable(self._key("worker:", worker_id), str(error))
            return None

    async def send_control(self, worker_id: str, order: str) -> None:
        """See ``ControlBackend``."""
        mailbox = self._key("control:", worker_id)
        async with self._server(), self._redis.pipeline(transaction=True) as pipeline:
            pipeline.rpush(mailbox, order)
            pipeline.expire(mailbox, CONTROL_EXPIRES_SECONDS)
            await pipeline.execute()

    async def wait_for_control(self, worker_id: str, timeout_seconds: float) -> list[bytes]:
        """See ``ControlBackend``."""
        mailbox = self._key("control:", worker_id)
        first = await self._wait_on(mailbox, timeout_seconds)
        if first is None:
            return []
        async with self._server():
            rest: Any = await self._redis.lpop(mailbox, _BATCH)
        return [first, *(rest or [])]

    # --- keys and calls ---

    def _key(self, *parts: str) -> str:
        return self._prefix + "".join(parts)

    @property
    def _epoch_key(self) -> str:
        return self._key("epoch")

    @property
    def _workers_key(self) -> str:
        return self._key("workers")

    def _record(self, run_id: str) -> str:
        return self._key("run:", run_id)

    def _loop(self, run_id: str) -> str:
        return self._key("run:", run_id, ":loop")

    def _mailbox(self, run_id: str) -> str:
        return self._key("run:", run_id, ":mailbox")

    def _task_keys(self, run_id: str, task_id: str) -> list[str]:
        return [self._record(run_id), self._key("claim:", task_id), self._key("result:", task_id)]

    @asynccontextmanager
    async def _server(self) -> AsyncIterator[None]:
        """Where every error of the server becomes one of ours."""
        self._calls += 1
        self._recent_peak = max(self._recent_peak, self._calls)
        self._peak = max(self._peak, self._calls)
        with server_errors(self.address):
            try:
                yield
            except ReadOnlyError:
                # after a failover: the address may lead to the new primary, old connections do not
                for client in (self._redis, self._blocking):
                    await client.connection_pool.disconnect(inuse_connections=False)
                raise
            finally:
                self._calls -= 1

    async def _close_idle_connections(self) -> None:
        """After an outage, in which renewals overlap, there are many more than are of use."""
        if self._peak > max(_IDLE_CONNECTIONS, 2 * self._recent_peak):
            await self._redis.connection_pool.disconnect(inuse_connections=False)
            self._peak = self._recent_peak
        self._recent_peak = self._calls

    def _state(self, run_id: str, task_id: str, word: bytes) -> TaskState:
        try:
            return TaskState(_text(word))
        except ValueError:
            self._say_unreadable(self._record(run_id), f"the state of task {task_id} is {word!r}")
            return TaskState.UNKNOWN

    def _say_unreadable(self, key: str, problem: str) -> None:
        """Say once of each key that it holds what none of ours has written."""
        if key not in self._said and len(self._said) < _MOST_SAID:
            self._said.add(key)
            logger.warning(
                "The key %s at %s cannot be read, and is ignored: %s.",
                plain_name(key),
                self.address,
                plain_name(problem),
            )

    async def _script(self, script: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        async with self._server():
            if script not in self._scripts:
                self._scripts[script] = self._redis.register_script(script)
            return await self._scripts[script](keys=list(keys), args=list(arguments))

    async def _wait_on(self, mailbox: str, timeout_seconds: float) -> bytes | None:
        client: Redis = self._blocking
        async with self._server():
            # to Redis 0 is for ever
            timeout = max(0.001, min(timeout_seconds, _LONGEST_WAIT_SECONDS))
            answer: Any = await client.blpop([mailbox], timeout=timeout)
        return None if answer is None else answer[1]


def _place_of(data: bytes) -> Place | None:
    """Where a task runs, for people; None where it does not say."""
    try:
        return Place.from_dict(json.loads(data)) if data else None
    except (ValueError, RecursionError, MalformedResultError):
        return None


def _claim_arguments(claim: Claim) -> list[Any]:
    return [
        _fresh(),
        claim.task_id,
        claim.epoch,
        claim.token,
        json.dumps(asdict(claim.place)),
        _milliseconds(claim.lease_seconds),
        RUN_RECORD_EXPIRES_SECONDS,
    ]


def _fresh() -> str:
    return uuid.uuid4().hex


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _text(value: bytes | str) -> str:
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else value


def _batches(items: Sequence[str]) -> list[Sequence[str]]:
    return [items[start : start + _BATCH] for start in range(0, len(items), _BATCH)]
