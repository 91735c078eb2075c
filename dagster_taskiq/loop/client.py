"""The execution loop's way to the workers: broker and backend on one event-loop thread.

Background tasks keep a run going while its loop computes or waits: ``collect`` takes results out of
the run's mailbox and wakes the loop, ``keep-alive`` renews the lease that says that the run has a
living loop (without it no step of the run is claimed any more). ``history`` tells what has ended,
``withheld`` which steps the run holds back.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from dagster_taskiq.aio.loop_thread import LoopThread, end_tasks
from dagster_taskiq.aio.patched_library import SimpleQueue
from dagster_taskiq.aio.renewals import keep_renewing
from dagster_taskiq.aio.vigil import EpochWatch
from dagster_taskiq.aio.waker import Waker
from dagster_taskiq.backend import Backend, TaskState, open_backend
from dagster_taskiq.backend.history_log import HistoryLog
from dagster_taskiq.backend.withheld_log import WithheldLog
from dagster_taskiq.brokers import TaskBroker, open_bell, open_broker
from dagster_taskiq.carrier import Carrier
from dagster_taskiq.connections import Servers
from dagster_taskiq.defaults import RENEWALS_PER_LEASE
from dagster_taskiq.errors import (
    EmbeddedServerError,
    ServerError,
    SupersededLoopError,
    UnreachableServerError,
)
from dagster_taskiq.execution.event_batches import EventWriter
from dagster_taskiq.loop.dispatcher import Dispatcher, Inspection, StepTask
from dagster_taskiq.loop.step_envelopes import envelope_of
from dagster_taskiq.messages.attempt_ends import AttemptEnd
from dagster_taskiq.messages.envelope import Envelope, QueueKind
from dagster_taskiq.messages.queue_looks import QueueLook
from dagster_taskiq.messages.results import NOWHERE, TaskResult
from dagster_taskiq.messages.withheld_steps import Withheld

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: How long one wait for results lasts before it is begun anew.
_WAIT_SECONDS = 15.0

#: Pause between two tries to reach a server that is away.
_RETRY_SECONDS = 0.5

#: An outage that begins this long after the last error is a new one, and logged.
_QUIET_SECONDS = 5.0


class Client(Dispatcher):
    """Carries the steps of one run through a broker.

    Args:
        servers: broker and backend.
        run_id: the run.
        generation: how often the run was resumed.
        is_resumable: whether another loop may take over when this one dies.
        lease_seconds: of the run's own lease and of the claims on its tasks.
        cancel_grace_seconds: see ``Envelope``.
        events: writes what the loop reports.

    Raises:
        ConfigError: a URL cannot be used.
    """

    def __init__(
        self,
        *,
        servers: Servers,
        run_id: str,
        generation: int,
        is_resumable: bool,
        lease_seconds: float,
        cancel_grace_seconds: float,
        events: EventWriter,
    ) -> None:
        self._run_id = run_id
        self._lease_seconds = lease_seconds
        self._cancel_grace_seconds = cancel_grace_seconds
        self._events = events
        self._servers = servers
        self._token = uuid.uuid4().hex
        #: What the loop says of itself when it opens the run, and with each renewal.
        self._said: dict[str, Any] = {
            "generation": generation,
            "token": self._token,
            "is_resumable": is_resumable,
        }
        self._inspected_epoch = ""
        #: By task id, the epoch that the task was first sent in.
        self._sent_in: dict[str, str] = {}
        # a loop that takes over from another has not watched the claims of its steps
        self._watch = EpochWatch(servers.backend.address, is_complete=not generation)
        self._answered_at = 0.0
        self._is_superseded = False
        self._arrived: SimpleQueue[tuple[str, TaskResult]] = SimpleQueue()
        #: Task ids whose results may be deleted.
        self._handled: deque[str] = deque()
        self._waker = Waker()
        self._thread = LoopThread("dagster-taskiq-client")
        self._generation = generation
        self._is_open = False
        self._failure: BaseException | None = None
        self._background: list[asyncio.Task[None]] = []
        try:
            self._broker, self._backend = self._thread.call(self._make_connections())
        except BaseException:
            self._thread.stop()
            self._waker.close()
            raise
        self._carrier = Carrier(servers, QueueKind.STEPS, self._broker, self._backend)
        self._history = HistoryLog(self._backend)
        self._withheld = WithheldLog(self._backend, run_id, self._token)

    async def _make_connections(self) -> tuple[TaskBroker, Backend]:
        servers = self._servers
        bell = open_bell(servers.broker, servers.backend)
        return open_broker(servers.broker), open_backend(servers.backend, servers.signer, bell)

    def open(self) -> None:
        """See ``Dispatcher``."""
        try:
            self._thread.call(self._open())
        except UnreachableServerError:
            self._servers.revive()  # for the next call
            raise

    async def _open(self) -> None:
        if not self._is_open:
            await self._open_run()
        # who takes over needs the backend alone: what runs already must not be without a loop
        if not self._generation:
            await self._broker.startup()

    async def _open_run(self) -> None:
        await self._backend.startup()
        epoch = await self._backend.open_run(
            self._run_id, lease_seconds=self._lease_seconds, **self._said
        )
        self._watch.note_epoch(epoch, time.monotonic())
        self._is_open = True
        self._background = [
            asyncio.create_task(self._collect(), name="collect"),
            asyncio.create_task(self._keep_alive(), name="keep-alive"),
            asyncio.create_task(self._history.run(), name="history"),
            asyncio.create_task(self._withheld.run(), name="withheld"),
        ]
        for task in self._background:
            task.add_done_callback(self._note_failure)

    def _call(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        if not self._is_open:
            self.open()
        return self._thread.call(make())

    # --- background ---

    def _note_failure(self, task: asyncio.Task[None]) -> None:
        """Without its background tasks a run would wait for ever: the loop is told instead."""
        if not task.cancelled() and (error := task.exception()):
            self._failure = error
            self._waker.wake()

    async def _collect(self) -> None:
        while True:
            try:
                found = await self._backend.wait_for_results(self._run_id, _WAIT_SECONDS)
            except ServerError as error:
                self._note_outage(error)
                await asyncio.sleep(_RETRY_SECONDS)
                await self._revive()
                continue
            try:
                await self._deliver(found)
            except ServerError as error:
                self._note_outage(error)  # the reconciliation finds what is left

    async def _deliver(self, found: Mapping[str, bytes]) -> None:
        results = {key: self._carrier.read(key, data) for key, data in found.items()}
        unverified = {key: result for key, result in results.items() if result.place == NOWHERE}
        for task_id, result in results.items():
            if task_id not in unverified:
                self._arrived.put((task_id, result))
        if found:
            self._waker.wake()
        if unverified:
            await self._deliver_unverified(unverified)

    async def _deliver_unverified(self, results: Mapping[str, TaskResult]) -> None:
        """Deliver those whose task is over; a forged one must not end a task, and is forgotten."""
        _, reports = await self._backend.inspect(self._run_id, list(results))
        for task_id, result in results.items():
            if reports[task_id].state is TaskState.DONE:
                self._arrived.put((task_id, result))
            else:
                await self._backend.forget_results(self._run_id, [task_id])
        self._waker.wake()

    async def _keep_alive(self) -> None:
        await keep_renewing(
            self._renew_run,
            lambda: None if self._is_superseded else self._lease_seconds / RENEWALS_PER_LEASE,
            asyncio.Event().wait,  # which is never set
        )

    async def _renew_run(self) -> bool:
        """One try to renew the run's lease; whether the server answered."""
        sent_at = time.monotonic()
        try:
            epoch = await self._backend.renew_run(
                self._run_id, lease_seconds=self._lease_seconds, **self._said
            )
        except ServerError as error:
            if sent_at > self._answered_at:
                self._note_outage(error)
            return False
        if epoch is None:
            self._is_superseded = True
            self._waker.wake()
        elif sent_at > self._answered_at:  # else a later try knows better
            self._answered_at = sent_at
            self._note_epoch(epoch)
            await self._forget_handled()
        return True

    async def _forget_handled(self) -> None:
        """Delete the results that the loop has acted on."""
        task_ids = [self._handled.popleft() for _ in range(len(self._handled))]
        if task_ids:
            with suppress(ServerError):  # they expire by themselves
                await self._backend.forget_results(self._run_id, task_ids)

    def _note_outage(self, error: ServerError) -> None:
        now = time.monotonic()
        if self._watch.steady_seconds(now) > _QUIET_SECONDS:
            logger.warning("Run %s: %s Trying again.", self._run_id, error)
        self._watch.note_trouble(str(error), now)

    async def _revive(self) -> None:
        try:
            await asyncio.to_thread(self._servers.revive)
        except EmbeddedServerError as problem:
            logger.warning("Run %s: %s", self._run_id, problem)

    def _note_epoch(self, epoch: str) -> None:
        if self._watch.note_epoch(epoch, time.monotonic()):
            self._withheld.note_new_epoch()
            logger.warning(
                "Run %s: %s was restarted or emptied; what is missing there is judged after "
                "%g seconds.",
                self._run_id,
                self._backend.address,
                self._lease_seconds,
            )

    # --- the loop's calls ---

    def submit(self, tasks: Sequence[StepTask]) -> None:
        """See ``Dispatcher``."""
        self._events.begin_writing()
        messages = [self._carrier.message_of(self._envelope(task)) for task in tasks]
        self._events.flush()  # a loop that takes over must find in the log what was sent
        self._call(lambda: self._carrier.send(messages))
        for task in tasks:
            self._history.note_sent(task.queue, QueueKind.STEPS.value)

    def wait(self, timeout_seconds: float) -> list[tuple[str, TaskResult]]:
        """See ``Dispatcher``."""
        if self._arrived.empty():
            self._waker.wait(timeout_seconds)
        if self._failure is not None:
            raise self._failure
        if self._is_superseded:
            raise SupersededLoopError(
                f"Run {self._run_id} has been taken over by another process: this one stops."
            )
        return [self._arrived.get() for _ in range(self._arrived.qsize())]

    def acknowledge(self, task_ids: Collection[str]) -> None:
        """See ``Dispatcher``."""
        for task_id in task_ids:
            self._sent_in.pop(task_id, None)
        # with the next renewal of the run: the loop has better things to do than to wait for this
        self._handled.extend(task_ids)

    def fetch(self, task_ids: Sequence[str]) -> list[tuple[str, TaskResult]]:
        """See ``Dispatcher``."""
        found = self._call(lambda: self._backend.read_results(self._run_id, task_ids))
        # in this thread, so that hundreds of them do not hold up the renewal of the run
        return [(task_id, self._carrier.read(task_id, data)) for task_id, data in found.items()]

    def inspect(self, tasks: Sequence[StepTask]) -> Inspection:
        """See ``Dispatcher``."""
        return self._call(lambda: self._inspect(tasks))

    async def _inspect(self, tasks: Sequence[StepTask]) -> Inspection:
        epoch, reports = await self._backend.inspect(self._run_id, [t.task_id for t in tasks])
        self._note_epoch(epoch)
        self._inspected_epoch = epoch
        waiting = [t for t in tasks if reports[t.task_id].state is TaskState.UNKNOWN]
        queues = {task.queue for task in waiting}
        waits, listeners = await self._carrier.explained_waits(self._run_id, queues)
        return Inspection(
            is_conclusive=self._watch.steady_seconds(time.monotonic()) >= self._lease_seconds,
            reports=reports,
            trouble=self._watch.trouble,
            troubled_at=self._watch.troubled_at,
            waits=waits,
            listeners=listeners,
            absent=frozenset(await self._carrier.absent(_queues(waiting))),
        )

    def look_into(self, queue: str, tasks: Sequence[StepTask]) -> QueueLook:
        """See ``Dispatcher``."""
        return self._call(lambda: self._carrier.look_into(queue, [it.task_id for it in tasks]))

    def cancel(self, tasks: Sequence[StepTask], reason: str) -> Mapping[str, TaskState]:
        """See ``Dispatcher``."""
        return self._call(lambda: self._cancel(tasks, reason))

    async def _cancel(self, tasks: Sequence[StepTask], reason: str) -> Mapping[str, TaskState]:
        epoch, states = await self._carrier.cancel(self._run_id, _queues(tasks), reason)
        self._note_epoch(epoch)
        if self._watch.epoch_seconds(time.monotonic()) >= self._lease_seconds:
            return states
        # a worker that lives may not have said yet, to a server that has forgotten it, what it
        # holds: that a task has never started is not known before a lease has passed
        unknown = TaskState.EXPIRED
        return {t: unknown if s is TaskState.CANCELLED else s for t, s in states.items()}

    def condemn(self, task_id: str) -> bool:
        """See ``Dispatcher``."""
        self._sent_in.pop(task_id, None)
        return self._call(lambda: self._backend.condemn(self._run_id, task_id))

    def reopen(self, task_id: str) -> bool:
        """See ``Dispatcher``."""
        # the epoch of the verdict: if it is over by now, so is what was found out
        self._sent_in[task_id] = self._inspected_epoch
        return self._call(lambda: self._backend.reopen(self._run_id, task_id))

    def note_end(self, end: AttemptEnd) -> None:
        """See ``Dispatcher``."""
        self._history.note_end(end)

    def note_withheld(self, withheld: Withheld) -> None:
        """See ``Dispatcher``."""
        self._withheld.note(withheld)

    def close(self, *, leave_running: bool = False) -> None:
        """See ``Dispatcher``."""
        try:
            self._thread.call(self._disconnect(leave_running))
        finally:
            self._thread.stop()
            self._waker.close()

    async def _disconnect(self, leave_running: bool) -> None:
        await end_tasks(self._background)
        try:
            if self._is_open and not leave_running:
                await self._backend.close_run(self._run_id, token=self._token)
            await self._forget_handled()
            await self._history.send()
        except ServerError as error:
            # its lease runs out by itself, which says the same a little later
            logger.warning("Run %s: cannot say that it is over: %s", self._run_id, error)
        await self._broker.shutdown()
        await self._backend.shutdown()

    # --- messages ---

    def _envelope(self, task: StepTask) -> Envelope:
        # the epoch of the first one, where a submission is repeated that may have arrived: the
        # server may have forgotten since then that a worker has claimed it
        return envelope_of(
            task,
            self._run_id,
            lease_seconds=self._lease_seconds,
            cancel_grace_seconds=self._cancel_grace_seconds,
            epoch=self._sent_in.setdefault(task.task_id, self._watch.epoch),
        )


def _queues(tasks: Sequence[StepTask]) -> dict[str, str]:
    return {task.task_id: task.queue for task in tasks}
