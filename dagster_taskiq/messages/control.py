"""Orders to workers: how they are written, and which ones a worker believes.

A ``cancel`` is for whichever worker holds a task, all other kinds are for one worker. An order
names its worker by name and id, or its task, and a worker refuses one that is for another. With a
signing key it is signed, and says when it was given and a number of its own: one that came before,
or that was given too long ago, is refused.

A cancel is also kept in the record of its run, where each renewal of the claim finds it again. It
cannot be replayed to any harm, since it names one attempt of a step and is never taken back.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

from dagster_taskiq.defaults import (
    CONTROL_AGE_SECONDS,
    MAX_CONTROL_BYTES,
    SIGNING_KEY_VARIABLE,
)
from dagster_taskiq.errors import UntrustedError
from dagster_taskiq.messages.plain_json import parse_object
from dagster_taskiq.messages.plain_text import plain_reason
from dagster_taskiq.messages.signing import Purpose, Signer
from dagster_taskiq.messages.worker_records import WorkerRecord

#: How many orders a worker remembers, to obey none twice: some 10 MiB of them.
_REMEMBERED_ORDERS = 100_000


class OrderKind(str, Enum):
    """The kinds of orders, with what else they say."""

    #: Stop one task: ``task_id``, ``reason``.
    CANCEL = "cancel"
    #: Take no more tasks and stop when what runs has ended; a second one stops what runs.
    TERMINATE = "terminate"
    #: Give every slot a fresh child.
    RELOAD = "reload"
    #: Nothing but the answer.
    PING = "ping"
    #: Take no new tasks until resumed: ``reason``.
    PAUSE = "pause"
    RESUME = "resume"
    #: Have so many slots: ``queue_kind``, ``slots``.
    SLOTS = "slots"
    #: Listen on more queues, or on fewer: ``queues``.
    ADD_QUEUES = "add-queues"
    REMOVE_QUEUES = "remove-queues"
    #: Look which queues are paused by now.
    LOOK_AT_QUEUES = "look-at-queues"


def worker_order(
    signer: Signer, worker: WorkerRecord, kind: str, ping_id: str = "", **details: Any
) -> str:
    """An order to a worker, ready to be sent.

    Args:
        kind: see ``OrderKind``; another one is ignored.
        ping_id: the worker has obeyed when its record names this one among its ``pings``.
        details: see ``OrderKind``.
    """
    addressee = {"worker_id": worker.worker_id, "worker": worker.name}
    asked = {"ping_id": ping_id} if ping_id else {}
    return _order(signer, {"kind": kind, **addressee, **asked, **details})


def cancel_order(signer: Signer, task_id: str, reason: str) -> str:
    """The order to stop a task, ready to be sent.

    Args:
        reason: a sentence for people.
    """
    return _order(signer, {"kind": OrderKind.CANCEL, "task_id": task_id, "reason": reason})


def _order(signer: Signer, content: Mapping[str, Any]) -> str:
    content = {**content, "sent_at": time.time(), "nonce": uuid.uuid4().hex}
    return signer.seal(Purpose.CONTROL, "", json.dumps(content).encode()).decode()


def refuses(signer: Signer, worker: WorkerRecord) -> str:
    """Why a worker refuses what this signer signs, and what to do; empty where it does not.

    Also where nobody knows whether the record is the worker's own.
    """
    advice = f"Set the same 'signing_key' or {SIGNING_KEY_VARIABLE} on both sides."
    if not signer.is_accepted_by(worker.key_ids):
        why = "it is signed with another signing_key" if signer.is_active else "it is not signed"
        return f"worker {worker.name} refuses it, since {why}. {advice}"
    if worker.is_outdated:
        return (
            f"the record of worker {worker.name} is outdated by this host's clock, so it is not "
            "relied on: somebody has kept it after the worker's death, or the clocks of the hosts "
            f"differ by more than {CONTROL_AGE_SECONDS:g} s."
        )
    if not worker.is_trusted:
        return (
            f"the record of worker {worker.name} is not signed with the signing_key that is set "
            f"here, so it is not relied on. {advice}"
        )
    return ""


def reason_of(order: Mapping[str, Any]) -> str:
    """Why an order was given, safe to show; empty where it does not say."""
    return plain_reason(str(order.get("reason") or ""))


class OrderReader:
    """Reads the orders to one worker.

    Args:
        worker_id: of the worker.
        name: ``name@host`` of the worker.
        clock: seconds since 1970, as the senders' clocks say.
    """

    def __init__(
        self,
        signer: Signer,
        worker_id: str,
        name: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._signer = signer
        self._addressee = {"worker_id": worker_id, "worker": name}
        self._clock = clock
        self._seen: dict[str, None] = {}

    def read(self, data: bytes | str) -> dict[str, Any]:
        """An order from the worker's mailbox.

        Raises:
            UntrustedError: it is none, for another worker, not signed as it must be, too old, or a
                second copy.
        """
        order = self._open(data)
        # a cancel names its task instead, wherever that runs
        if order.get("kind") != OrderKind.CANCEL:
            self._check_addressee(order)
        if self._signer.is_active:
            self._check_is_new(order)
        return order

    def check_cancel(self, task_id: str, data: bytes | str) -> str:
        """Check an order from the record of a run: that it cancels this task; what it says why.

        Raises:
            UntrustedError: it does not.
        """
        try:
            order = self._open(data)
        except UntrustedError:
            if self._signer.is_active:
                raise
            return ""
        named = order.get("kind"), order.get("task_id")
        if self._signer.is_active and named != (OrderKind.CANCEL, task_id):
            raise UntrustedError("it is no order to cancel this task")
        return reason_of(order)

    def _open(self, data: bytes | str) -> dict[str, Any]:
        sealed = data.encode(errors="replace") if isinstance(data, str) else data
        try:
            return parse_object(self._signer.unseal(Purpose.CONTROL, "", sealed), MAX_CONTROL_BYTES)
        except ValueError as error:
            raise UntrustedError(f"it is no order in JSON: {error}") from None

    def _check_addressee(self, order: Mapping[str, Any]) -> None:
        addressee = {key: order.get(key) for key in self._addressee}
        if addressee != self._addressee:
            raise UntrustedError(
                f"it is for worker {addressee['worker']!r} with the id {addressee['worker_id']!r}"
            )

    def _check_is_new(self, order: Mapping[str, Any]) -> None:
        sent_at, nonce = order["sent_at"], order["nonce"]  # as we have signed it
        age = self._clock() - sent_at
        if abs(age) > CONTROL_AGE_SECONDS:
            raise UntrustedError(
                f"it was given {age:.0f} s ago by this host's clock, and counts for "
                f"{CONTROL_AGE_SECONDS:g} s: it is a replay, or the clocks of the hosts differ"
            )
        if nonce in self._seen:
            raise UntrustedError("it has come before: it is a replay")
        # by number and not by age: a clock that goes back makes an old order a new one
        if len(self._seen) >= _REMEMBERED_ORDERS:
            del self._seen[next(iter(self._seen))]
        self._seen[nonce] = None
