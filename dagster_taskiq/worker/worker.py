"""The worker: it puts the parts together, and starts and stops them in order.

A ``Station`` of steps and one of runs take tasks and execute them; the ``LeaseKeeper`` renews
their claims and stops what may not go on; the guard kills what the worker cannot.

Background tasks, each with a name: ``steps``, ``runs``, ``leases``, ``heartbeat``, ``control``,
``guard``, ``reload``, ``steering``, ``steps-slots``, ``runs-slots``, ``history`` and perhaps
``recent-code`` and ``code-watch``.
When one of them fails the worker stops loudly. Stopping is one ordered list, ``_stop``.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from dagster_taskiq.aio.loop_thread import end_tasks
from dagster_taskiq.backend.history_log import HistoryLog
from dagster_taskiq.connections import Servers
from dagster_taskiq.errors import EmbeddedServerError, ServerError, WorkerFailedError
from dagster_taskiq.messages.control import OrderKind, OrderReader
from dagster_taskiq.messages.queue_names import QueueKind
from dagster_taskiq.messages.results import Place
from dagster_taskiq.messages.worker_records import PAUSED
from dagster_taskiq.servers.patience import Patience
from dagster_taskiq.worker.admission import StationAdmission
from dagster_taskiq.worker.child import ChildOptions
from dagster_taskiq.worker.code_watch import CodeWatch
from dagster_taskiq.worker.control_mailbox import ControlMailbox, told
from dagster_taskiq.worker.leases import LeaseKeeper, StopReason
from dagster_taskiq.worker.listing import Listing
from dagster_taskiq.worker.observer import (
    CountingObserver,
    LoggingObserver,
    Observers,
    WorkerObserver,
)
from dagster_taskiq.worker.options import WorkerOptions
from dagster_taskiq.worker.parts import SlotOptions, WorkerParts, slot_options, usual_parts
from dagster_taskiq.worker.recent_code import RecentCode
from dagster_taskiq.worker.run_ends import RunEnds
from dagster_taskiq.worker.run_watch import RunWatch
from dagster_taskiq.worker.slot_base import Slot
from dagster_taskiq.worker.start_checks import warn_of_namesakes, warn_without_init
from dagster_taskiq.worker.station import Station
from dagster_taskiq.worker.steering import Steering
from dagster_taskiq.worker.templates import CodeState
from dagster_taskiq.worker.tools import Tools

logger = logging.getLogger(__name__)

#: Pause before a server that was away is tried again.
_RETRY_SECONDS = 0.5


class Worker:
    """One worker process; ``run`` is its whole life.

    Args:
        servers: broker and backend.
        options: see ``WorkerOptions``.
        on_ready: called when it takes tasks.
        on_waiting: called when it begins to wait for a server.
        observer: hears what it does, beside its log and the counters of its listing.
        parts: what it is put together from; its usual parts by default.
    """

    def __init__(
        self,
        servers: Servers,
        options: WorkerOptions,
        on_ready: Callable[[], None] = lambda: None,
        on_waiting: Callable[[], None] = lambda: None,
        observer: WorkerObserver | None = None,
        parts: WorkerParts | None = None,
    ) -> None:
        self._servers = servers
        self._options = options
        self._on_ready = on_ready
        self._on_waiting = on_waiting
        host, worker_id = socket.gethostname(), uuid.uuid4().hex
        self.name = f"{options.name}@{host}"
        self._place = Place(self.name, worker_id, host, pid=0, slot=0)
        counts = CountingObserver()
        others = (observer,) if observer else ()
        self._parts = parts or usual_parts(servers, options)
        self._backend = self._parts.backend
        self._history = HistoryLog(self._backend)
        self._observer = Observers(LoggingObserver(), counts, RunEnds(self._history), *others)
        self._guard = self._parts.guard
        orders = OrderReader(servers.signer, worker_id, self.name)
        self._leases = LeaseKeeper(self._backend, self._guard, orders, self._observer)
        self._steering = Steering(servers, self._backend, options)
        self._listing = Listing(
            self._backend,
            servers,
            self._steering,
            self._place,
            counts,
            self._state,
            lambda: self.code_states,
            self._revive,
        )
        self._control = ControlMailbox(
            self._backend,
            worker_id,
            orders,
            self._leases,
            self._observer,
            {
                **self._steering.orders,
                OrderKind.TERMINATE: told(self.drain),
                OrderKind.RELOAD: told(self.reload),
            },
            self._listing.answer_ping,
        )
        self._stations = list(self._make_stations())
        self._drain = asyncio.Event()
        self._cancel_now = asyncio.Event()
        self._reload = asyncio.Event()
        self._code_watch = CodeWatch(options.watch, self.reload) if options.watch else None
        self._was_cut_short = False

    def _make_stations(self) -> Iterator[Station]:
        options = self._options
        for kind, count in ((QueueKind.STEPS, options.slots), (QueueKind.RUNS, options.run_slots)):
            if not count:
                continue
            queues = [self._servers.physical_queue(kind, name) for name in options.queues]
            signer, observer = self._servers.signer, self._observer
            admission = StationAdmission(
                kind, self._steering.ever_served, signer, observer, self._backend, self.name
            )
            yield Station(
                kind,
                self._parts.open_broker(kind, queues, admission),
                partial(self._make_slot, kind),
                count,
                self._make_tools(),
            )

    def _make_slot(self, kind: QueueKind, number: int) -> Slot:
        is_signed = self._servers.signer.is_active
        options = slot_options(self._options, kind, number, is_signed=is_signed)
        return self._parts.make_slot(options, self._observer)

    def _make_watch(self, *, is_warm: bool = False) -> RunWatch:
        child = ChildOptions((), self._options.log_level, slot=0)
        return RunWatch(self._parts.make_slot(SlotOptions(child, is_warm), self._observer))

    def _make_tools(self) -> Tools:
        options = self._options
        return Tools(
            self._backend,
            self._leases,
            self._make_watch(),
            self._place,
            options.result_expires_seconds,
            options.limits,
            self._servers.signer,
            self._observer,
        )

    # --- what there is to see; any thread may ask ---

    @property
    def state(self) -> str:
        """See ``WorkerRecord``."""
        return self._state()

    @property
    def slots(self) -> dict[QueueKind, int]:
        """How many tasks of each kind it can execute at once."""
        return {station.kind: station.slot_count for station in self._stations}

    @property
    def child_pids(self) -> list[int]:
        """Of the children in its slots."""
        pids_of_templates = self._parts.templates.pids if self._parts.templates else ()
        return [pid for pid in self._guard.groups if pid not in pids_of_templates]

    @property
    def code_states(self) -> Sequence[CodeState]:
        """How children come to their code."""
        return self._parts.templates.states if self._parts.templates else ()

    # --- life ---

    async def run(self) -> bool:
        """Work until told to stop.

        Returns:
            whether everything that it had begun could finish.

        Raises:
            ServerError: broker or backend refuse, or were away for the patience of the options.
            SlotError: the children cannot be started.
            WorkerFailedError: a background task failed.
        """
        try:
            if await self._await_servers():
                await self._start()
                await self._work()
        finally:
            await self._stop()
        return not self._was_cut_short

    def drain(self) -> None:
        """Take no more tasks; what runs may finish. A second call cancels what runs."""
        if self._drain.is_set():
            logger.warning("Told to stop again: cancelling what still runs.")
            self._cancel_now.set()
            return
        logger.info(
            "Stopping: no new tasks; %d running may finish within %g seconds.",
            len(self._leases),
            self._options.drain_timeout_seconds,
        )
        self._drain.set()
        self._leases.hand_over_runs()

    def reload(self) -> None:
        """Give every slot a fresh child, between tasks, which imports the present code."""
        self._reload.set()

    async def _await_servers(self) -> bool:
        """Wait for broker and backend; whether the worker is to start, and not told to stop."""
        reaching = asyncio.create_task(self._reach_servers(), name="reach-servers")
        draining = asyncio.create_task(self._drain.wait(), name="drain")
        try:
            await asyncio.wait({reaching, draining}, return_when=asyncio.FIRST_COMPLETED)
            if reaching.done():
                reaching.result()
            return reaching.done()
        finally:
            await end_tasks([reaching, draining])

    async def _reach_servers(self) -> None:
        patience = Patience(self._options.server_patience_seconds)
        while True:
            try:
                await self._backend.startup()
                await asyncio.gather(*(station.reach() for station in self._stations))
            except ServerError as error:
                if patience.note("start", error):
                    logger.warning(
                        "%s The worker starts when it is back; it waits for %g seconds at most.",
                        error,
                        patience.seconds,
                    )
                    self._on_waiting()
            else:
                return
            await self._revive()
            await asyncio.sleep(_RETRY_SECONDS)

    async def _start(self) -> None:
        warn_without_init()
        warn_of_namesakes(self.name, await self._backend.workers())
        self._guard.start()
        if self._code_watch:  # before the children import code
            await self._code_watch.start()
        for station in self._stations:
            await station.start()
        await self._steering.start(self._stations)
        await self._listing.enter()
        logger.info(
            "Worker %s is ready: %d step slots, %d run slots, queues %s, broker %s, backend %s; "
            "tasks %s.",
            self.name,
            self._options.slots,
            self._options.run_slots,
            ", ".join(self._options.queues),
            self._servers.broker.address,
            self._backend.address,
            "must be signed" if self._servers.signer.is_active else "need no signature",
        )
        self._on_ready()

    async def _work(self) -> None:
        working = [
            asyncio.create_task(station.work(self._drain), name=station.kind.value)
            for station in self._stations
        ]
        others = [
            asyncio.create_task(self._leases.run(), name="leases"),
            asyncio.create_task(self._listing.run(), name="heartbeat"),
            asyncio.create_task(self._control.run(), name="control"),
            asyncio.create_task(self._guard.monitor(self._leases.stop_unguarded), name="guard"),
            asyncio.create_task(self._reload_when_told(), name="reload"),
            asyncio.create_task(self._steering.run(), name="steering"),
            *(
                asyncio.create_task(station.keep_size(), name=f"{station.kind.value}-slots")
                for station in self._stations
            ),
            asyncio.create_task(self._history.run(), name="history"),
        ]
        if self._parts.templates:
            watch = self._make_watch(is_warm=True)
            recent = RecentCode(self._backend, self._parts.templates, watch).run(
                self.slots, self._options.queues
            )
            others.append(asyncio.create_task(recent, name="recent-code"))
        if self._code_watch:
            others.append(asyncio.create_task(self._code_watch.run(), name="code-watch"))
        draining = asyncio.create_task(self._drain.wait(), name="drain")
        try:
            await self._until_one_ends([*working, draining, *others])
            await self._finish_running(asyncio.gather(*working), others)
        finally:
            await end_tasks([*working, draining, *others])

    async def _until_one_ends(self, tasks: list[asyncio.Task[Any]]) -> None:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if task.get_name() != "drain" and not self._drain.is_set():
                error = task.exception()
                self._observer.failed(task.get_name())
                raise WorkerFailedError(
                    f"The worker's task {task.get_name()!r} ended: {error!r}. It stops, since it "
                    "cannot keep its promises without it."
                ) from error

    async def _finish_running(
        self, working: asyncio.Future[Any], others: list[asyncio.Task[None]]
    ) -> None:
        """Drain: wait for what runs, then cancel it."""
        await self._listing.update()
        cancelling = asyncio.create_task(self._cancel_now.wait(), name="cancel-now")
        try:
            await asyncio.wait(
                {working, cancelling, *others},
                timeout=self._options.drain_timeout_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            cancelling.cancel()
        if not working.done():
            self._was_cut_short = len(self._leases) > 0
            timeout = f"--drain-timeout of {self._options.drain_timeout_seconds:g} s"
            why = "a second order to stop" if self._cancel_now.is_set() else timeout
            self._leases.stop_all(StopReason.WORKER_STOPS, f"{why} on worker {self.name}")
        await working

    async def _stop(self) -> None:
        """Stop in order: the children, the entry in the list of workers, the backend, the guard."""
        if self._code_watch:
            self._code_watch.stop()
        # children first: nothing of ours may run when the list of workers says we are gone
        for station in self._stations:
            await station.stop()
        if self._parts.templates:
            await self._parts.templates.stop()
        await asyncio.to_thread(self._parts.finish_output)
        await self._listing.leave()
        await self._history.send()
        await self._backend.shutdown()
        # last, since it kills whatever the lines above have left
        self._guard.close()

    # --- background ---

    async def _reload_when_told(self) -> None:
        while True:
            await self._reload.wait()
            self._reload.clear()
            logger.info("Reloading: every slot gets a fresh child, a busy one after its task.")
            if self._parts.templates:
                await self._parts.templates.reload()
            await asyncio.gather(*(station.reload() for station in self._stations))
            logger.info("Reloaded: idle slots run the present code.")

    async def _revive(self) -> None:
        try:
            await asyncio.to_thread(self._servers.revive)
        except (EmbeddedServerError, OSError) as error:  # the latter without descriptors
            logger.warning("%s", error)

    def _state(self) -> str:
        """For the listing, see ``WorkerRecord``."""
        if self._drain.is_set():
            return "draining"
        if any(it.is_short for it in self._stations):
            return "no processes"
        return PAUSED if self._steering.is_paused else "running"
