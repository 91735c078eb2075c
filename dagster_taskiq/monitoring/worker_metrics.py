"""The metrics of a worker: an observer that counts, and a collector that looks when asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from dagster_taskiq.backend import ClaimAnswer
from dagster_taskiq.errors import ServerError
from dagster_taskiq.messages.envelope import Envelope, QueueKind
from dagster_taskiq.messages.results import Outcome, Place, TaskResult
from dagster_taskiq.monitoring import definitions as the
from dagster_taskiq.monitoring.definitions import Definition
from dagster_taskiq.monitoring.exposition import family
from dagster_taskiq.monitoring.health import WorkerHealth
from dagster_taskiq.monitoring.loop_watch import LoopWatch
from dagster_taskiq.monitoring.peaks import Peak
from dagster_taskiq.monitoring.queue_labels import QueueLabels
from dagster_taskiq.version import __version__
from dagster_taskiq.worker.leases import StopReason
from dagster_taskiq.worker.observer import Ending, LeaseRenewal, WorkerObserver
from dagster_taskiq.worker.options import WorkerOptions
from dagster_taskiq.worker.slot_base import ReplaceReason
from dagster_taskiq.worker.templates import CodeState

#: How long the memory of children is not looked at again, and of how many of them it is.
_MEMORY_SECONDS = 5.0
_MOST_CHILDREN = 500

#: How a task may end, as the label ``outcome``: as its step's own events say, or else as its worker
#: saw it.
OUTCOMES = (
    *("success", "failure", "up_for_retry", "skipped", "cancelled", "stopped"),
    *(it.value for it in Outcome),
)

#: Roles of servers, as a label.
_ROLES = ("broker", "backend")


@dataclass
class Seen:
    """What is looked at when it is asked for, by any thread.

    Attributes:
        state: of the worker, see ``WorkerRecord``.
        slots: how many it has of each kind; of one that is left out it has none.
        child_pids: of its children.
        code_states: how these come to their code.
    """

    state: Callable[[], str] = lambda: "starting"
    slots: Callable[[], Mapping[QueueKind, int]] = dict
    child_pids: Callable[[], Iterable[int]] = lambda: ()
    code_states: Callable[[], Iterable[CodeState]] = lambda: ()


class WorkerMetrics(WorkerObserver):
    """Counts what a worker does.

    Args:
        name: of the worker, with its host.
        options: its queues, and whether it has slots of a kind.
        health: knows how late its event loop is, and its renewals are.

    Attributes:
        registry: what there is to read.
        seen: what else there is to see; set once the worker exists.
    """

    def __init__(self, name: str, options: WorkerOptions, health: WorkerHealth) -> None:
        self.registry = CollectorRegistry()
        self.seen = Seen()
        self._queues = QueueLabels(options.queues)
        self._health = health
        self._lost_shares = Peak()
        self._broker_away: set[QueueKind] = set()
        self._make()
        self._fill(options)
        self._gauge(the.WORKER_INFO).labels(name, __version__).set(1)
        self.registry.register(_Looks(self, health.loop_watch))
        ProcessCollector(registry=self.registry)

    def _counter(self, definition: Definition) -> Counter:
        return Counter(definition.name, definition.text, definition.labels, registry=self.registry)

    def _gauge(self, definition: Definition) -> Gauge:
        return Gauge(definition.name, definition.text, definition.labels, registry=self.registry)

    def _histogram(self, definition: Definition) -> Histogram:
        return Histogram(
            definition.name,
            definition.text,
            definition.labels,
            registry=self.registry,
            buckets=definition.buckets,
        )

    def _make(self) -> None:
        self._busy = self._gauge(the.BUSY_SLOTS)
        self._started = self._counter(the.TASKS_STARTED)
        self._retried = self._counter(the.TASKS_RETRIED)
        self._ended = self._counter(the.TASKS_ENDED)
        self._stopped = self._counter(the.TASKS_STOPPED)
        self._dropped = self._counter(the.TASKS_DROPPED)
        self._given_back = self._counter(the.TASKS_GIVEN_BACK)
        self._refused = self._counter(the.REFUSED)
        self._waits = self._histogram(the.QUEUE_WAIT)
        self._run_times = self._histogram(the.RUN_TIME)
        self._message_sizes = self._histogram(the.MESSAGE_SIZE)
        self._result_sizes = self._histogram(the.RESULT_SIZE)
        self._replaced = self._counter(the.CHILDREN_REPLACED)
        self._renewals = self._histogram(the.RENEWALS)
        self._away = self._gauge(the.AWAY)
        self._outages = self._counter(the.OUTAGES)

    def _fill(self, options: WorkerOptions) -> None:
        """Begin with zeros, without which the first of each would be no increase."""
        for role in _ROLES:
            self._away.labels(role)
            self._outages.labels(role)
        for what in _REFUSED:
            self._refused.labels(what)
        for reason in ReplaceReason:
            self._replaced.labels(reason.name.lower())
        for kind, slots in ((QueueKind.STEPS, options.slots), (QueueKind.RUNS, options.run_slots)):
            self._busy.labels(kind.value)
            for queue in options.queues if slots else ():
                labels = (self._queues.of(queue), kind.value)
                for plain in (self._started, self._retried, self._given_back):
                    plain.labels(*labels)
                for timed in (self._waits, self._run_times):
                    timed.labels(*labels)
                for outcome in OUTCOMES:
                    self._ended.labels(*labels, outcome)
                for stop in StopReason:
                    self._stopped.labels(*labels, stop.name.lower())

    def _labels(self, envelope: Envelope) -> tuple[str, str]:
        return self._queues.of(envelope.queue), envelope.kind.value

    @property
    def least_lease_share(self) -> float:
        """See ``LEASE_LEFT``."""
        return min(1 - (self._lost_shares.largest() or 0.0), self._health.least_lease_share)

    # --- what the worker tells ---

    def given_back(self, envelope: Envelope) -> None:
        """See ``WorkerObserver``."""
        self._given_back.labels(*self._labels(envelope)).inc()

    def dropped(self, envelope: Envelope, answer: ClaimAnswer) -> None:
        """See ``WorkerObserver``."""
        self._dropped.labels(*self._labels(envelope), answer.value).inc()

    def claimed(self, envelope: Envelope) -> None:
        """See ``WorkerObserver``."""
        labels = self._labels(envelope)
        self._busy.labels(envelope.kind.value).inc()
        self._message_sizes.labels(*labels).observe(len(envelope.payload))
        if envelope.sent_at:
            self._waits.labels(*labels).observe(max(0.0, time.time() - envelope.sent_at))

    def began(self, envelope: Envelope, place: Place) -> None:
        """See ``WorkerObserver``."""
        labels = self._labels(envelope)
        self._started.labels(*labels).inc()
        if envelope.attempt > (1 if envelope.kind is QueueKind.STEPS else 0):
            self._retried.labels(*labels).inc()

    def ended(self, envelope: Envelope, ending: Ending) -> None:
        """See ``WorkerObserver``."""
        labels = self._labels(envelope)
        self._ended.labels(*labels, _outcome_of(ending)).inc()
        if ending.stopped_by:
            self._stopped.labels(*labels, ending.stopped_by.lower()).inc()
        if ending.run_seconds is not None:
            self._run_times.labels(*labels).observe(ending.run_seconds)

    def completed(
        self, envelope: Envelope, result: TaskResult, *, is_cancelled: bool, size_bytes: int
    ) -> None:
        """See ``WorkerObserver``."""
        self._result_sizes.labels(*self._labels(envelope)).observe(size_bytes)

    def released(self, envelope: Envelope) -> None:
        """See ``WorkerObserver``."""
        self._busy.labels(envelope.kind.value).dec()

    def refused(self, address: str, what: str, error: Exception) -> None:
        """See ``WorkerObserver``."""
        word = what.rpartition(" ")[2]
        self._refused.labels(word if word in _REFUSED else "message").inc()

    def renewed(self, renewal: LeaseRenewal) -> None:
        """See ``WorkerObserver``."""
        self._renewals.observe(renewal.seconds)
        self._lost_shares.note(1 - renewal.least_left_share)

    def outage(self, address: str, error: ServerError) -> None:
        """See ``WorkerObserver``."""
        self._away.labels("backend").set(1)
        self._outages.labels("backend").inc()

    def outage_over(self, address: str) -> None:
        """See ``WorkerObserver``."""
        self._away.labels("backend").set(0)

    def broker_away(self, kind: QueueKind, error: ServerError) -> None:
        """See ``WorkerObserver``; an outage for both stations is one."""
        if not self._broker_away:
            self._away.labels("broker").set(1)
            self._outages.labels("broker").inc()
        self._broker_away.add(kind)

    def broker_back(self, kind: QueueKind) -> None:
        """See ``WorkerObserver``."""
        self._broker_away.discard(kind)
        self._away.labels("broker").set(bool(self._broker_away))

    def child_replaced(self, slot: int, pid: int, reason: ReplaceReason) -> None:
        """See ``WorkerObserver``."""
        self._replaced.labels(reason.name.lower()).inc()


def _outcome_of(ending: Ending) -> str:
    if ending.stopped_by:
        is_cancel = ending.stopped_by == StopReason.CANCELLED.name
        return "cancelled" if is_cancel else "stopped"
    if ending.outcome is Outcome.FINISHED and ending.step_end in OUTCOMES:
        return ending.step_end
    return ending.outcome.value


#: Last words of what is refused, as a label.
_REFUSED = ("message", "order", "cancel")


class _Looks(Collector):
    """What is looked at for each scrape, in the thread that scrapes."""

    def __init__(self, metrics: WorkerMetrics, loop_watch: LoopWatch) -> None:
        self._metrics = metrics
        self._loop_watch = loop_watch
        self._memory: tuple[float, list[int]] = (float("-inf"), [])

    def describe(self) -> Iterator[Metric]:
        """What there is, without a look at anything."""
        looked_at = (
            the.WORKER_STATE,
            the.SLOTS,
            the.LEASE_LEFT,
            the.LOOP_LAG,
            the.CHILDREN,
            the.CHILDREN_MEMORY,
            the.LARGEST_CHILD,
            the.WARM_CODE,
        )
        yield from (family(definition, {}) for definition in looked_at)

    def collect(self) -> Iterator[Metric]:
        """The present values."""
        sizes = self._sizes()
        yield family(the.WORKER_STATE, {(self._metrics.seen.state(),): 1})
        slots = self._metrics.seen.slots()
        yield family(the.SLOTS, {(kind.value,): slots.get(kind, 0) for kind in QueueKind})
        yield family(the.LEASE_LEFT, {(): self._metrics.least_lease_share})
        yield family(the.LOOP_LAG, {(): self._loop_watch.worst_seconds})
        yield family(the.CHILDREN, {(): len(sizes)})
        yield family(the.CHILDREN_MEMORY, {(): sum(sizes)})
        yield family(the.LARGEST_CHILD, {(): max(sizes, default=0)})
        states = self._metrics.seen.code_states()
        yield family(the.WARM_CODE, {(it.title,): int(it.is_warm) for it in states})

    def _sizes(self) -> list[int]:
        """Resident memory of each child, in bytes; not newer than some seconds."""
        read_at, sizes = self._memory
        if time.monotonic() - read_at >= _MEMORY_SECONDS:
            sizes = [*_resident_bytes(list(self._metrics.seen.child_pids())[:_MOST_CHILDREN])]
            self._memory = time.monotonic(), sizes
        return sizes


def _resident_bytes(pids: Iterable[int]) -> Iterator[int]:
    for pid in pids:
        try:
            yield psutil.Process(pid).memory_info().rss
        except (psutil.Error, OSError):  # it has ended; the latter without descriptors
            continue
