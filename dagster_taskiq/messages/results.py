"""The result of a task: what a worker stores and the execution loop reads.

A first line in JSON says what came of the task and how long each event is; the events follow as
they are. Neither worker nor client parses them: their threads renew leases, and events can be
large.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from dagster_taskiq.errors import MalformedResultError, UntrustedError
from dagster_taskiq.messages.plain_json import parse_object
from dagster_taskiq.messages.plain_text import plain_name, plain_reason
from dagster_taskiq.messages.refusals import Refusals
from dagster_taskiq.messages.signing import Purpose, Signer

#: The longest first line, in bytes: it has the packed error, with its causes and stacks.
_MAX_HEAD_BYTES = 4 * 2**20


class Outcome(str, Enum):
    """How a task ended, as its worker saw it."""

    #: The child process came back from the task, and the events say what came of it; those of an
    #: interrupted step have no end among them.
    FINISHED = "finished"
    #: The child process could not run the task: code that does not load, no such run, ...
    ERROR = "error"
    #: Another worker may execute it, this one cannot: it has another Dagster instance, or can start
    #: no process. Nothing of the task has begun.
    REFUSED = "refused"
    #: Dagster's log has the attempt as begun by another claim, which decides how it ends: this one
    #: is a copy, of which nothing was done. A worker stores no such result.
    COPY = "copy"
    #: The child process ran the task, but Dagster's log did not take all of its events: what counts
    #: is what the log has.
    UNLOGGED = "unlogged"
    #: The task has no result that can be used: its child died, its worker was lost, or the result
    #: is too large or cannot be read. Dagster's log decides.
    DIED = "died"


@dataclass(frozen=True)
class Place:
    """Where a task runs, for people.

    Attributes:
        worker: ``name@host``, as in every listing.
        worker_id: unique to one life of the worker, for control messages.
        host: of the worker.
        pid: of the child process.
        slot: the number of the worker's slot.
    """

    worker: str
    worker_id: str
    host: str
    pid: int
    slot: int

    @classmethod
    def from_dict(cls, values: Any) -> Place:
        """The place; names in it are safe to show.

        Raises:
            MalformedResultError: the values are no place.
        """
        try:
            place = cls(**values)
            if not all(isinstance(it, int) for it in (place.pid, place.slot)):
                raise TypeError("pid or slot is no number")
            return replace(
                place,
                worker=plain_name(place.worker),
                worker_id=str(place.worker_id),
                host=plain_name(place.host),
            )
        except (TypeError, AttributeError) as error:
            raise MalformedResultError(f"it does not say where it ran: {error}") from None

    @classmethod
    def in_text(cls, text: bytes | str | None) -> Place | None:
        """The place in a text of JSON, for people; None where it does not say."""
        try:
            return cls.from_dict(json.loads(text)) if text else None
        except (ValueError, RecursionError, MalformedResultError):
            return None


#: Of a task that nobody is known to have executed.
NOWHERE = Place(worker="unknown", worker_id="", host="unknown", pid=0, slot=0)


@dataclass(frozen=True)
class TaskResult:
    """What one task came to.

    Attributes:
        outcome: see ``Outcome``.
        place: who ran it.
        events: Dagster's events of the step, serialized, in their order.
        error: Dagster's packed ``SerializableErrorInfo``, for ``ERROR`` and ``UNLOGGED``; of a step
            that was interrupted, where it was.
        reason: a sentence for people: of a death, of a cancel.
        exit_code: of a child process that died or of a run; negative is a signal's number.
        is_cancelled: from a child, whether it was interrupted; in a stored result, whether a cancel
            was the reason, which rules out a retry.
        queue: of a task that is ``REFUSED``, the queue to send it to instead, as people name it;
            empty for the one that it came from.
        started_at: when a step whose result has only the events of its outcome was begun, by its
            host's clock, in seconds since the epoch.
    """

    outcome: Outcome
    place: Place
    events: tuple[str, ...] = ()
    error: Mapping[str, Any] | None = None
    reason: str = ""
    exit_code: int | None = None
    is_cancelled: bool = False
    queue: str = ""
    started_at: float | None = None

    def to_bytes(self, signer: Signer | None = None, task_id: str = "") -> bytes:
        """The text for its reader; with a signer, the sealed result of a task.

        Raises:
            TooLargeError: it is longer than the signer's limit.
        """
        head = _head_of(self)
        if len(head) > _MAX_HEAD_BYTES:
            shortened = f"{self.reason or (self.error or {}).get('message', '')}"[:10_000]
            reason = f"{shortened} (Shortened: the error had {len(head):,} bytes.)"
            head = _head_of(replace(self, error=None, reason=reason))
        text = b"\n".join([head, *(event.encode() for event in self.events)])
        return text if signer is None else signer.seal(Purpose.RESULT, task_id, text)

    @classmethod
    def from_bytes(cls, data: bytes, signer: Signer | None = None, task_id: str = "") -> TaskResult:
        """The result that ``to_bytes`` wrote; without a signer whoever wrote it.

        Raises:
            MalformedResultError: it is none.
            UntrustedError: it is too large, or not signed with a key of ours as the result of that
                task.
        """
        text = data if signer is None else signer.unseal(Purpose.RESULT, task_id, data)
        head = text.partition(b"\n")[0]
        try:
            values = parse_object(head, _MAX_HEAD_BYTES)
            events = tuple(_cut(text[len(head) :], values.pop("events")))
            if not isinstance(values.get("error"), (dict, type(None))):
                raise TypeError("the error is no mapping")
            if not isinstance(values.get("reason"), str):
                raise TypeError("the reason is no text")
            if not isinstance(values.get("started_at"), (float, type(None))):
                raise TypeError("the start is no time")
            values["queue"] = plain_name(values.get("queue", ""))
            return cls(
                outcome=Outcome(values.pop("outcome")),
                place=Place.from_dict(values.pop("place")),
                events=events,
                **values,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MalformedResultError(f"it is not a result of ours: {error!r}") from None


def _head_of(result: TaskResult) -> bytes:
    values = {**vars(result), "outcome": result.outcome.value, "place": vars(result.place)}
    values["events"] = [len(event.encode()) for event in result.events]
    # older versions know neither: they move no tasks, and ask for all events
    if not result.queue:
        del values["queue"]
    if result.started_at is None:
        del values["started_at"]
    return json.dumps(values).encode()


def _cut(rest: bytes, lengths: list[int]) -> Iterator[str]:
    """The texts of these lengths in bytes, each after a line break.

    Raises:
        ValueError, TypeError: the rest is not made of them.
    """
    start = 0
    for length in lengths:
        end = start + 1 + length
        if isinstance(length, bool) or not start < end <= len(rest):
            raise ValueError("it ends before its events do")
        yield rest[start + 1 : end].decode()
        start = end
    if len(rest) != start:
        raise ValueError("it goes on after its events")


def read_result(signer: Signer, task_id: str, data: bytes, refusals: Refusals) -> TaskResult:
    """What a task came to; for what cannot be read, or was not signed, a death ``NOWHERE``.

    What came of the task is then for Dagster's log to say.
    """
    try:
        result = TaskResult.from_bytes(data, signer, task_id)
        return replace(result, reason=plain_reason(result.reason))
    except (MalformedResultError, UntrustedError) as error:
        refusals.note("a result", error)
        reason = f"The result of task {task_id} was refused: {error}."
        return TaskResult(Outcome.DIED, NOWHERE, reason=reason)
