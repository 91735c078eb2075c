"""What a worker and its children tell each other, as types.

A worker gives its child one order at a time. The child answers each with one answer, and may say
more before it. How the messages travel is the affair of ``channel``, ``slot`` and ``frames``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dagster_taskiq.errors import MalformedResultError
from dagster_taskiq.execution.arrivals import Arrival
from dagster_taskiq.messages.envelope import TaskName
from dagster_taskiq.messages.results import Place

# --- orders: from the worker to its child ---


@dataclass(frozen=True)
class Execute:
    """Execute a task.

    Attributes:
        name: what to do.
        payload: as it travels, a JSON object as text that the worker has not parsed.
        place: where it is executed, for people.
        arrival: how it has come here, for people.
        code_location: see ``code_locations``; empty for any.
        soft_timeout_seconds: after which the worker will warn the child; None is never.
        run_id: of the task's run.
        takes_own_code: whether the child was started for this order, so that what it has loaded
            itself is new enough, also where loading it has changed a file that it reads.
    """

    name: TaskName
    payload: str
    place: Place
    arrival: Arrival
    code_location: str = ""
    soft_timeout_seconds: float | None = None
    run_id: str = ""
    takes_own_code: bool = False


@dataclass(frozen=True)
class LookAtRun:
    """Ask Dagster whether the run of a step is over.

    Attributes:
        payload: of the step's task, as it travels.
    """

    payload: str


@dataclass(frozen=True)
class FailRun:
    """Have Dagster fail a run that could not be started.

    Attributes:
        payload: of the run's task, as it travels.
        reason: why it could not start.
    """

    payload: str
    reason: str


@dataclass(frozen=True)
class FindCode:
    """Ask Dagster where the code of runs is.

    Attributes:
        run_ids: of its own instance.
    """

    run_ids: Sequence[str]


#: What a worker asks and tells Dagster about runs, through a child.
RunOrder = LookAtRun | FailRun | FindCode

Order = Execute | RunOrder

# --- words: from the child to its worker ---


@dataclass(frozen=True)
class Ready:
    """The child waits for its first order."""


@dataclass(frozen=True)
class NotReady:
    """The process cannot do what it was started for, and ends.

    Attributes:
        is_final: of a template: whether it would be the same the next time.
    """

    reason: str
    is_final: bool = False


@dataclass(frozen=True)
class TemplateLoads:
    """A template begins to load its code.

    Attributes:
        title: of it, for people.
    """

    title: str


@dataclass(frozen=True)
class TemplateReady:
    """A template has loaded its code, and forks children."""


@dataclass(frozen=True)
class CodeIsOld:
    """The child has an order, and does not execute it with the code that it has.

    Attributes:
        reason, is_own, is_by_age: see ``OldCode``.
    """

    reason: str
    is_own: bool
    is_by_age: bool = False


@dataclass(frozen=True)
class OrderTaken:
    """The child has an order, and has executed nothing of it yet."""


@dataclass(frozen=True)
class LogOpened:
    """The output of a step goes to a file.

    Attributes:
        path: of the file.
        target: the descriptor that the output went to before, 1 or 2.
    """

    path: str
    target: int


@dataclass(frozen=True)
class LogClosed:
    """No more output goes to the file."""

    path: str


@dataclass(frozen=True)
class RunStartLogged:
    """Dagster's log has the start of the run."""


@dataclass(frozen=True)
class Executed:
    """The answer to ``Execute``.

    Attributes:
        result: a ``TaskResult`` as text.
        left_behind: what keeps the child from taking another task, in words; empty if nothing.
        own_kib: memory of the child alone; 0 where its worker need not know.
        step_end: see ``TaskRunner``; empty for a run.
    """

    result: str
    left_behind: str
    own_kib: int
    step_end: str = ""


@dataclass(frozen=True)
class RunAnswer:
    """The answer to a ``RunOrder``.

    Attributes:
        is_over: whether the run is finished or deleted, for ``LookAtRun``.
        payloads: by code location, see ``payloads_of``, for ``FindCode``.
        error: why Dagster could not be asked or told; empty if it could.
    """

    is_over: bool = False
    payloads: Mapping[str, str] = field(default_factory=dict)
    error: str = ""


Answer = Executed | RunAnswer
Word = (
    Ready
    | NotReady
    | TemplateLoads
    | TemplateReady
    | CodeIsOld
    | OrderTaken
    | LogOpened
    | LogClosed
    | RunStartLogged
    | Answer
)

_ORDERS: Mapping[str, type[Any]] = {
    it.__name__: it for it in (Execute, LookAtRun, FailRun, FindCode)
}
_WORDS: Mapping[str, type[Any]] = {
    it.__name__: it
    for it in (
        Ready,
        NotReady,
        TemplateLoads,
        TemplateReady,
        CodeIsOld,
        OrderTaken,
        LogOpened,
        LogClosed,
        RunStartLogged,
        Executed,
        RunAnswer,
    )
}


def pack(message: Order | Word) -> dict[str, Any]:
    """The message for JSON: its kind and its fields."""
    values = {"kind": type(message).__name__, **vars(message)}
    if isinstance(message, Execute):
        values |= {"place": vars(message.place), "arrival": vars(message.arrival)}
    return values


def unpack_order(values: Mapping[str, Any]) -> Order:
    """The order of a packed message.

    Raises:
        ValueError: it is none.
    """
    order: Order = _unpacked(_ORDERS, values)
    return order


def unpack_word(values: Mapping[str, Any]) -> Word:
    """The word of a packed message.

    Raises:
        ValueError: it is none.
    """
    word: Word = _unpacked(_WORDS, values)
    return word


def _unpacked(kinds: Mapping[str, type[Any]], values: Mapping[str, Any]) -> Any:
    fields = dict(values)
    kind = kinds.get(str(fields.pop("kind", None)))
    if kind is None:
        raise ValueError(f"{values.get('kind')!r} is no kind of message")
    try:
        if kind is Execute:
            fields["name"] = TaskName(fields["name"])
            fields["place"] = Place.from_dict(fields["place"])
            fields["arrival"] = Arrival(**fields["arrival"])
        return kind(**fields)
    except (TypeError, KeyError, MalformedResultError) as error:
        raise ValueError(f"it is no {kind.__name__}: {error}") from None
