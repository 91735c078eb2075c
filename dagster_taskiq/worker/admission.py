"""Which messages a station's broker hands on: tasks of the station, signed where there are keys."""

from __future__ import annotations

import time
from collections.abc import Collection

from dagster_taskiq.backend import Backend
from dagster_taskiq.brokers import Admission
from dagster_taskiq.defaults import RUN_RECORD_EXPIRES_SECONDS
from dagster_taskiq.errors import (
    MalformedTaskError,
    OtherBackendError,
    ServerError,
    UntrustedError,
)
from dagster_taskiq.messages.envelope import Envelope, QueueKind
from dagster_taskiq.messages.notes import write_note
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.worker.observer import WorkerObserver


class StationAdmission(Admission):
    """Makes envelopes of messages.

    Args:
        kind: of the station's tasks.
        queues: that it listens on, as people name them.
        signer: of tasks.
        observer: hears of what is admitted, refused and given back.
        backend: where tasks are claimed; it was reached.
        worker: name of the worker.
    """

    def __init__(
        self,
        kind: QueueKind,
        queues: Collection[str],
        signer: Signer,
        observer: WorkerObserver,
        backend: Backend,
        worker: str,
    ) -> None:
        self._kind = kind
        self._queues = queues
        self._signer = signer
        self._observer = observer
        self._backend = backend
        self._worker = worker

    def admit(self, data: bytes) -> Envelope:
        """The envelope of a message.

        Raises:
            UntrustedError, MalformedTaskError: it must not be executed here.
            OtherBackendError: only a worker on another backend can execute it.
        """
        envelope = Envelope.from_bytes(data, self._signer)
        is_ours = envelope.kind is self._kind and envelope.queue in self._queues
        if self._signer.is_active and not is_ours:
            where = f"the {envelope.kind.value} of {envelope.queue!r}"
            raise UntrustedError(f"it was sent to {where}")
        if envelope.state not in (None, self._backend.identity):
            raise self._of_another_backend(envelope)
        self._observer.admitted(envelope)
        return envelope

    def _of_another_backend(self, envelope: Envelope) -> Exception:
        if time.time() - envelope.sent_at > RUN_RECORD_EXPIRES_SECONDS:
            # no backend knows its run any more
            days = RUN_RECORD_EXPIRES_SECONDS / 86400
            return MalformedTaskError(
                f"it is of a run whose backend is {envelope.backend}, and was sent more than "
                f"{days:g} days ago"
            )
        self._observer.given_back(envelope)
        text = (
            f'Worker {self._worker} listens on queue "{envelope.queue}", and gives the run\'s '
            f"tasks back, since its backend is {self._backend.address}, and the run's is "
            f"{envelope.backend}. Set the same backend for both, or a key_prefix of its own for "
            "each deployment of the broker."
        )
        note = write_note(self._signer, envelope.run_id, text)
        return OtherBackendError(text, envelope.run_id, note)

    def refused(self, address: str, error: Exception) -> None:
        """See ``Admission``."""
        self._observer.refused(address, "a message", error)

    def outage(self, error: ServerError | None) -> None:
        """See ``Admission``."""
        if error is None:
            self._observer.broker_back(self._kind)
        else:
            self._observer.broker_away(self._kind, error)
