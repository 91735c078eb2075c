"""Whether a worker can keep its promises, in sentences.

The worker's event loop tells, as an observer; another thread asks, also while the loop hangs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from dagster_taskiq.defaults import INTERRUPT_AFTER_LEASE_SHARE
from dagster_taskiq.errors import ServerError
from dagster_taskiq.messages.envelope import Envelope
from dagster_taskiq.messages.worker_records import PAUSED
from dagster_taskiq.monitoring.loop_watch import LoopWatch
from dagster_taskiq.worker.observer import LeaseRenewal, WorkerObserver

#: How late the event loop may be. Its first renewal of a usual lease is due after 5 s, and steps
#: are stopped after 20 s without one.
LONGEST_LAG_SECONDS = 5.0

#: What must be left of a lease: below it, three renewals in a row have failed.
_LEAST_LEASE_SHARE = 1 - INTERRUPT_AFTER_LEASE_SHARE * 3 / 4

#: States of a healthy worker that takes nothing now, with what they mean.
_NOTES = {
    "draining": "The worker drains: it takes no new tasks, and ends when its tasks have.",
    PAUSED: "The worker is paused: it takes no new tasks until it is resumed.",
}


@dataclass(frozen=True)
class Cause:
    """Why a worker is not healthy.

    Attributes:
        text: a sentence.
        is_mended_by_restart: whether it is the process itself, and not what is around it.
    """

    text: str
    is_mended_by_restart: bool


class WorkerHealth(WorkerObserver):
    """Knows why a worker is not healthy.

    Args:
        now: a monotonic clock, in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.loop_watch = LoopWatch(now)
        self._now = now
        self._is_ready = False
        self._failed_task = ""
        self._outage: tuple[float, str] | None = None
        #: By task id: when the lease was renewed last, and how long it is.
        self._leases: dict[str, tuple[float, float]] = {}

    def ready(self) -> None:
        """The worker takes tasks."""
        self._is_ready = True

    # --- what the event loop tells ---

    def claimed(self, envelope: Envelope) -> None:
        """See ``WorkerObserver``."""
        self._leases[envelope.task_id] = self._now(), envelope.lease_seconds

    def released(self, envelope: Envelope) -> None:
        """See ``WorkerObserver``."""
        self._leases.pop(envelope.task_id, None)

    def renewed(self, renewal: LeaseRenewal) -> None:
        """See ``WorkerObserver``."""
        sent_at = self._now() - renewal.seconds
        for task_id, (renewed_at, seconds) in self._leases.items():
            self._leases[task_id] = max(renewed_at, sent_at), seconds

    def outage(self, address: str, error: ServerError) -> None:
        """See ``WorkerObserver``."""
        self._outage = self._now(), str(error)

    def outage_over(self, address: str) -> None:
        """See ``WorkerObserver``."""
        self._outage = None

    def failed(self, task: str) -> None:
        """See ``WorkerObserver``."""
        self._failed_task = task

    # --- what another thread asks ---

    @property
    def is_ready(self) -> bool:
        """Whether the worker takes tasks, or has done so."""
        return self._is_ready

    @property
    def least_lease_share(self) -> float:
        """The least that is left of a lease now; 1 is all of it."""
        return min([1 - age / lease for age, lease in self._ages()], default=1.0)

    def _ages(self) -> list[tuple[float, float]]:
        """Of each lease how long ago it was renewed, and how long it is; in seconds."""
        now = self._now()
        return [(now - renewed_at, seconds) for renewed_at, seconds in list(self._leases.values())]

    def causes(self, state: str) -> list[Cause]:
        """Why the worker is not healthy; empty if it is.

        Args:
            state: that it is in, see ``WorkerRecord``.
        """
        causes = []
        lag_seconds = self.loop_watch.lag_seconds
        if lag_seconds > LONGEST_LAG_SECONDS:
            text = f"The worker's event loop, which renews claims, has hung for {lag_seconds:.0f} s"
            causes.append(Cause(f"{text}.", is_mended_by_restart=True))
        if self._failed_task:
            text = f"The worker's background task {self._failed_task!r} has ended: it stops"
            causes.append(Cause(f"{text}, see its log.", is_mended_by_restart=True))
        if not self._is_ready:
            text = "The worker is not ready yet: it waits for its servers, or starts its processes."
            causes.append(Cause(text, is_mended_by_restart=False))
        if state == "no processes":
            text = "The worker can start no processes, and takes no tasks; see its log."
            causes.append(Cause(text, is_mended_by_restart=False))
        if lease_text := self._lease_cause():
            causes.append(Cause(lease_text, is_mended_by_restart=False))
        return causes

    def _lease_cause(self) -> str:
        if self._outage is not None:
            since, text = self._outage
            return f"The worker has not renewed its claims for {self._now() - since:.0f} s: {text}"
        late = [age for age, lease in self._ages() if 1 - age / lease < _LEAST_LEASE_SHARE]
        if not late:
            return ""
        return (
            f"The worker has not renewed {len(late)} of its claims for up to {max(late):.0f} s: "
            "the backend has not answered."
        )

    @staticmethod
    def note(state: str) -> str:
        """What there is to say of a healthy worker in a state; a sentence."""
        return _NOTES.get(state, f"The worker is {state}.")
