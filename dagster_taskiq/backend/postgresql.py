"""The backend on PostgreSQL.

A deployment has a schema of its own (``postgresql_schema``), in which each method is one call of
one function (``postgresql_functions``). A run's loop is woken by the broker's bell, or else by
NOTIFY where that works (``postgresql_hints``); workers look for their orders, the less often the
more of them there are.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

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
from dagster_taskiq.backend.postgresql_hints import Mailbox, NotifyBell, channel_of
from dagster_taskiq.backend.postgresql_history import PostgresqlHistory
from dagster_taskiq.backend.postgresql_pauses import PostgresqlPauses
from dagster_taskiq.backend.postgresql_schema import PART
from dagster_taskiq.backend.postgresql_withheld import PostgresqlWithheld
from dagster_taskiq.messages.refusals import Unreadable
from dagster_taskiq.messages.results import Place
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.messages.withheld_steps import read_withheld
from dagster_taskiq.messages.worker_records import (
    RunningTask,
    WorkerRecord,
    as_lost,
    readable_records,
    readable_running,
    write_record,
    write_running,
)
from dagster_taskiq.servers.bell import Bell
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq.servers.postgresql_client import Connections, server_errors
from dagster_taskiq.servers.postgresql_pool import Connection
from dagster_taskiq.servers.postgresql_schema import Schema

#: How many tasks, results or orders one call is about.
_BATCH = 500

#: How many runs are removed at a time.
_TIDY_RUNS = 100

#: How often a worker looks for orders; together up to 250 workers look at most so often a second.
_LOOK_SECONDS = 0.5
_LOOKS_PER_SECOND = 50.0

#: The longest pause between two looks. A cancel is also seen at the next renewal.
_LONGEST_LOOK_SECONDS = 5.0


class PostgresqlBackend(PostgresqlPauses, PostgresqlHistory, PostgresqlWithheld, Backend):
    """See ``Backend``.

    Args:
        options: how to reach the server.
        signer: of workers' records.
        bell: that tells of results; None for NOTIFY.

    Raises:
        ConfigError: libpq cannot read the URL.
    """

    def __init__(self, options: ServerOptions, signer: Signer, bell: Bell | None = None) -> None:
        self.address = options.address
        self._signer = signer
        self._unreadable = Unreadable(self.address)
        self._schema = Schema(options.key_prefix, PART)
        self._connections = Connections(options, self._greet)
        self._identity = ""
        self._notifies = bell is None
        self._bell = bell or NotifyBell(self.address, self._connections.connect, self._notify)
        self._mailboxes: dict[str, Mailbox] = {}
        self._workers_count = 1

    @property
    def identity(self) -> str:
        """See ``Backend``: of the last connection, which may lead to another server by now."""
        return self._identity

    async def startup(self) -> None:
        """Reach the server and find the schema there, or make it."""
        await self._call("enter")

    async def shutdown(self) -> None:
        """Close the connections."""
        for mailbox in self._mailboxes.values():
            mailbox.close()
        self._mailboxes.clear()
        await self._bell.close()
        self._connections.close()

    # --- the execution loop's side ---

    async def open_run(
        self, run_id: str, *, generation: int, token: str, is_resumable: bool, lease_seconds: float
    ) -> str:
        """See ``RunBackend``."""
        values = (run_id, generation, token, is_resumable, float(lease_seconds))
        ((epoch, live),) = await self._call("open_run", *values)
        if epoch is None:
            raise superseded_error(run_id, live)
        return str(epoch)

    async def renew_run(
        self, run_id: str, *, generation: int, token: str, is_resumable: bool, lease_seconds: float
    ) -> str | None:
        """See ``RunBackend``."""
        values = (run_id, generation, token, is_resumable, float(lease_seconds))
        ((epoch,),) = await self._call("renew_run", *values, is_urgent=True)
        return None if epoch is None else str(epoch)

    async def close_run(self, run_id: str, *, token: str) -> None:
        """See ``RunBackend``."""
        await self._call("close_run", run_id, token)
        if mailbox := self._mailboxes.pop(run_id, None):
            mailbox.close()

    async def disown_run(self, run_id: str) -> None:
        """See ``RunBackend``."""
        await self._call("disown_run", run_id)

    async def wait_for_results(self, run_id: str, timeout_seconds: float) -> dict[str, bytes]:
        """See ``RunBackend``."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        mailbox = self._mailboxes.get(run_id)
        if mailbox is None:
            mailbox = Mailbox(self._mailbox_name(run_id), self._bell)
            self._mailboxes[run_id] = mailbox
        is_last = False
        while True:
            found = await self._collect(run_id, mailbox, is_last=is_last)
            if found or is_last:
                return found
            await mailbox.wait(max(0.0, deadline - loop.time()))
            is_last = loop.time() >= deadline

    def _mailbox_name(self, run_id: str) -> str:
        return channel_of(self._schema.name, run_id) if self._notifies else run_id

    async def _collect(self, run_id: str, mailbox: Mailbox, *, is_last: bool) -> dict[str, bytes]:
        """The results that were not handed out yet."""
        task_ids = mailbox.take_hints()
        if task_ids is None:
            stored = dict(await self._call("list_results", run_id))
            mailbox.seen = {key: it for key, it in mailbox.seen.items() if key in stored}
            task_ids = [key for key, version in stored.items() if mailbox.seen.get(key) != version]
            mailbox.note_found(task_ids)
        found: dict[str, bytes] = {}
        for batch in _batches(task_ids):
            for task_id, version, data in await self._call("read_results", run_id, list(batch)):
                if mailbox.seen.get(task_id) != version:
                    mailbox.seen[task_id] = version
                    found[task_id] = data
        return found

    async def read_results(self, run_id: str, task_ids: Sequence[str]) -> dict[str, bytes]:
        """See ``RunBackend``."""
        found: dict[str, bytes] = {}
        for batch in _batches(task_ids) or [[]]:
            rows = await self._call("read_results", run_id, list(batch))
            found |= {task_id: data for task_id, _, data in rows}
        return found

    async def forget_results(self, run_id: str, task_ids: Sequence[str]) -> None:
        """See ``RunBackend``."""
        for batch in _batches(task_ids) or [[]]:
            await self._call("forget_results", run_id, list(batch))

    async def inspect(
        self, run_id: str, task_ids: Sequence[str]
    ) -> tuple[str, dict[str, TaskReport]]:
        """See ``RunBackend``."""
        epoch = ""
        reports: dict[str, TaskReport] = {}
        for batch in _batches(task_ids) or [[]]:
            rows = await self._call("inspect", run_id, list(batch))
            for number, word, place, left_seconds in rows:
                if number:
                    state = TaskState(word)
                    left = left_seconds if state is TaskState.CLAIMED else 0.0
                    reports[batch[number - 1]] = TaskReport(
                        state, Place.in_text(place), left or 0.0
                    )
                else:
                    epoch = word
        return epoch, reports

    async def cancel(
        self, run_id: str, orders: Mapping[str, str]
    ) -> tuple[str, dict[str, TaskState]]:
        """See ``RunBackend``."""
        epoch = ""
        states: dict[str, TaskState] = {}
        for batch in _batches(list(orders)) or [[]]:
            texts = [orders[task_id] for task_id in batch]
            values = (run_id, list(batch), texts, float(CONTROL_EXPIRES_SECONDS))
            words: dict[int, str] = dict(await self._call("cancel", *values))
            states |= {task: TaskState(words[n]) for n, task in enumerate(batch, start=1)}
            epoch = words[0]
        return epoch, states

    async def condemn(self, run_id: str, task_id: str) -> bool:
        """See ``RunBackend``."""
        ((is_lost,),) = await self._call("condemn", run_id, task_id)
        return bool(is_lost)

    async def reopen(self, run_id: str, task_id: str) -> bool:
        """See ``RunBackend``."""
        ((is_reopened,),) = await self._call("reopen", run_id, task_id)
        return bool(is_reopened)

    # --- the worker's side ---

    async def claim(
        self, claim: Claim, *, needs_live_run: bool, until_begun: bool = False
    ) -> ClaimAnswer:
        """See ``ClaimBackend``."""
        ((answer,),) = await self._call(
            "claim",
            claim.run_id,
            claim.task_id,
            claim.token,
            float(claim.lease_seconds),
            claim.epoch,
            json.dumps(asdict(claim.place)),
            claim.place.worker_id,
            needs_live_run,
            until_begun,
        )
        return ClaimAnswer(answer)

    async def begin(self, claim: Claim) -> None:
        """See ``ClaimBackend``."""
        await self._call("begin", claim.run_id, claim.task_id, claim.token)

    async def release(self, claim: Claim) -> None:
        """See ``ClaimBackend``."""
        await self._call("release", claim.run_id, claim.task_id, claim.token)

    async def renew(self, claims: Sequence[Claim]) -> list[Renewal]:
        """See ``ClaimBackend``."""
        columns = (
            [claim.run_id for claim in claims],
            [claim.task_id for claim in claims],
            [claim.token for claim in claims],
            [float(claim.lease_seconds) for claim in claims],
            [claim.epoch for claim in claims],
            [json.dumps(asdict(claim.place)) for claim in claims],
            [claim.place.worker_id for claim in claims],
        )
        rows = await self._call("renew", *columns, is_urgent=True)
        return [
            Renewal(
                is_held=is_held,
                cancel_order=order or None,
                is_run_alive=bool(is_alive),
                is_resumable=bool(is_resumable),
                epoch=epoch,
            )
            for _, is_held, order, is_alive, is_resumable, epoch in sorted(rows)
        ]

    async def complete(
        self, claim: Claim, result: bytes, *, expires_seconds: float, is_refused: bool = False
    ) -> bool:
        """See ``ClaimBackend``."""
        mailbox = self._mailbox_name(claim.run_id)
        ((is_stored,),) = await self._call(
            "complete",
            claim.run_id,
            claim.task_id,
            claim.token,
            claim.epoch,
            result,
            float(expires_seconds),
            "refused" if is_refused else "done",
            mailbox if self._notifies else None,
        )
        if is_stored:
            self._bell.ring(mailbox, claim.task_id)
        return bool(is_stored)

    # --- the list of workers, and messages to them ---

    async def heartbeat(
        self,
        record: WorkerRecord,
        *,
        expires_seconds: float,
        running: Sequence[RunningTask] = (),
    ) -> None:
        """See ``ControlBackend``."""
        data = write_record(self._signer, record)
        tasks = write_running(self._signer, record.worker_id, running) if running else None
        values = (record.worker_id, data, tasks, float(expires_seconds))
        ((self._workers_count,),) = await self._call("heartbeat", *values, is_urgent=True)

    async def goodbye(self, worker_id: str) -> None:
        """See ``ControlBackend``."""
        await self._call("goodbye", worker_id)

    async def workers(self) -> list[WorkerRecord]:
        """See ``ControlBackend``."""
        return self._readable(await self._call("list_workers"))

    async def lost_workers(self) -> list[WorkerRecord]:
        """See ``ControlBackend``."""
        return as_lost(self._readable(await self._call("list_lost_workers")))

    def _readable(self, rows: list[tuple[Any, ...]]) -> list[WorkerRecord]:
        note = self._unreadable.note
        return readable_records(
            self._signer, dict(rows), lambda it, why: note(f"The record of worker {it}", why)
        )

    async def running(self) -> list[RunningTask]:
        """See ``ControlBackend``."""
        return readable_running(self._signer, dict(await self._call("list_running")))

    async def runs(self) -> list[RunReport]:
        """See ``ControlBackend``."""
        reports = []
        for run_id, has_loop, is_resumable, task_ids, data in await self._call("list_runs"):
            found = (await self.inspect(run_id, task_ids))[1] if task_ids else {}
            tasks = {key: report for key, report in found.items() if report.state in NOT_ENDED}
            if has_loop or tasks:
                withheld = read_withheld(self._signer, run_id, data or b"")
                reports.append(RunReport(run_id, has_loop, is_resumable, tasks, withheld))
        return reports

    async def tidy(self) -> None:
        """See ``ControlBackend``."""
        await self._call("tidy", _TIDY_RUNS)

    async def product(self) -> str:
        """See ``Backend``."""
        with server_errors(self.address):
            return await self._connections.product()

    async def send_control(self, worker_id: str, order: str) -> None:
        """See ``ControlBackend``."""
        await self._call("send_order", worker_id, order, float(CONTROL_EXPIRES_SECONDS))

    async def wait_for_control(self, worker_id: str, timeout_seconds: float) -> list[bytes]:
        """See ``ControlBackend``."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        while True:
            rows = await self._call("take_orders", worker_id, _BATCH)
            left = deadline - loop.time()
            if rows or left <= 0:
                return [text.encode() for (text,) in rows]
            await asyncio.sleep(min(left, self._look_seconds()))

    def _look_seconds(self) -> float:
        pause = max(_LOOK_SECONDS, self._workers_count / _LOOKS_PER_SECOND)
        return min(pause, _LONGEST_LOOK_SECONDS) * random.uniform(0.6, 1.4)

    # --- calls ---

    async def _call(
        self, function: str, *values: Any, is_urgent: bool = False
    ) -> list[tuple[Any, ...]]:
        """One function of the schema; every error of the server becomes one of ours."""
        statement = self._schema.statement(function, len(values))
        with server_errors(self.address):
            return await self._connections.call(statement, values, is_urgent=is_urgent)

    async def _greet(self, connection: Connection) -> None:
        await self._schema.greet(connection, self.address)
        found = await connection.execute(self._schema.statement("identity", 0), ())
        (database,) = await found.fetchone() or ("",)
        self._identity = f"postgresql {database} {self._schema.name}"

    async def _notify(self, channel: str) -> None:
        await self._connections.call("SELECT pg_notify(%s, '')", [channel])


def _batches(items: Sequence[str]) -> list[Sequence[str]]:
    return [items[start : start + _BATCH] for start in range(0, len(items), _BATCH)]
