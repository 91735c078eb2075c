"""The envelope: what a worker must know of a task before it opens it.

A task is two lines of text: the header in JSON, which a worker reads, and the payload (Dagster's
packed arguments, also JSON), which only a child process parses. The worker's event loop, which
renews leases, therefore never spends long on a message, however large.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from dagster_taskiq._taskiq import BrokerMessage
from dagster_taskiq.aio.tracing import TraceContext
from dagster_taskiq.defaults import (
    LONGEST_SECONDS,
    LONGEST_TIME_LIMIT_SECONDS,
    MAX_PRIORITY,
    MIN_LEASE_SECONDS,
    MIN_PRIORITY,
)
from dagster_taskiq.errors import MalformedTaskError, TooLargeError
from dagster_taskiq.messages.plain_json import parse_object
from dagster_taskiq.messages.plain_text import plain_name
from dagster_taskiq.messages.queue_names import PROTOCOL, QueueKind, physical_queue
from dagster_taskiq.messages.signing import Purpose, Signer
from dagster_taskiq.messages.time_limits import TimeLimits

__all__ = [
    "PROTOCOL",
    "Envelope",
    "QueueKind",
    "TaskName",
    "physical_queue",
    "run_task_id",
    "step_task_id",
]

#: Namespace of our task ids, made once with ``uuid4``.
_TASK_ID_NAMESPACE = uuid.UUID("6a1d0c3e-5f4b-4d0e-9a44-0b8f1f6f9f5e")

#: The longest header, in bytes: it holds names and numbers.
_MAX_HEADER_BYTES = 64 * 2**10

#: W3C's: printable ASCII, and no longer than this.
_IS_OF_TRACE = re.compile("[ -~]{1,512}")


class TaskName(str, Enum):
    """The kinds of task, under dagster-celery's names."""

    EXECUTE_PLAN = "execute_plan"
    EXECUTE_JOB = "execute_job"
    RESUME_JOB = "resume_job"


@dataclass(frozen=True)
class Envelope:
    """One task as it travels.

    Attributes:
        task_id: derived from what the task is (see ``step_task_id``), never random.
        name: what to do.
        run_id: the Dagster run.
        step_key: the step, or None for a whole run.
        attempt: of the step, from 1; for a run how often it was resumed, from 0.
        queue: the queue as people name it.
        priority: 0..10, higher first.
        lease_seconds: how long a claim on it holds without renewal.
        cancel_grace_seconds: time between SIGTERM and SIGKILL when it is cancelled.
        epoch: the backend's epoch at the time it was sent.
        payload: Dagster's packed arguments, a JSON object as text.
        limits: how long a step may take; the worker's own limits hold where they say nothing.
        state: identity of the backend that has its claims and results, see ``Backend``; None from
            a sender that does not say.
        backend: address of that backend, for people.
        sent_at: by the sender's clock, seconds since the epoch; 0 from one that does not say.
        code_location: which code a step is of, see ``code_locations``; empty for a run.
        job: name of the run's job, for people; empty from a sender that does not say.
        trace: the context of the attempt's span, see ``aio.tracing``; empty without tracing.
        protocol: of the sender.
    """

    task_id: str
    name: TaskName
    run_id: str
    step_key: str | None
    attempt: int
    queue: str
    priority: int
    lease_seconds: float
    cancel_grace_seconds: float
    epoch: str
    payload: str
    limits: TimeLimits = TimeLimits()
    code_location: str = ""
    state: str | None = None
    backend: str = ""
    sent_at: float = 0.0
    job: str = ""
    trace: TraceContext = field(default_factory=dict)
    protocol: int = PROTOCOL

    @property
    def kind(self) -> QueueKind:
        """Which of its queue's two physical queues it waits in."""
        return QueueKind.STEPS if self.name is TaskName.EXECUTE_PLAN else QueueKind.RUNS

    def header(self) -> dict[str, Any]:
        """Everything but the payload, ready for JSON."""
        left_out = ("payload",) if self.trace else ("payload", "trace")
        header = {key: it for key, it in asdict_shallow(self).items() if key not in left_out}
        return {**header, "name": self.name.value, "limits": asdict(self.limits)}

    def to_message(self, physical_queue: str, signer: Signer) -> BrokerMessage:
        """The message to send to a physical queue.

        Raises:
            TooLargeError: it is longer than the signer's limit; the message says which task.
        """
        text = f"{json.dumps(self.header())}\n{self.payload}".encode()
        try:
            sealed = signer.seal(Purpose.TASK, "", text)
        except TooLargeError as error:
            raise error.of(f"{self.title} cannot be sent") from None
        return BrokerMessage(
            task_id=self.task_id,
            task_name=self.name.value,
            message=sealed,
            labels={"queue_name": physical_queue, "priority": self.priority},
        )

    @property
    def title(self) -> str:
        """What people call it, to begin a sentence with."""
        if self.step_key is None:
            return f"Run {self.run_id}"
        return f"Step {self.step_key} of run {self.run_id}, attempt {self.attempt}"

    @classmethod
    def from_bytes(cls, data: bytes, signer: Signer) -> Envelope:
        """The envelope of a raw message as a broker delivers it.

        Raises:
            MalformedTaskError: the bytes are not a task of ours.
            UntrustedError: it is too large, or not signed with a key of ours.
        """
        text = signer.unseal(Purpose.TASK, "", data)
        first, separator, second = text.partition(b"\n")
        try:
            header, payload = parse_object(first, _MAX_HEADER_BYTES), second.decode()
        except ValueError:
            raise MalformedTaskError("its first line is no header in JSON") from None
        if not separator:
            raise MalformedTaskError("it has no payload")
        return cls.from_header(header, payload)

    @classmethod
    def from_header(cls, header: Any, payload: Any) -> Envelope:
        """The envelope from a decoded header and the text of a payload.

        Raises:
            MalformedTaskError: a field is missing, of the wrong type or out of its range.
        """
        if not isinstance(header, dict) or not isinstance(payload, str):
            raise MalformedTaskError("its header is no mapping, or its payload no text")
        try:
            # first, as a header of another version may have other fields
            if (protocol := _number(header, "protocol", int, 0, 2**31)) != PROTOCOL:
                raise ValueError(f"it is of protocol {protocol}, and this queue is of {PROTOCOL}")
            name = TaskName(_text(header, "name"))
            is_step = name is TaskName.EXECUTE_PLAN
            return cls(
                task_id=str(uuid.UUID(_text(header, "task_id"))),
                name=name,
                run_id=_text(header, "run_id"),
                step_key=_text(header, "step_key") if is_step else None,
                attempt=_number(header, "attempt", int, 1 if is_step else 0, 2**31),
                queue=_text(header, "queue"),
                priority=_number(header, "priority", int, MIN_PRIORITY, MAX_PRIORITY),
                lease_seconds=_seconds(header, "lease_seconds", MIN_LEASE_SECONDS),
                cancel_grace_seconds=_seconds(header, "cancel_grace_seconds", 0),
                epoch=_text(header, "epoch"),
                payload=payload,
                limits=_limits(header["limits"]),
                code_location=_text(header, "code_location", may_be_empty=True),
                **_origin(header),
                job=plain_name(_text(header, "job", may_be_empty=True)) if "job" in header else "",
                trace=_trace(header),
                protocol=protocol,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise MalformedTaskError(f"its header is not that of a task: {error}") from None


def asdict_shallow(envelope: Envelope) -> dict[str, Any]:
    """The fields by name, without the deep copy of the payload that ``asdict`` makes."""
    return {name: getattr(envelope, name) for name in Envelope.__dataclass_fields__}


def step_task_id(run_id: str, step_key: str, attempt: int) -> str:
    """The id of one attempt of a step: the same for whoever computes it, different for any other.

    Args:
        attempt: from 1.
    """
    return str(uuid.uuid5(_TASK_ID_NAMESPACE, f"step\0{run_id}\0{step_key}\0{attempt}"))


def run_task_id(run_id: str, resume_number: int) -> str:
    """The id of a run's execution; ``resume_number`` is 0 for the first."""
    return str(uuid.uuid5(_TASK_ID_NAMESPACE, f"run\0{run_id}\0{resume_number}"))


def _text(header: Mapping[str, Any], key: str, *, may_be_empty: bool = False) -> str:
    value = header[key]
    if not isinstance(value, str) or not (value or may_be_empty):
        raise TypeError(f"{key} must be a text that is not empty")
    value.encode()  # a lone surrogate is valid JSON and no text that a server takes
    return value


def _seconds(header: Mapping[str, Any], key: str, low: float) -> float:
    seconds: float = _number(header, key, float, low, LONGEST_SECONDS)
    return seconds


def _limits(values: Any) -> TimeLimits:
    if not isinstance(values, dict) or set(values) != {"soft_seconds", "hard_seconds"}:
        raise TypeError("limits must be a mapping of soft_seconds and hard_seconds")
    return TimeLimits(
        **{
            name: _number(values, name, float, 0, LONGEST_TIME_LIMIT_SECONDS)
            for name, value in values.items()
            if value is not None
        }
    )


def _origin(header: Mapping[str, Any]) -> dict[str, Any]:
    """What a header may say of where its task comes from."""
    found: dict[str, Any] = {}
    if header.get("state") is not None:
        found["state"] = _text(header, "state", may_be_empty=True)
        found["backend"] = plain_name(_text(header, "backend", may_be_empty=True))
        found["sent_at"] = _number(header, "sent_at", float, 0, 2**53)
    return found


def _trace(header: Mapping[str, Any]) -> TraceContext:
    """The trace context of a header; nothing where it is none, which is no flaw of the task."""
    found = header.get("trace")
    if not isinstance(found, dict):
        return {}
    return {
        name: value
        for name in ("traceparent", "tracestate")
        if isinstance(value := found.get(name), str) and _IS_OF_TRACE.fullmatch(value)
    }


def _number(header: Mapping[str, Any], key: str, kind: type, low: float, high: float) -> Any:
    value: Any = header[key]
    is_number = isinstance(value, int if kind is int else (int, float))
    if isinstance(value, bool) or not is_number:
        raise TypeError(f"{key} must be a number")
    if not low <= value <= high:  # nor is NaN
        raise ValueError(f"{key} must lie between {low} and {high}")
    return kind(value)
