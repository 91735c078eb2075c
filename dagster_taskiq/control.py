"""Orders to workers: how they are written, and which ones a worker believes.

``terminate`` is for one worker, ``cancel`` for whichever worker holds a task. With a signing key
an order is signed for that worker or task, and says when it was given and a number of its own: one
that came before, or that was given too long ago, is refused.

A cancel is also kept in the record of its run, where each renewal of the claim finds it again. It
cannot be replayed to any harm, since it names one attempt of a step and is never taken back.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from dagster_taskiq.backend.base import WorkerRecord
from dagster_taskiq.defaults import CONTROL_AGE_SECONDS, SIGNING_KEY_VARIABLE
from dagster_taskiq.errors import UntrustedError
from dagster_taskiq.signing import Purpose, Signer


def worker_order(signer: Signer, worker_id: str, kind: str) -> str:
    """An order to a worker, as JSON."""
    return _order(signer, worker_id, {"kind": kind})


def cancel_order(signer: Signer, task_id: str, reason: str) -> str:
    """The order to stop a task, as JSON.

    Args:
        reason: a sentence for people.
    """
    return _order(signer, task_id, {"kind": "cancel", "task_id": task_id, "reason": reason})


def _order(signer: Signer, subject: str, content: Mapping[str, Any]) -> str:
    content = {**content, "sent_at": time.time(), "nonce": uuid.uuid4().hex}
    return json.dumps(signer.signed(Purpose.CONTROL, subject, content))


def refuses(signer: Signer, worker: WorkerRecord) -> str:
    """Why a worker refuses what this signer signs, and what to do; empty where it does not.

    The list of workers is not signed: act on nothing but people's attention.
    """
    if signer.is_accepted_by(worker.key_ids):
        return ""
    why = "it is signed with another signing_key" if signer.is_active else "it is not signed"
    return (
        f"worker {worker.name} refuses it, since {why}. Set the same 'signing_key' or "
        f"{SIGNING_KEY_VARIABLE} on both sides."
    )


class OrderReader:
    """Reads the orders to one worker.

    Args:
        worker_id: of the worker.
        clock: seconds since 1970, as the senders' clocks say.
    """

    def __init__(
        self, signer: Signer, worker_id: str, clock: Callable[[], float] = time.time
    ) -> None:
        self._signer = signer
        self._worker_id = worker_id
        self._clock = clock
        self._seen: dict[str, float] = {}

    def read(self, data: bytes | str) -> dict[str, Any]:
        """An order from the worker's mailbox.

        Raises:
            UntrustedError: it is none, not signed as it must be, too old, or a second copy.
        """
        order = _decode(data)
        is_cancel = order.get("kind") == "cancel"
        subject = str(order.get("task_id")) if is_cancel else self._worker_id
        order = self._signer.verified(Purpose.CONTROL, subject, order)
        if self._signer.is_active:
            self._check_is_new(order)
        return order

    def check_cancel(self, task_id: str, data: bytes | str) -> None:
        """Check an order from the record of a run: that it cancels this task.

        Raises:
            UntrustedError: it does not.
        """
        if not self._signer.is_active:
            return
        order = self._signer.verified(Purpose.CONTROL, task_id, _decode(data))
        if (order.get("kind"), order.get("task_id")) != ("cancel", task_id):
            raise UntrustedError("it is no order to cancel this task")

    def _check_is_new(self, order: Mapping[str, Any]) -> None:
        now = self._clock()
        sent_at, nonce = order["sent_at"], order["nonce"]  # as we have signed it
        age = now - sent_at
        if abs(age) > CONTROL_AGE_SECONDS:
            raise UntrustedError(
                f"it was given {age:.0f} s ago by this host's clock, and counts for "
                f"{CONTROL_AGE_SECONDS:g} s: it is a replay, or the clocks of the hosts differ"
            )
        if nonce in self._seen:
            raise UntrustedError("it has come before: it is a replay")
        # what is older is refused by its time
        oldest = now - CONTROL_AGE_SECONDS
        self._seen = {key: when for key, when in self._seen.items() if when >= oldest}
        self._seen[nonce] = sent_at


def _decode(data: bytes | str) -> dict[str, Any]:
    try:
        order = json.loads(data)
    except (ValueError, RecursionError):
        order = None
    if not isinstance(order, dict):
        raise UntrustedError("it is no order in JSON")
    return order
