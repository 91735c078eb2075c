"""Why a task waits in its queue, by what the workers say of themselves in their heartbeats.

A run says it in its log; a launched run also when its start times out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from dagster_taskiq.defaults import (
    BROKER_URL_VARIABLE,
    FIRST_NEWS_PAUSE_SECONDS,
    FOREIGN_WORKERS_SECONDS,
    LONGEST_NEWS_PAUSE_SECONDS,
    TURN_REASON_SECONDS,
    WAIT_REASON_SECONDS,
)
from dagster_taskiq.messages.control import refuses
from dagster_taskiq.messages.queue_names import PROTOCOL, QueueKind
from dagster_taskiq.messages.queue_pauses import QueuePause
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.messages.worker_records import PAUSED, WorkerRecord
from dagster_taskiq.servers.kinds import is_same_address
from dagster_taskiq.version import __version__

#: How many workers a reason names.
_MOST_NAMES = 5


class WaitKind(str, Enum):
    """The kinds of reasons why a task waits."""

    #: No worker listens on its queue.
    UNSERVED = "unserved"
    #: Those that listen execute only tasks of another version.
    PROTOCOL = "protocol"
    #: One that listens refuses how the task is signed, and drops it.
    REFUSED = "refused"
    #: None that shares the run's backend listens, and one that has another gives the tasks back.
    BACKEND = "backend"
    #: Those that listen do so on a broker of another address, and have nothing to do.
    BROKER = "broker"
    #: The same, by a record that is not signed as it must be: for people, and to decide nothing.
    UNTRUSTED = "untrusted"
    #: All slots are taken, or tasks before it come first.
    BUSY = "busy"
    #: Somebody has paused the queue, or all workers that listen.
    PAUSED = "paused"
    #: No reason of a queue: its run's own limits hold a step back, or a pool of Dagster.
    LIMITED = "limited"


@dataclass(frozen=True)
class QueueWait:
    """Why the tasks in a queue wait.

    Attributes:
        reason: sentences for people.
    """

    kind: WaitKind
    reason: str


@dataclass(frozen=True)
class Listeners:
    """The workers that take tasks of one kind from a queue.

    Attributes:
        names: of the workers.
        busy_slots, slots: how many tasks they can and do execute, of whatever queue.
    """

    queue: str
    kind: QueueKind
    names: tuple[str, ...]
    busy_slots: int
    slots: int

    def turn(self) -> QueueWait:
        """The reason of a task that waits for nothing but those before it."""
        return QueueWait(
            WaitKind.BUSY,
            f"Its turn has not come: {self.busy_slots} of {self.slots} {_word(self.kind)} slots of "
            f'queue "{self.queue}" are busy.',
        )


class QueueWaits:
    """The workers, as one sender of tasks sees them.

    Args:
        workers: all that are listed.
        kind: of the sender's tasks.
        broker: address that it sends to.
        signer: that it signs with.
        protocol: version of its tasks.
        says_busy_steps: whether busy step slots are a reason.
        pauses: the queues that are paused.
    """

    def __init__(
        self,
        workers: Iterable[WorkerRecord],
        kind: QueueKind,
        broker: str,
        signer: Signer,
        protocol: int = PROTOCOL,
        *,
        says_busy_steps: bool = False,
        pauses: Mapping[str, QueuePause] = MappingProxyType({}),
    ) -> None:
        self._kind = kind
        self._pauses = pauses
        self._says_busy = kind is QueueKind.RUNS or says_busy_steps
        usable = [it for it in workers if self._slots(it)[1] and it.state != "draining"]
        self._workers = [it for it in usable if it.is_trusted]
        self._untrusted = [it for it in usable if not it.is_trusted]
        self._broker = broker
        self._signer = signer
        self._protocol = protocol

    def of(self, queue: str) -> QueueWait | None:
        """Why a task waits in a queue; None where there is no reason but the tasks before it.

        Args:
            queue: as people name it.
        """
        if pause := self._pauses.get(queue):
            return QueueWait(WaitKind.PAUSED, _paused_queue(pause))
        listening = [it for it in self._workers if queue in it.queues]
        doubtful = next((it for it in self._untrusted if queue in it.queues), None)
        if listening:
            wait = self._of_listening(queue, listening)
        else:
            wait = QueueWait(WaitKind.UNSERVED, self._unserved(queue))
        if doubtful and (wait is None or wait.kind is WaitKind.UNSERVED):
            return QueueWait(WaitKind.UNTRUSTED, _sentence(refuses(self._signer, doubtful)))
        return wait

    def listeners(self, queue: str) -> Listeners:
        """Who takes tasks from a queue, as things are.

        Args:
            queue: as people name it.
        """
        found = [it for it in self._workers if queue in it.queues]
        slots = [self._slots(it) for it in found]
        return Listeners(
            queue,
            self._kind,
            tuple(sorted(it.name for it in found)),
            sum(busy for busy, _ in slots),
            sum(count for _, count in slots),
        )

    def _of_listening(self, queue: str, listening: Collection[WorkerRecord]) -> QueueWait | None:
        able = [it for it in listening if it.protocol == self._protocol]
        if not able:
            return QueueWait(WaitKind.PROTOCOL, self._foreign(queue, listening))
        if refusals := [reason for it in able if (reason := refuses(self._signer, it))]:
            return QueueWait(WaitKind.REFUSED, _sentence(refusals[0]))
        if all(it.state == PAUSED for it in able):
            return QueueWait(WaitKind.PAUSED, self._paused(queue, able))
        able = [it for it in able if it.state != PAUSED]
        near = [it for it in able if not it.broker or is_same_address(it.broker, self._broker)]
        if not near and not self._are_busy(able):
            return QueueWait(WaitKind.BROKER, self._elsewhere(queue, able))
        if self._says_busy and self._are_busy(near or able):
            count = sum(slots for _, slots in map(self._slots, near or able))
            reason = f'All {count} {_word(self._kind)} slots of queue "{queue}" are busy.'
            return QueueWait(WaitKind.BUSY, reason)
        return None

    def _slots(self, worker: WorkerRecord) -> tuple[int, int]:
        """How many of a worker's slots are busy, and how many there are."""
        if self._kind is QueueKind.RUNS:
            return worker.busy_run_slots, worker.run_slots
        return worker.busy_slots, worker.slots

    def _are_busy(self, workers: Iterable[WorkerRecord]) -> bool:
        return all(busy >= slots for busy, slots in map(self._slots, workers))

    def _unserved(self, queue: str) -> str:
        served = ", ".join(sorted({name for it in self._workers for name in it.queues})) or "none"
        if self._kind is QueueKind.RUNS:
            return (
                f'No worker with run slots listens on queue "{queue}". '
                f"Queues with run slots: {served}."
            )
        return f'No worker listens on queue "{queue}". Queues with workers: {served}.'

    def _foreign(self, queue: str, workers: Collection[WorkerRecord]) -> str:
        theirs = _names(f"{it.name} ({_version(it.version, it.protocol)})" for it in workers)
        return (
            f'No worker of queue "{queue}" can execute tasks of this version, '
            f"{_version(__version__, self._protocol)}: it has {theirs}. Start a worker that has "
            "the run's version of dagster-taskiq."
        )

    def _paused(self, queue: str, workers: Collection[WorkerRecord]) -> str:
        theirs = _names(
            f"{it.name} ({it.pause_reason.removesuffix('.')})" if it.pause_reason else it.name
            for it in workers
        )
        return f'All workers of queue "{queue}" are paused: {theirs}.'

    def _elsewhere(self, queue: str, workers: Collection[WorkerRecord]) -> str:
        theirs = _names(f"{it.name} on {it.broker}" for it in workers)
        return (
            f'The workers of queue "{queue}" listen on another broker than {self._broker}, to '
            f"which this run sends: {theirs}. Set the same 'broker' or {BROKER_URL_VARIABLE} on "
            "both sides, unless both addresses lead to one server."
        )


@dataclass
class WaitHistory:
    """What has been said of why one task waits. Times are seconds on the caller's clock.

    Attributes:
        told: the kind of the reason that was said last; None where that is over, or nothing was.
        quiet_until: no other reason is said before.
        foreign_since: since when only workers of another version listen.
    """

    told: WaitKind | None = None
    quiet_until: float = float("-inf")
    foreign_since: float | None = None
    _pause_seconds: float = FIRST_NEWS_PAUSE_SECONDS

    def news(
        self,
        wait: QueueWait | None,
        waited_seconds: float,
        now: float,
        listeners: Listeners | None = None,
    ) -> QueueWait | None:
        """The reason to say now: a new one, or one that was over in between.

        Slots become free and busy all the time, so of these two that is said which comes first.
        Reasons that come and go are said less and less often.

        Args:
            wait: the present reason; None where there is none but the tasks before it.
            waited_seconds: since the task was sent; a worker may just be starting.
            listeners: to say that there are only tasks before it; None not to.
        """
        if wait is None or wait.kind is not WaitKind.PROTOCOL:
            self.foreign_since = None
        elif self.foreign_since is None:
            self.foreign_since = now
        if wait is None:
            if self.told is not WaitKind.BUSY:
                self.told = None
            if listeners is None or waited_seconds <= TURN_REASON_SECONDS:
                return None
            wait = listeners.turn()
        if wait.kind is self.told or waited_seconds <= WAIT_REASON_SECONDS:
            return None
        if now < self.quiet_until:
            return None
        self.told = wait.kind
        self.quiet_until = now + self._pause_seconds
        self._pause_seconds = min(2 * self._pause_seconds, LONGEST_NEWS_PAUSE_SECONDS)
        return wait

    def is_hopeless(self, now: float) -> bool:
        """Whether only workers of another version have listened for ``FOREIGN_WORKERS_SECONDS``."""
        return (
            self.foreign_since is not None and now - self.foreign_since >= FOREIGN_WORKERS_SECONDS
        )


def _word(kind: QueueKind) -> str:
    return "run" if kind is QueueKind.RUNS else "step"


def _paused_queue(pause: QueuePause) -> str:
    why = f": {pause.reason.removesuffix('.')}" if pause.reason else ""
    return f'Queue "{pause.queue}" was paused on host {pause.host}{why}.'


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _version(version: str, protocol: int) -> str:
    return f"dagster-taskiq {version}, protocol {protocol}"


def _names(texts: Iterable[str]) -> str:
    names = list(texts)
    more = len(names) - _MOST_NAMES
    return "; ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
