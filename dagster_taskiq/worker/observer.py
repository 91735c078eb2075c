"""What a worker's observers hear, and the two that every worker has: its log and its counters.

    admitted --> claimed --> began --> ended --> completed --> released
        '------> dropped
    given_back

``admitted`` may be the last word, where the message goes back to its queue. ``ended`` comes without
``began`` where the slot had no child, and ``completed`` not at all where the claim was lost, or a
run is left to another worker. ``released`` comes once for each ``claimed``, whatever
becomes of the task.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dagster_taskiq.backend import Claim, ClaimAnswer
from dagster_taskiq.errors import ServerError
from dagster_taskiq.messages.envelope import Envelope, QueueKind
from dagster_taskiq.messages.refusals import Refusals
from dagster_taskiq.messages.results import Outcome, Place, TaskResult
from dagster_taskiq.messages.worker_records import RunningTask
from dagster_taskiq.worker.slot_base import ReplaceReason

logger = logging.getLogger(__name__)

#: Of how many other backends the log says that their tasks are given back.
_MOST_BACKENDS = 100

#: How long the listing shows that tasks were given back.
_SHOWN_SECONDS = 60.0


@dataclass(frozen=True)
class Ending:
    """How a task ended in its slot, by the worker's monotonic clock.

    Attributes:
        outcome: see ``Outcome``.
        waited_seconds: from its admission until it began, or until it was clear that it cannot
            begin. The time in its queue is not known to a worker.
        run_seconds: from its beginning to its end; None where it could not begin.
        cause: why it ended other than by its own end; empty where there is nothing to say.
        left_behind: what keeps its child from taking another task, in words; empty if nothing.
        has_failed: whether it came to no good end; see ``answers.has_failed``.
        step_end: what a step came to by its own events, see ``TaskRunner``; empty if unknown.
        stopped_by: name of the ``StopReason`` for which it was stopped; empty if it was not.
    """

    outcome: Outcome
    waited_seconds: float
    run_seconds: float | None
    cause: str = ""
    left_behind: str = ""
    has_failed: bool = False
    step_end: str = ""
    stopped_by: str = ""


@dataclass(frozen=True)
class LeaseRenewal:
    """One renewal of all claims of a worker.

    Attributes:
        claims: how many it was for.
        lost: how many of them were not held any more.
        seconds: how long the answer took.
        least_left_share: the least that was left of a lease when the answer came, counted from the
            renewal before; 1 is all of it.
    """

    claims: int
    lost: int
    seconds: float
    least_left_share: float


class WorkerObserver:
    """Hears what a worker does; a subclass overrides what it wants to hear.

    Every method is called in the worker's event loop, which renews leases: it must return at once.
    """

    def admitted(self, envelope: Envelope) -> None:
        """A message that was taken, for which a slot is free, is a task for this worker."""

    def given_back(self, envelope: Envelope) -> None:
        """A task is of a run with another backend; its message goes back, and may come again."""

    def dropped(self, envelope: Envelope, answer: ClaimAnswer) -> None:
        """A task could not be claimed, for good; its message is acked."""

    def claimed(self, envelope: Envelope) -> None:
        """A task is this worker's."""

    def began(self, envelope: Envelope, place: Place) -> None:
        """A task is given to the child of its slot."""

    def stopped(self, claim: Claim, cause: str) -> None:
        """A task may not go on; its child is told."""

    def ended(self, envelope: Envelope, ending: Ending) -> None:
        """A task has ended in its slot; its result is not stored yet."""

    def completed(
        self, envelope: Envelope, result: TaskResult, *, is_cancelled: bool, size_bytes: int
    ) -> None:
        """The result of a task is stored, which ends its claim.

        Args:
            is_cancelled: whether it was stopped for a cancel.
            size_bytes: of the result, as it is stored.
        """

    def released(self, envelope: Envelope) -> None:
        """A task that was claimed is not this worker's any more."""

    def refused(self, address: str, what: str, error: Exception) -> None:
        """A message or an order was refused.

        Args:
            address: of the server that it came from.
            what: was refused, with an article.
        """

    def ordered(self, order: Mapping[str, Any]) -> None:
        """An order to this worker has arrived by the control mailbox; see ``control``."""

    def renewed(self, renewal: LeaseRenewal) -> None:
        """The claims of the worker were renewed in one call."""

    def outage(self, address: str, error: ServerError) -> None:
        """The backend does not renew claims; said once, until ``outage_over``."""

    def outage_over(self, address: str) -> None:
        """The backend renews claims again."""

    def broker_away(self, kind: QueueKind, error: ServerError) -> None:
        """A station cannot listen to its broker; said once, until ``broker_back``."""

    def broker_back(self, kind: QueueKind) -> None:
        """The station listens again."""

    def child_replaced(self, slot: int, pid: int, reason: ReplaceReason) -> None:
        """A slot gives up its child for a new one.

        Args:
            slot: its number.
            pid: of the child that goes.
        """

    def failed(self, task: str) -> None:
        """A background task of the worker has ended, which must not: the worker stops.

        Args:
            task: its name.
        """


class LoggingObserver(WorkerObserver):
    """Writes the worker's log of its tasks; a flood of refused messages does not fill it."""

    def __init__(self) -> None:
        self._refusals: dict[str, Refusals] = {}
        self._given_back: set[str] = set()

    def given_back(self, envelope: Envelope) -> None:
        """See ``WorkerObserver``; said once of each backend."""
        if envelope.backend in self._given_back or len(self._given_back) >= _MOST_BACKENDS:
            return
        self._given_back.add(envelope.backend)
        logger.warning(
            "%s goes back to its queue, as will all tasks of runs whose backend is %s: this "
            "worker's is another one. Set the same backend for both, or a key_prefix of its own "
            "for each deployment that shares this broker.",
            envelope.title,
            envelope.backend,
        )

    def dropped(self, envelope: Envelope, answer: ClaimAnswer) -> None:
        """See ``WorkerObserver``."""
        logger.info("Dropped task %s: it is %s.", envelope.task_id, answer.value)

    def began(self, envelope: Envelope, place: Place) -> None:
        """See ``WorkerObserver``."""
        logger.info("%s: starting in slot %d.", envelope.title, place.slot)

    def stopped(self, claim: Claim, cause: str) -> None:
        """See ``WorkerObserver``."""
        logger.warning("Stopping task %s: %s.", claim.task_id, cause)

    def ended(self, envelope: Envelope, ending: Ending) -> None:
        """See ``WorkerObserver``."""
        title = envelope.title
        if ending.left_behind:
            logger.warning("%s left behind %s: its process is replaced.", title, ending.left_behind)
        if ending.run_seconds is not None:
            level = logging.INFO if ending.outcome is Outcome.FINISHED else logging.WARNING
            seconds, cause = ending.run_seconds, ending.cause
            logger.log(level, "%s: ended after %.3f s. %s", title, seconds, cause)

    def refused(self, address: str, what: str, error: Exception) -> None:
        """See ``WorkerObserver``."""
        self._refusals.setdefault(address, Refusals(address)).note(what, error)

    def outage(self, address: str, error: ServerError) -> None:
        """See ``WorkerObserver``."""
        logger.warning("Cannot renew the leases of running steps: %s Trying again.", error)

    def outage_over(self, address: str) -> None:
        """See ``WorkerObserver``."""
        logger.info("%s is back; the leases are renewed.", address)


class CountingObserver(WorkerObserver):
    """Counts what the list of workers shows.

    Attributes:
        busy: how many tasks of each kind are claimed now.
        running: those tasks by their ids, the longest claimed first.
        refused_count: how many messages and orders were refused.
        done_count, failed_count: how many tasks have ended, with success or not; without those
            that are for another worker.
    """

    _given_back: tuple[str, float] = "", 0.0

    def __init__(self) -> None:
        self.busy: Counter[QueueKind] = Counter()
        self.running: dict[str, RunningTask] = {}
        self.refused_count = self.done_count = self.failed_count = 0

    @property
    def other_backend(self) -> str:
        """Address of the backend whose tasks were given back last; empty if that is long ago."""
        backend, at = self._given_back
        return backend if time.monotonic() - at < _SHOWN_SECONDS else ""

    def given_back(self, envelope: Envelope) -> None:
        """See ``WorkerObserver``."""
        self._given_back = envelope.backend, time.monotonic()

    def claimed(self, envelope: Envelope) -> None:
        """See ``WorkerObserver``."""
        self.busy[envelope.kind] += 1
        self.running[envelope.task_id] = RunningTask(
            task_id=envelope.task_id,
            run_id=envelope.run_id,
            step_key=envelope.step_key or "",
            attempt=envelope.attempt,
            queue=envelope.queue,
            claimed_at=time.time(),
            job=envelope.job,
        )

    def ended(self, envelope: Envelope, ending: Ending) -> None:
        """See ``WorkerObserver``."""
        if ending.has_failed:
            self.failed_count += 1
        elif ending.outcome is Outcome.FINISHED:
            self.done_count += 1

    def released(self, envelope: Envelope) -> None:
        """See ``WorkerObserver``."""
        self.busy[envelope.kind] -= 1
        self.running.pop(envelope.task_id, None)

    def refused(self, address: str, what: str, error: Exception) -> None:
        """See ``WorkerObserver``."""
        self.refused_count += 1


class Observers(WorkerObserver):
    """Several observers as one; the error of one is logged, and stops neither task nor worker."""

    def __init__(self, *observers: WorkerObserver) -> None:
        self._observers = observers

    def _tell(self, event: str, *details: object, **named: object) -> None:
        for observer in self._observers:
            try:
                getattr(observer, event)(*details, **named)
            except Exception:
                logger.exception("%s failed to hear of %r.", type(observer).__name__, event)

    def admitted(self, envelope: Envelope) -> None:
        """See ``WorkerObserver``."""
        self._tell("admitted", envelope)

    def given_back(self, envelope: Envelope) -> None:
        """See ``WorkerObserver``."""
        self._tell("given_back", envelope)

    def dropped(self, envelope: Envelope, answer: ClaimAnswer) -> None:
        """See ``WorkerObserver``."""
        self._tell("dropped", envelope, answer)

    def claimed(self, envelope: Envelope) -> None:
        """See ``WorkerObserver``."""
        self._tell("claimed", envelope)

    def began(self, envelope: Envelope, place: Place) -> None:
        """See ``WorkerObserver``."""
        self._tell("began", envelope, place)

    def stopped(self, claim: Claim, cause: str) -> None:
        """See ``WorkerObserver``."""
        self._tell("stopped", claim, cause)

    def ended(self, envelope: Envelope, ending: Ending) -> None:
        """See ``WorkerObserver``."""
        self._tell("ended", envelope, ending)

    def completed(
        self, envelope: Envelope, result: TaskResult, *, is_cancelled: bool, size_bytes: int
    ) -> None:
        """See ``WorkerObserver``."""
        self._tell("completed", envelope, result, is_cancelled=is_cancelled, size_bytes=size_bytes)

    def released(self, envelope: Envelope) -> None:
        """See ``WorkerObserver``."""
        self._tell("released", envelope)

    def refused(self, address: str, what: str, error: Exception) -> None:
        """See ``WorkerObserver``."""
        self._tell("refused", address, what, error)

    def ordered(self, order: Mapping[str, Any]) -> None:
        """See ``WorkerObserver``."""
        self._tell("ordered", order)

    def renewed(self, renewal: LeaseRenewal) -> None:
        """See ``WorkerObserver``."""
        self._tell("renewed", renewal)

    def outage(self, address: str, error: ServerError) -> None:
        """See ``WorkerObserver``."""
        self._tell("outage", address, error)

    def outage_over(self, address: str) -> None:
        """See ``WorkerObserver``."""
        self._tell("outage_over", address)

    def broker_away(self, kind: QueueKind, error: ServerError) -> None:
        """See ``WorkerObserver``."""
        self._tell("broker_away", kind, error)

    def broker_back(self, kind: QueueKind) -> None:
        """See ``WorkerObserver``."""
        self._tell("broker_back", kind)

    def child_replaced(self, slot: int, pid: int, reason: ReplaceReason) -> None:
        """See ``WorkerObserver``."""
        self._tell("child_replaced", slot, pid, reason)

    def failed(self, task: str) -> None:
        """See ``WorkerObserver``."""
        self._tell("failed", task)
