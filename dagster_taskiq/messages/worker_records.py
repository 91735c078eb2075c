"""How workers describe themselves in the list of workers: signed, where there is a key."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, fields
from typing import Any

from dagster_taskiq.defaults import MAX_CONTROL_BYTES
from dagster_taskiq.errors import UntrustedError
from dagster_taskiq.messages.plain_json import parse_object
from dagster_taskiq.messages.plain_text import plain_name
from dagster_taskiq.messages.signing import Purpose, Signer, without_signature

#: The most queues that a record is believed to name.
_MAX_QUEUES = 1000


@dataclass(frozen=True)
class WorkerRecord:
    """A worker as it describes itself in its heartbeats.

    Attributes:
        worker_id: unique to one life of the worker.
        name: ``name@host``, what people know it by.
        queues: that it listens on, as people name them.
        slots, busy_slots: how many steps it can and does run.
        run_slots, busy_run_slots: the same for whole runs.
        state: ``running``, ``draining``, or ``no processes``: it can start none, and takes nothing.
        started_at: seconds since the epoch.
        refused: how many messages it has refused.
        key_ids: names of the keys that it verifies signatures with, see ``Signer``.
        protocol: version of the tasks that it executes, see ``envelope.PROTOCOL``.
        broker: address of the broker that it listens to, without a password; empty if not told.
        is_trusted: whether the reader may act on it: it is signed, or the reader has no key.
    """

    worker_id: str
    name: str
    host: str
    pid: int
    queues: tuple[str, ...]
    slots: int = 0
    busy_slots: int = 0
    run_slots: int = 0
    busy_run_slots: int = 0
    state: str = "running"
    started_at: float = 0.0
    version: str = "unknown"
    refused: int = 0
    key_ids: tuple[str, ...] = ()
    protocol: int = 1
    broker: str = ""
    is_trusted: bool = True


def write_record(signer: Signer, record: WorkerRecord) -> bytes:
    """The record as its worker stores it."""
    values = {key: value for key, value in asdict(record).items() if key != "is_trusted"}
    return signer.seal(Purpose.WORKER, record.worker_id, json.dumps(values).encode())


def read_record(signer: Signer, worker_id: str, data: bytes) -> WorkerRecord:
    """The record that is stored for a worker; texts in it are safe to show.

    What another version has added to it or leaves out does no harm. One that is not signed as it
    must be is read too, and is not ``is_trusted``.

    Raises:
        ValueError: it is none, or of another worker.
    """
    try:
        text, is_trusted = signer.unseal(Purpose.WORKER, worker_id, data), True
    except UntrustedError:
        text, is_trusted = without_signature(data), False
    values = parse_object(text, MAX_CONTROL_BYTES)
    known = {it.name: _value(it, values) for it in fields(WorkerRecord) if it.name != "is_trusted"}
    if known["worker_id"] != worker_id:
        raise ValueError(f"it is of another worker, {known['worker_id']!r}")
    return WorkerRecord(**known, is_trusted=is_trusted)


def _value(item: Field[Any], values: Mapping[str, Any]) -> Any:
    if item.name not in values and item.default is not MISSING:
        return item.default
    try:
        return _READERS[str(item.type)](values[item.name])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError(f"its {item.name} is missing or of the wrong kind") from None


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return plain_name(value)


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise TypeError
    return tuple(_name(item) for item in value[:_MAX_QUEUES])


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
        raise TypeError
    return value


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(value):
        raise TypeError
    return float(value)


#: By the type of a field.
_READERS: Mapping[str, Callable[[Any], Any]] = {
    "str": _name,
    "tuple[str, ...]": _names,
    "int": _count,
    "float": _seconds,
}
