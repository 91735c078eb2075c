"""Which messages a station's broker hands on: tasks of the station, signed where there are keys."""

from __future__ import annotations

from collections.abc import Collection

from dagster_taskiq.brokers import Admission
from dagster_taskiq.errors import UntrustedError
from dagster_taskiq.messages.envelope import Envelope, QueueKind
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.worker.observer import WorkerObserver


class StationAdmission(Admission):
    """Makes envelopes of messages.

    Args:
        kind: of the station's tasks.
        queues: that it listens on, as people name them.
        signer: of tasks.
        observer: hears of what is admitted and of what is refused.
    """

    def __init__(
        self, kind: QueueKind, queues: Collection[str], signer: Signer, observer: WorkerObserver
    ) -> None:
        self._kind = kind
        self._queues = queues
        self._signer = signer
        self._observer = observer

    def admit(self, data: bytes) -> Envelope:
        """The envelope of a message.

        Raises:
            UntrustedError, MalformedTaskError: it must not be executed here.
        """
        envelope = Envelope.from_bytes(data, self._signer)
        is_ours = envelope.kind is self._kind and envelope.queue in self._queues
        if self._signer.is_active and not is_ours:
            where = f"the {envelope.kind.value} of {envelope.queue!r}"
            raise UntrustedError(f"it was sent to {where}")
        self._observer.admitted(envelope)
        return envelope

    def refused(self, address: str, error: Exception) -> None:
        """See ``Admission``."""
        self._observer.refused(address, "a message", error)
