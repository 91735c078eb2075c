"""How workers describe themselves in the list of workers: signed, where there is a key.

A signed record has its time in it, so that nobody can keep a dead worker in the list.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from dagster_taskiq.defaults import (
    CONTROL_AGE_SECONDS,
    MAX_CONTROL_BYTES,
    WORKER_EXPIRES_SECONDS,
)
from dagster_taskiq.errors import UntrustedError
from dagster_taskiq.messages.plain_json import parse_object
from dagster_taskiq.messages.plain_text import plain_name
from dagster_taskiq.messages.signing import Purpose, Signer, without_signature

#: The most queues that a record is believed to name.
_MAX_QUEUES = 1000

#: How old a record may be by its reader's clock: as old as it is kept, where clocks differ.
MAX_RECORD_AGE_SECONDS = WORKER_EXPIRES_SECONDS + CONTROL_AGE_SECONDS

#: What a reader makes of a record; no record says it of itself.
_OF_THE_READER = ("is_trusted", "is_outdated")

#: The state of a worker that has not been heard of for ``WORKER_EXPIRES_SECONDS``, and has not
#: signed off. Its record is kept for some minutes, for people.
LOST = "lost"

#: How many tasks a worker tells at most, and the most bytes that these are believed to take.
MAX_RUNNING = 100
_MAX_RUNNING_BYTES = 512 * 2**10


#: The state of a worker that takes no new tasks until it is resumed.
PAUSED = "paused"


@dataclass(frozen=True)
class RunningTask:
    """A task that a worker has claimed, as it says it beside its record.

    Not in the record, which every run with a waiting step reads every few seconds.

    Attributes:
        step_key: empty for a whole run.
        attempt: see ``Envelope``.
        claimed_at: by the worker's clock; seconds since the epoch.
        job: name of the run's job; empty where its sender does not tell.
    """

    task_id: str
    run_id: str
    step_key: str
    attempt: int
    queue: str
    claimed_at: float
    job: str = ""


@dataclass(frozen=True)
class WorkerRecord:
    """A worker as it describes itself in its heartbeats.

    Attributes:
        worker_id: unique to one life of the worker.
        name: ``name@host``, what people know it by.
        queues: that it listens on, as people name them.
        slots, busy_slots: how many steps it can and does run.
        run_slots, busy_run_slots: the same for whole runs.
        state: ``running``, ``paused``, ``draining``, or ``no processes``: it can start none. In the
            last three it takes nothing. From ``lost_workers`` always ``LOST``.
        pause_reason: of who has paused it, for people.
        started_at: seconds since the epoch.
        refused: how many messages it has refused.
        key_ids: names of the keys that it verifies signatures with, see ``Signer``.
        protocol: version of the tasks that it executes, see ``envelope.PROTOCOL``.
        other_backend: address of the backend whose tasks it gives back, since it has another one;
            empty without such tasks.
        broker: address of the broker that it listens to, without a password; empty if not told.
        pings: ids of the last pings that it has answered, see ``control.ping_order``.
        done, failed: how many tasks have ended in it since its start: a step, or a whole run, with
            success or not. An attempt that is tried again has failed.
        memory_bytes: of the worker and all processes below it, where what some of them share
            counts once; 0 where it is not known.
        dagster, python: versions; empty where it does not tell.
        storage: which storage its Dagster instance has, see ``storage_fingerprint``; empty where it
            does not tell.
        warm_code: what its children need not load, for people, see ``Templates``.
        cold_code: what each of them loads itself, and why.
        sent_at: when it was written, by the worker's clock; seconds since the epoch.
        is_trusted: whether the reader may act on it: it is signed and not outdated, or the reader
            has no key.
        is_outdated: whether it is signed, and older than a worker's that lives, by the reader's
            clock; or from the future.
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
    pause_reason: str = ""
    started_at: float = 0.0
    version: str = "unknown"
    refused: int = 0
    key_ids: tuple[str, ...] = ()
    protocol: int = 1
    other_backend: str = ""
    broker: str = ""
    pings: tuple[str, ...] = ()
    done: int = 0
    failed: int = 0
    memory_bytes: int = 0
    dagster: str = ""
    python: str = ""
    storage: str = ""
    warm_code: tuple[str, ...] = ()
    cold_code: tuple[str, ...] = ()
    sent_at: float = 0.0
    is_trusted: bool = True
    is_outdated: bool = False


def write_record(signer: Signer, record: WorkerRecord) -> bytes:
    """The record as its worker stores it."""
    values = {key: value for key, value in asdict(record).items() if key not in _OF_THE_READER}
    return signer.seal(Purpose.WORKER, record.worker_id, json.dumps(values).encode())


def read_record(signer: Signer, worker_id: str, data: bytes, now: float) -> WorkerRecord:
    """The record that is stored for a worker; texts in it are safe to show.

    What another version has added to it or leaves out does no harm. One that is not signed as it
    must be, or is outdated, is read too, and is not ``is_trusted``.

    Args:
        now: seconds since the epoch.

    Raises:
        ValueError: it is none, or of another worker.
    """
    try:
        text, is_trusted = signer.unseal(Purpose.WORKER, worker_id, data), True
    except UntrustedError:
        text, is_trusted = without_signature(data), False
    values = parse_object(text, MAX_CONTROL_BYTES)
    own = [item for item in fields(WorkerRecord) if item.name not in _OF_THE_READER]
    known = {item.name: _value(item, values) for item in own}
    if known["worker_id"] != worker_id:
        raise ValueError(f"it is of another worker, {known['worker_id']!r}")
    is_old = abs(now - known["sent_at"]) > MAX_RECORD_AGE_SECONDS
    is_outdated = signer.is_active and is_trusted and is_old
    return WorkerRecord(**known, is_trusted=is_trusted and not is_outdated, is_outdated=is_outdated)


def readable_records(
    signer: Signer, stored: Mapping[str, bytes], note: Callable[[str, str], None]
) -> list[WorkerRecord]:
    """The records that are stored, by their workers' ids, in the order of their names.

    Args:
        note: is told the worker's id and the problem of each record that cannot be read, since
            anybody who can write there can have put it there.
    """
    found = []
    for worker_id, data in stored.items():
        try:
            found.append(read_record(signer, worker_id, data, time.time()))
        except ValueError as error:
            note(worker_id, str(error))
    return sorted(found, key=lambda record: record.name)


def as_lost(records: Iterable[WorkerRecord]) -> list[WorkerRecord]:
    """The same records, of workers that are not heard of any more."""
    return [replace(record, state=LOST) for record in records]


def write_running(signer: Signer, worker_id: str, tasks: Sequence[RunningTask]) -> bytes:
    """What a worker executes as it stores it, of its ``tasks`` the first ``MAX_RUNNING``."""
    text = json.dumps({"running": [asdict(task) for task in tasks[:MAX_RUNNING]]})
    return signer.seal(Purpose.WORKER, _running_subject(worker_id), text.encode())


def readable_running(signer: Signer, stored: Mapping[str, bytes]) -> list[RunningTask]:
    """What is stored of what workers execute, by their ids; texts in it are safe to show.

    What is not signed as it must be, or is nothing of the kind, is left out.
    """
    found: list[RunningTask] = []
    for worker_id, data in stored.items():
        with suppress(UntrustedError, ValueError):
            found += _read_running(signer, worker_id, data)
    return found


def _read_running(signer: Signer, worker_id: str, data: bytes) -> list[RunningTask]:
    text = signer.unseal(Purpose.WORKER, _running_subject(worker_id), data)
    values = parse_object(text, _MAX_RUNNING_BYTES).get("running")
    if not isinstance(values, list):
        raise ValueError("it names no tasks")  # noqa: TRY004 - for one kind of error
    return [_running_task(value) for value in values[:MAX_RUNNING]]


def _running_task(values: Any) -> RunningTask:
    if not isinstance(values, dict):
        raise ValueError("what it names is no task")  # noqa: TRY004 - for one kind of error
    return RunningTask(**{item.name: _value(item, values) for item in fields(RunningTask)})


def _running_subject(worker_id: str) -> str:
    return f"running {worker_id}"


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


def is_named(record: WorkerRecord, name: str) -> bool:
    """Whether NAME, NAME@HOST or @HOST means this worker; each may be a pattern, as of files."""
    own, _, host = record.name.partition("@")
    meant = (record.name, own, f"@{host}")
    return name in meant or any(fnmatchcase(it, name) for it in meant)
