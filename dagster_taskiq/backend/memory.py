"""The backend in memory: the whole contract in one process, for tests.

A ``MemoryServer`` is what a Redis server is to other backends: it keeps the state, and each process
of a test, or what stands for one, has a ``MemoryBackend`` of its own on it, in any thread::

    server = MemoryServer(clock=lambda: now)
    loop, worker = MemoryBackend(server), MemoryBackend(server)

What an operation does to a task is in ``life``; ``memory_server`` keeps the state.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from dagster_taskiq.backend import life
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
from dagster_taskiq.backend.memory_pauses import MemoryPauses
from dagster_taskiq.backend.memory_server import (
    MemoryServer,
    MemorySnapshot,
    Session,
    orders_of,
    results_of,
)
from dagster_taskiq.defaults import HISTORY_ENDS, RUN_RECORD_EXPIRES_SECONDS
from dagster_taskiq.messages.attempt_ends import (
    AttemptEnd,
    Counter,
    HistoryBatch,
    readable_counts,
    readable_ends,
    write_counter,
    write_end,
)
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.messages.withheld_steps import Withheld, read_withheld, write_withheld
from dagster_taskiq.messages.worker_records import (
    RunningTask,
    WorkerRecord,
    as_lost,
    readable_records,
    readable_running,
    write_record,
    write_running,
)

__all__ = ["MemoryBackend", "MemoryServer", "MemorySnapshot"]


class MemoryBackend(MemoryPauses, Backend):
    """See ``Backend``.

    Args:
        server: that keeps the state.
        signer: of workers' records.
    """

    def __init__(self, server: MemoryServer, signer: Signer | None = None) -> None:
        self.address = server.address
        self._server = server
        self._signer = signer or Signer()

    @property
    def identity(self) -> str:
        """See ``Backend``."""
        return self._server.identity

    async def startup(self) -> None:
        """See ``Backend``."""
        with self._server.reached():
            pass

    async def shutdown(self) -> None:
        """See ``Backend``: there is nothing to close."""

    # --- the execution loop's side ---

    async def open_run(
        self, run_id: str, *, generation: int, token: str, is_resumable: bool, lease_seconds: float
    ) -> str:
        """See ``RunBackend``."""
        with self._server.reached() as session:
            session.sweep()
            run, is_open = life.open_run(
                session.run(run_id),
                session.moment,
                generation=generation,
                token=token,
                is_resumable=is_resumable,
                lease_seconds=lease_seconds,
            )
            session.put_run(run_id, run)
        if not is_open:
            raise superseded_error(run_id, run.generation)
        return session.moment.epoch

    async def renew_run(
        self, run_id: str, *, generation: int, token: str, is_resumable: bool, lease_seconds: float
    ) -> str | None:
        """See ``RunBackend``."""
        with self._server.reached() as session:
            run, is_renewed = life.renew_run(
                session.run(run_id),
                session.moment,
                generation=generation,
                token=token,
                is_resumable=is_resumable,
                lease_seconds=lease_seconds,
            )
            session.put_run(run_id, run)
        return session.moment.epoch if is_renewed else None

    async def close_run(self, run_id: str, *, token: str) -> None:
        """See ``RunBackend``."""
        with self._server.reached() as session:
            run, is_closed = life.close_run(session.run(run_id), session.moment, token=token)
            if is_closed:
                session.put_run(run_id, run)
                session.take(results_of(run_id))

    async def disown_run(self, run_id: str) -> None:
        """See ``RunBackend``."""
        with self._server.reached() as session:
            session.put_run(run_id, life.disown_run(session.run(run_id), session.moment))

    async def wait_for_results(self, run_id: str, timeout_seconds: float) -> dict[str, bytes]:
        """See ``RunBackend``."""
        task_ids = await self._server.wait_for(results_of(run_id), timeout_seconds)
        return await self.read_results(run_id, task_ids) if task_ids else {}

    async def read_results(self, run_id: str, task_ids: Sequence[str]) -> dict[str, bytes]:
        """See ``RunBackend``."""
        with self._server.reached() as session:
            results = {task_id: session.task(run_id, task_id).result for task_id in task_ids}
        return {task_id: result.data for task_id, result in results.items() if result}

    async def forget_results(self, run_id: str, task_ids: Sequence[str]) -> None:
        """See ``RunBackend``."""
        with self._server.reached() as session:
            for task_id in task_ids:
                task = session.task(run_id, task_id)
                session.put_task(run_id, task_id, task.without_result())

    async def inspect(
        self, run_id: str, task_ids: Sequence[str]
    ) -> tuple[str, dict[str, TaskReport]]:
        """See ``RunBackend``."""
        with self._server.reached() as session:
            reports = {
                task_id: life.report_task(session.task(run_id, task_id), session.moment)
                for task_id in task_ids
            }
        return session.moment.epoch, reports

    async def cancel(
        self, run_id: str, orders: Mapping[str, str]
    ) -> tuple[str, dict[str, TaskState]]:
        """See ``RunBackend``."""
        states: dict[str, TaskState] = {}
        with self._server.reached() as session:
            for task_id, order in orders.items():
                task = session.task(run_id, task_id)
                changed, states[task_id] = life.cancel_task(task, order)
                session.change_task(run_id, task_id, changed)
                if changed.hold and states[task_id] is TaskState.CLAIMED:
                    mailbox = orders_of(changed.hold.place.worker_id)
                    session.post(mailbox, order, CONTROL_EXPIRES_SECONDS)
        return session.moment.epoch, states

    async def condemn(self, run_id: str, task_id: str) -> bool:
        """See ``RunBackend``."""
        with self._server.reached() as session:
            changed, is_lost = life.condemn_task(session.task(run_id, task_id))
            if is_lost:
                session.change_task(run_id, task_id, changed)
        return is_lost

    async def reopen(self, run_id: str, task_id: str) -> bool:
        """See ``RunBackend``."""
        with self._server.reached() as session:
            changed, is_reopened = life.reopen_task(session.task(run_id, task_id))
            if is_reopened:
                session.change_task(run_id, task_id, changed)
        return is_reopened

    # --- the worker's side ---

    async def claim(
        self, claim: Claim, *, needs_live_run: bool, until_begun: bool = False
    ) -> ClaimAnswer:
        """See ``ClaimBackend``."""
        with self._server.reached() as session:
            before = session.task(claim.run_id, claim.task_id)
            changed, answer = life.claim_task(
                before,
                session.run(claim.run_id),
                session.moment,
                claim,
                needs_live_run=needs_live_run,
                until_begun=until_begun,
            )
            if changed is not before:
                session.change_task(claim.run_id, claim.task_id, changed)
        return answer

    async def begin(self, claim: Claim) -> None:
        """See ``ClaimBackend``."""
        with self._server.reached() as session:
            before = session.task(claim.run_id, claim.task_id)
            changed = life.begin_task(before, claim)
            if changed is not before:
                session.change_task(claim.run_id, claim.task_id, changed)

    async def release(self, claim: Claim) -> None:
        """See ``ClaimBackend``."""
        with self._server.reached() as session:
            before = session.task(claim.run_id, claim.task_id)
            session.put_task(claim.run_id, claim.task_id, life.release_task(before, claim))

    async def renew(self, claims: Sequence[Claim]) -> list[Renewal]:
        """See ``ClaimBackend``."""
        with self._server.reached() as session:
            return [self._renew(session, claim) for claim in claims]

    @staticmethod
    def _renew(session: Session, claim: Claim) -> Renewal:
        task = session.task(claim.run_id, claim.task_id)
        run = session.run(claim.run_id)
        changed, renewal = life.renew_claim(task, run, session.moment, claim)
        if renewal.is_held:
            session.change_task(claim.run_id, claim.task_id, changed)
        return renewal

    async def complete(
        self, claim: Claim, result: bytes, *, expires_seconds: float, is_refused: bool = False
    ) -> bool:
        """See ``ClaimBackend``."""
        with self._server.reached() as session:
            before = session.task(claim.run_id, claim.task_id)
            changed, is_stored = life.complete_task(
                before,
                session.moment,
                claim,
                result,
                expires_seconds=expires_seconds,
                is_refused=is_refused,
            )
            if changed is not before:
                session.change_task(claim.run_id, claim.task_id, changed)
                mailbox = results_of(claim.run_id)
                session.post(mailbox, claim.task_id, RUN_RECORD_EXPIRES_SECONDS)
        return is_stored

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
        tasks = write_running(self._signer, record.worker_id, running)
        with self._server.reached() as session:
            session.put_worker(record.worker_id, data, tasks, expires_seconds)

    async def goodbye(self, worker_id: str) -> None:
        """See ``ControlBackend``."""
        with self._server.reached() as session:
            session.remove_worker(worker_id)

    async def workers(self) -> list[WorkerRecord]:
        """See ``ControlBackend``."""
        with self._server.reached() as session:
            found = session.workers()
        return readable_records(self._signer, found, lambda *_: None)

    async def lost_workers(self) -> list[WorkerRecord]:
        """See ``ControlBackend``."""
        with self._server.reached() as session:
            found = session.lost_workers()
        return as_lost(readable_records(self._signer, found, lambda *_: None))

    async def running(self) -> list[RunningTask]:
        """See ``ControlBackend``."""
        with self._server.reached() as session:
            found = session.running()
        return readable_running(self._signer, found)

    async def runs(self) -> list[RunReport]:
        """See ``ControlBackend``."""
        with self._server.reached() as session:
            reports = [self._report_run(session, run_id) for run_id in session.run_ids()]
        return [report for report in reports if report.has_loop or report.tasks]

    def _report_run(self, session: Session, run_id: str) -> RunReport:
        run, moment = session.run(run_id), session.moment
        reports = {
            task_id: life.report_task(session.task(run_id, task_id), moment)
            for task_id in session.task_ids(run_id)
        }
        tasks = {key: report for key, report in reports.items() if report.state in NOT_ENDED}
        withheld = read_withheld(self._signer, run_id, run.withheld_now)
        return RunReport(run_id, run.loop is not None, bool(run.is_resumable), tasks, withheld)

    async def tell_withheld(self, run_id: str, withheld: Withheld, *, token: str) -> bool:
        """See ``WithheldBackend``."""
        data = write_withheld(self._signer, run_id, withheld) if withheld != Withheld() else b""
        with self._server.reached() as session:
            run, is_kept = life.tell_withheld(session.run(run_id), data, token=token)
            if is_kept:
                session.put_run(run_id, run)
        return is_kept

    async def tidy(self) -> None:
        """See ``ControlBackend``."""
        with self._server.reached() as session:
            session.sweep()

    async def product(self) -> str:
        """See ``Backend``."""
        with self._server.reached():
            return "memory"

    async def send_control(self, worker_id: str, order: str) -> None:
        """See ``ControlBackend``."""
        with self._server.reached() as session:
            session.post(orders_of(worker_id), order, CONTROL_EXPIRES_SECONDS)

    async def wait_for_control(self, worker_id: str, timeout_seconds: float) -> list[bytes]:
        """See ``ControlBackend``."""
        orders = await self._server.wait_for(orders_of(worker_id), timeout_seconds)
        return [order.encode() for order in orders]

    # --- the history ---

    async def add_history(self, batch: HistoryBatch) -> None:
        """See ``HistoryBackend``."""
        ends = [(end.group, write_end(self._signer, end)) for end in batch.ends]
        counts = {write_counter(counter): count for counter, count in batch.counts.items()}
        with self._server.reached() as session:
            now = session.moment.seconds
            session.put_history(session.history.with_batch(batch.batch_id, ends, counts, now))

    async def ended(self, most: int = HISTORY_ENDS) -> list[AttemptEnd]:
        """See ``HistoryBackend``."""
        with self._server.reached() as session:
            found = session.history.newest(most, session.moment.seconds)
        return readable_ends(self._signer, found, time.time())

    async def counts(self) -> dict[Counter, int]:
        """See ``HistoryBackend``."""
        with self._server.reached() as session:
            return readable_counts(session.history.counts)
