"""The backend on Redis or Valkey.

``redis_store`` names its keys and calls the server; what must happen at once is in
``redis_scripts``.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dagster_taskiq.backend import redis_scripts as scripts
from dagster_taskiq.backend.base import (
    CONTROL_EXPIRES_SECONDS,
    NOT_ENDED,
    Backend,
    Claim,
    ClaimAnswer,
    Renewal,
    RunReport,
    TaskReport,
    TaskState,
    superseded_error,
)
from dagster_taskiq.backend.redis_control import RedisControl
from dagster_taskiq.backend.redis_history import COMMANDS, RedisHistory
from dagster_taskiq.backend.redis_pauses import RedisPauses
from dagster_taskiq.backend.redis_store import BATCH, RedisStore, milliseconds, text_of
from dagster_taskiq.backend.redis_withheld import TELL, RedisWithheld
from dagster_taskiq.defaults import RUN_RECORD_EXPIRES_SECONDS
from dagster_taskiq.messages.results import Place
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq.servers.redis_calls import Command, Script
from dagster_taskiq.servers.redis_client import product_of
from dagster_taskiq.servers.redis_rights import commands_of

#: The states of ``base.NOT_ENDED``, as the record of a run has them.
_NOT_ENDED = {state.value for state in NOT_ENDED}

#: What the user of the server must be allowed.
_COMMANDS = {
    *commands_of(script.text for script in scripts.ALL),
    *COMMANDS,
    *commands_of([TELL.text]),
    *"BLPOP EVALSHA HDEL HGETALL HSET MGET SCRIPT UNLINK ZADD ZRANGE ZREM ZREMRANGEBYSCORE".split(),
}


class RedisBackend(RedisControl, RedisPauses, RedisHistory, RedisWithheld, Backend):
    """See ``Backend``.

    What cannot be decoded counts as unknown and is said once: anybody who can write to the server
    can have put it there, and it must not end a worker or a run that it is not about.

    Args:
        options: how to reach the server.
        signer: of workers' records.
    """

    def __init__(self, options: ServerOptions, signer: Signer) -> None:
        super().__init__(RedisStore(options), signer)
        self._identity = options.identity
        self.address = self._store.address

    @property
    def identity(self) -> str:
        """See ``Backend``: an embedded server's own; no other's is known."""
        return self._identity

    async def startup(self) -> None:
        """Reach the server, as a user that may do what is done there."""
        await self._store.check(_COMMANDS)

    async def shutdown(self) -> None:
        """Close the connections."""
        await self._store.close()

    # --- the execution loop's side ---

    async def open_run(
        self, run_id: str, *, generation: int, token: str, is_resumable: bool, lease_seconds: float
    ) -> str:
        """See ``RunBackend``."""
        words = (run_id, generation, token, is_resumable, lease_seconds)
        answer = await self._run_script(scripts.OPEN_RUN, *words)
        if answer[0] is None:
            raise superseded_error(run_id, answer[1])
        return text_of(answer[0])

    async def renew_run(
        self, run_id: str, *, generation: int, token: str, is_resumable: bool, lease_seconds: float
    ) -> str | None:
        """See ``RunBackend``."""
        words = (run_id, generation, token, is_resumable, lease_seconds)
        answer = await self._run_script(scripts.RENEW_RUN, *words)
        return None if answer is None else text_of(answer)

    async def _run_script(
        self,
        script: Script,
        run_id: str,
        generation: int,
        token: str,
        is_resumable: bool,
        lease_seconds: float,
    ) -> Any:
        return await self._store.run(
            script,
            [self._store.epoch, self._store.record(run_id), self._store.loop(run_id)],
            [
                _fresh(),
                generation,
                token,
                int(is_resumable),
                milliseconds(lease_seconds),
                RUN_RECORD_EXPIRES_SECONDS,
            ],
        )

    async def close_run(self, run_id: str, *, token: str) -> None:
        """See ``RunBackend``."""
        keys = [self._store.record(run_id), self._store.loop(run_id), self._store.mailbox(run_id)]
        await self._store.run(scripts.CLOSE_RUN, keys, [token])

    async def disown_run(self, run_id: str) -> None:
        """See ``RunBackend``."""
        arguments = [RUN_RECORD_EXPIRES_SECONDS]
        await self._store.run(scripts.DISOWN_RUN, [self._store.record(run_id)], arguments)

    async def wait_for_results(self, run_id: str, timeout_seconds: float) -> dict[str, bytes]:
        """See ``RunBackend``."""
        mailbox = self._store.mailbox(run_id)
        task_id = await self._store.wait_on(mailbox, timeout_seconds)
        if task_id is None:
            return {}
        arguments = [BATCH, self._store.key("result:"), task_id]
        found = await self._store.run(scripts.COLLECT, [mailbox], arguments)
        return {text_of(found[i]): found[i + 1] for i in range(0, len(found), 2)}

    async def read_results(self, run_id: str, task_ids: Sequence[str]) -> dict[str, bytes]:
        """See ``RunBackend``."""
        found: dict[str, bytes] = {}
        for batch in _batches(task_ids):
            async with self._store.reached() as redis:
                values: Any = await redis.mget([self._store.key("result:", task) for task in batch])
            found |= {
                task: value for task, value in zip(batch, values, strict=True) if value is not None
            }
        return found

    async def forget_results(self, run_id: str, task_ids: Sequence[str]) -> None:
        """See ``RunBackend``."""
        for batch in _batches(task_ids):
            async with self._store.reached() as redis:
                await redis.unlink(*[self._store.key("result:", task) for task in batch])

    async def inspect(
        self, run_id: str, task_ids: Sequence[str]
    ) -> tuple[str, dict[str, TaskReport]]:
        """See ``RunBackend``."""
        keys = [self._store.epoch, self._store.record(run_id)]
        epoch = ""
        reports: dict[str, TaskReport] = {}
        for batch in _batches(task_ids) or [[]]:
            arguments = [_fresh(), self._store.key("claim:"), self._store.key("result:"), *batch]
            first, *rest = await self._store.run(scripts.INSPECT, keys, arguments)
            epoch = text_of(first)
            for task, state, place, left_ms in zip(
                batch, rest[::3], rest[1::3], rest[2::3], strict=True
            ):
                reports[task] = TaskReport(
                    self._state(run_id, task, state), Place.in_text(place), max(0, left_ms) / 1000
                )
        return epoch, reports

    async def cancel(
        self, run_id: str, orders: Mapping[str, str]
    ) -> tuple[str, dict[str, TaskState]]:
        """See ``RunBackend``."""
        keys = [self._store.epoch, self._store.record(run_id)]
        epoch = ""
        states: dict[str, TaskState] = {}
        for batch in _batches(list(orders)) or [[]]:
            prefixes = [self._store.key(name) for name in ("claim:", "result:", "control:")]
            expiries = [CONTROL_EXPIRES_SECONDS, RUN_RECORD_EXPIRES_SECONDS]
            pairs = [part for task in batch for part in (task, orders[task])]
            arguments = [_fresh(), *prefixes, *expiries, *pairs]
            first, *rest = await self._store.run(scripts.CANCEL, keys, arguments)
            epoch = text_of(first)
            states |= {
                task: self._state(run_id, task, state)
                for task, state in zip(batch, rest, strict=True)
            }
        return epoch, states

    async def condemn(self, run_id: str, task_id: str) -> bool:
        """See ``RunBackend``."""
        arguments = [task_id, RUN_RECORD_EXPIRES_SECONDS]
        return bool(
            await self._store.run(
                scripts.CONDEMN, self._store.task_keys(run_id, task_id), arguments
            )
        )

    async def reopen(self, run_id: str, task_id: str) -> bool:
        """See ``RunBackend``."""
        return bool(
            await self._store.run(scripts.REOPEN, self._store.task_keys(run_id, task_id), [task_id])
        )

    # --- the worker's side ---

    async def claim(
        self, claim: Claim, *, needs_live_run: bool, until_begun: bool = False
    ) -> ClaimAnswer:
        """See ``ClaimBackend``."""
        answer = await self._store.run(
            scripts.CLAIM,
            [
                self._store.epoch,
                self._store.record(claim.run_id),
                self._store.loop(claim.run_id),
                self._store.key("claim:", claim.task_id),
                self._store.key("result:", claim.task_id),
            ],
            [*_claim_arguments(claim), int(needs_live_run), int(until_begun)],
        )
        return ClaimAnswer(text_of(answer[0]))

    async def begin(self, claim: Claim) -> None:
        """See ``ClaimBackend``."""
        await self._store.run(
            scripts.BEGIN,
            [self._store.record(claim.run_id), self._store.key("claim:", claim.task_id)],
            [claim.task_id, claim.token, RUN_RECORD_EXPIRES_SECONDS],
        )

    async def release(self, claim: Claim) -> None:
        """See ``ClaimBackend``."""
        keys = [self._store.key("claim:", claim.task_id)]
        await self._store.run(scripts.RELEASE, keys, [claim.token])

    async def renew(self, claims: Sequence[Claim]) -> list[Renewal]:
        """See ``ClaimBackend``."""
        # sent again where the server lacks the script: to renew a claim twice does no harm
        answers = await self._store.run_all([self._renewal(claim) for claim in claims])
        return [
            Renewal(
                is_held=bool(held),
                cancel_order=order.decode(errors="replace") or None,
                is_run_alive=bool(alive),
                is_resumable=bool(resumable),
                epoch=text_of(epoch),
            )
            for held, order, alive, resumable, epoch in answers
        ]

    def _renewal(self, claim: Claim) -> Command:
        keys = [
            self._store.epoch,
            self._store.record(claim.run_id),
            self._store.loop(claim.run_id),
            self._store.key("claim:", claim.task_id),
        ]
        return scripts.RENEW(keys, *_claim_arguments(claim))

    async def complete(
        self, claim: Claim, result: bytes, *, expires_seconds: float, is_refused: bool = False
    ) -> bool:
        """See ``ClaimBackend``."""
        answer = await self._store.run(
            scripts.COMPLETE,
            [
                self._store.epoch,
                self._store.record(claim.run_id),
                self._store.key("claim:", claim.task_id),
                self._store.key("result:", claim.task_id),
                self._store.mailbox(claim.run_id),
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

    # --- the list of runs ---

    async def runs(self) -> list[RunReport]:
        """See ``ControlBackend``."""
        reports = [await self._report_run(run_id) for run_id in await self._store.run_ids()]
        return [report for report in reports if report.has_loop or report.tasks]

    async def _report_run(self, run_id: str) -> RunReport:
        record, loops = await self._store.run_all(
            [("HGETALL", self._store.record(run_id)), ("MGET", self._store.loop(run_id))]
        )
        (loop,) = loops
        fields = {text_of(key): text_of(value) for key, value in record.items()}
        words = {key[2:]: value for key, value in fields.items() if key.startswith("t:")}
        task_ids = [key for key, word in words.items() if word.partition(":")[0] in _NOT_ENDED]
        reports = (await self.inspect(run_id, task_ids))[1] if task_ids else {}
        tasks = {key: report for key, report in reports.items() if report.state in NOT_ENDED}
        withheld = self._withheld_of(run_id, record, loop)
        return RunReport(run_id, loop is not None, fields.get("resumable") == "1", tasks, withheld)

    async def product(self) -> str:
        """See ``Backend``."""
        (answer,) = await self._store.run_all([("INFO", "server")])
        return product_of(answer)

    def _state(self, run_id: str, task_id: str, word: bytes) -> TaskState:
        try:
            return TaskState(text_of(word))
        except ValueError:
            self._store.say_unreadable(
                self._store.record(run_id), f"the state of task {task_id} is {word!r}"
            )
            return TaskState.UNKNOWN


def _claim_arguments(claim: Claim) -> list[Any]:
    return [
        _fresh(),
        claim.task_id,
        claim.epoch,
        claim.token,
        json.dumps(asdict(claim.place)),
        milliseconds(claim.lease_seconds),
        RUN_RECORD_EXPIRES_SECONDS,
    ]


def _fresh() -> str:
    return uuid.uuid4().hex


def _batches(items: Sequence[str]) -> list[Sequence[str]]:
    return [items[start : start + BATCH] for start in range(0, len(items), BATCH)]
