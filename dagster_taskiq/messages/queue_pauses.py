"""Pauses of queues: who holds a queue up for all workers, since when and why; signed with a key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass

from dagster_taskiq.defaults import MAX_CONTROL_BYTES
from dagster_taskiq.errors import UntrustedError
from dagster_taskiq.messages.plain_json import parse_object
from dagster_taskiq.messages.plain_text import plain_name, plain_reason
from dagster_taskiq.messages.signing import Purpose, Signer


@dataclass(frozen=True)
class QueuePause:
    """No worker takes tasks from a queue, of steps or of runs.

    Attributes:
        queue: as people name it.
        reason: of who has paused it, for people; may be empty.
        paused_at: by the clock of the host where it was paused; seconds since the epoch.
        host: where it was paused.
    """

    queue: str
    reason: str
    paused_at: float
    host: str


def write_pause(signer: Signer, pause: QueuePause) -> bytes:
    """The pause as it is stored."""
    return signer.seal(Purpose.PAUSE, pause.queue, json.dumps(asdict(pause)).encode())


def readable_pauses(signer: Signer, stored: Mapping[str, bytes]) -> dict[str, QueuePause]:
    """The pauses that are stored, by queue; texts in them are safe to show.

    What is not signed as it must be, or is no pause of that queue, is left out.
    """
    found = {}
    for queue, data in stored.items():
        with suppress(UntrustedError, ValueError, KeyError, TypeError):
            found[queue] = _read_pause(signer, queue, data)
    return found


def _read_pause(signer: Signer, queue: str, data: bytes) -> QueuePause:
    values = parse_object(signer.unseal(Purpose.PAUSE, queue, data), MAX_CONTROL_BYTES)
    if values["queue"] != queue:
        raise ValueError("it is of another queue")
    return QueuePause(
        queue,
        plain_reason(str(values["reason"])),
        float(values["paused_at"]),
        plain_name(str(values["host"])),
    )
