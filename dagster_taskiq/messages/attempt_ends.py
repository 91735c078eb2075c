"""How attempts of steps, and runs, have ended: signed, where there is a key.

The backend keeps the last of them, with counters of all, for those who ask what failed in the
night, and for workers that start, which load the code of the last ones. It decides about no task.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from dagster_taskiq.defaults import HISTORY_EXPIRES_SECONDS
from dagster_taskiq.errors import UntrustedError
from dagster_taskiq.messages.plain_json import parse_object
from dagster_taskiq.messages.plain_text import plain_name, plain_sentence
from dagster_taskiq.messages.signing import Purpose, Signer

#: The longest end that is believed, in bytes: it is a few hundred.
_MAX_END_BYTES = 16 * 2**10

#: The most counters that are believed: one is for a queue, a kind and an event.
_MAX_COUNTERS = 10_000

#: The longest name of a counter: a queue's name takes six characters for one at most.
_MAX_COUNTER_CHARACTERS = 2048

#: How far an end may lie in the future, by its reader's clock: clocks of two hosts differ.
_MAX_AHEAD_SECONDS = 3600.0


class EndOutcome(str, Enum):
    """What an attempt came to."""

    SUCCEEDED = "succeeded"
    #: It has failed by itself, or was never executed since no worker can; or it was stopped by its
    #: worker, other than for a cancel.
    FAILED = "failed"
    #: Its worker or its process has died, or was given up, and no end of it is in Dagster's log.
    LOST = "lost"
    #: Its run was terminated, before it had started or while it was executed.
    CANCELLED = "cancelled"


class EndGroup(str, Enum):
    """Ends that the backend keeps apart, so that many of one group push out none of another."""

    SUCCEEDED = "succeeded"
    #: Failed or lost, and tried again.
    RETRIED = "retried"
    #: Failed or lost for good.
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class AttemptEnd:
    """One attempt of a step, or one execution of a run, that is over.

    Attributes:
        step_key: empty for a whole run.
        attempt: see ``Envelope``.
        queue: as people name it.
        outcome: see ``EndOutcome``.
        ended_at: when its run heard of it, or of a whole run its worker, by the clock of that host;
            seconds since the epoch.
        is_retried: whether it failed or was lost and is tried again.
        job: of Dagster; empty where the reporter does not know it.
        worker: ``name@host``; empty where no worker is known to have had it, like the next two.
        host: of the worker.
        slot: the number of the worker's slot; None for none.
        sent_at: when it was sent, by the run's clock; None where the reporter has not seen it.
        started_at: when a process began with it, by that host's clock; None where none is known to
            have.
        reason: why it has not succeeded, as of ``plain_sentence``; empty for no reason.
    """

    task_id: str
    run_id: str
    step_key: str
    attempt: int
    queue: str
    outcome: EndOutcome
    ended_at: float
    is_retried: bool = False
    job: str = ""
    worker: str = ""
    host: str = ""
    slot: int | None = None
    sent_at: float | None = None
    started_at: float | None = None
    reason: str = ""

    @property
    def kind(self) -> str:
        """The value of its ``QueueKind``."""
        return "steps" if self.step_key else "runs"

    @property
    def group(self) -> EndGroup:
        """Which ends it is kept with."""
        if self.outcome in (EndOutcome.FAILED, EndOutcome.LOST):
            return EndGroup.RETRIED if self.is_retried else EndGroup.FAILED
        return EndGroup(self.outcome.value)


class Counted(str, Enum):
    """What is counted of tasks."""

    #: Put into a queue; one that is sent again after a loss counts again.
    SENT = "sent"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    LOST = "lost"
    CANCELLED = "cancelled"
    #: Failed or lost, and tried again: it counts as failed or lost, too.
    RETRIED = "retried"


@dataclass(frozen=True, order=True)
class Counter:
    """What one counter counts.

    Attributes:
        queue: as people name it.
        kind: the value of a ``QueueKind``.
    """

    queue: str
    kind: str
    what: Counted


@dataclass(frozen=True)
class HistoryBatch:
    """What is added to the history in one step.

    Attributes:
        ends: the oldest first.
        counts: by how much counters grow.
        batch_id: the same batch, sent again after an answer that was lost, counts once.
    """

    ends: Sequence[AttemptEnd] = ()
    counts: Mapping[Counter, int] = field(default_factory=dict)
    batch_id: str = field(default_factory=lambda: uuid.uuid4().hex)


def counters_of(end: AttemptEnd) -> list[Counter]:
    """The counters that an end makes grow."""
    events = [Counted(end.outcome.value)] + [Counted.RETRIED] * end.is_retried
    return [Counter(end.queue, end.kind, what) for what in events]


# --- as they are stored ---


def write_end(signer: Signer, end: AttemptEnd) -> bytes:
    """The end as it is stored, its texts cut as its reader would cut them."""
    values = {
        name: _WRITERS.get(annotation, lambda it: it)(getattr(end, name))
        for name, annotation in _FIELDS.items()
    }
    return signer.seal(Purpose.HISTORY, "", json.dumps(values).encode())


def readable_ends(signer: Signer, stored: Iterable[bytes], now: float) -> list[AttemptEnd]:
    """What is stored, the last one first; texts in it are safe to show.

    What is not signed as it must be, is nothing of the kind, is older than the history goes back,
    or comes a second time, is left out.

    Args:
        now: seconds since the epoch.
    """
    found: dict[str, AttemptEnd] = {}
    for data in stored:
        with suppress(UntrustedError, ValueError):
            end = _read_end(signer, data)
            if -_MAX_AHEAD_SECONDS <= now - end.ended_at <= HISTORY_EXPIRES_SECONDS:
                found.setdefault(end.task_id, end)
    return sorted(found.values(), key=lambda end: end.ended_at, reverse=True)


def _read_end(signer: Signer, data: bytes) -> AttemptEnd:
    """The end.

    Raises:
        UntrustedError: it is not signed.
        ValueError: it is none.
    """
    values = parse_object(signer.unseal(Purpose.HISTORY, "", data), _MAX_END_BYTES)
    try:
        # what another version has added is passed over, and what it leaves out has its default
        return AttemptEnd(
            **{it: _READERS[_FIELDS[it]](values[it]) for it in _FIELDS if it in values}
        )
    except (TypeError, ValueError, OverflowError):
        raise ValueError("a part of it is missing or of the wrong kind") from None


def write_counter(counter: Counter) -> str:
    """The name of the counter in the backend."""
    return json.dumps([plain_name(counter.queue), counter.kind, counter.what.value])


def readable_counts(stored: Mapping[str, int]) -> dict[Counter, int]:
    """The counters by what they count; what is none of ours is left out."""
    found: dict[Counter, int] = {}
    for name, count in list(stored.items())[:_MAX_COUNTERS]:
        if len(name) > _MAX_COUNTER_CHARACTERS:
            continue
        with suppress(ValueError, TypeError, RecursionError):
            queue, kind, what = json.loads(name)
            if kind in ("steps", "runs") and count >= 0:
                found[Counter(_name(queue), kind, Counted(what))] = count
    return found


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return plain_name(value)


def _sentence(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return plain_sentence(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
        raise TypeError
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(value):
        raise TypeError
    return float(value)


def _maybe(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else read(value)


#: The annotation of each field; that of the reason stands for its own kind of text.
_FIELDS: Mapping[str, str] = {
    **{item.name: str(item.type) for item in AttemptEnd.__dataclass_fields__.values()},
    "reason": "sentence",
}

#: By the annotation of a field.
_READERS: Mapping[str, Callable[[Any], Any]] = {
    "str": _name,
    "sentence": _sentence,
    "EndOutcome": EndOutcome,
    "bool": _flag,
    "int": _count,
    "int | None": _maybe(_count),
    "float": _seconds,
    "float | None": _maybe(_seconds),
}
_WRITERS: Mapping[str, Callable[[Any], Any]] = {
    "str": plain_name,
    "sentence": plain_sentence,
    "EndOutcome": lambda outcome: outcome.value,
}
