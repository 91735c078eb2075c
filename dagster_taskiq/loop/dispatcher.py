"""The execution loop's questions and orders to the part that carries its steps to workers.

``Client`` carries them through a broker, ``EagerDispatcher`` runs them in the calling process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dagster_taskiq.aio.tracing import TraceContext
from dagster_taskiq.backend.base import TaskReport, TaskState
from dagster_taskiq.messages.attempt_ends import AttemptEnd
from dagster_taskiq.messages.queue_looks import QueueLook
from dagster_taskiq.messages.queue_waits import Listeners, QueueWait
from dagster_taskiq.messages.results import TaskResult
from dagster_taskiq.messages.time_limits import TimeLimits
from dagster_taskiq.messages.withheld_steps import Withheld


@dataclass(frozen=True)
class StepTask:
    """One attempt of a step, ready to be sent.

    Attributes:
        task_id: see ``envelope.step_task_id``.
        attempt: from 1.
        queue: as people name it.
        priority: 0..10, higher first.
        make_payload: makes Dagster's packed arguments, which are large and seldom needed twice.
        limits: how long the attempt may take.
        job: name of the run's job.
        trace: the context of the attempt's span; empty without tracing.
    """

    task_id: str
    step_key: str
    attempt: int
    queue: str
    priority: int
    make_payload: Callable[[], Mapping[str, Any]]
    limits: TimeLimits = TimeLimits()
    job: str = ""
    trace: TraceContext = field(default_factory=dict)


@dataclass(frozen=True)
class Inspection:
    """The state of tasks in flight, as broker and backend know it.

    Attributes:
        is_conclusive: whether a missing claim proves that nobody works on the task: the backend
            has been reachable and in the same epoch for a full lease.
        reports: by task id.
        trouble: what has last kept the backend from being reachable, or from remembering; a
            sentence, or empty.
        troubled_at: when that was last noticed, in monotonic seconds.
        absent: ids of unclaimed tasks that the broker does not hold either.
        waits: by queue of unclaimed tasks, why they wait, where there is a reason.
        listeners: by queue of unclaimed tasks, who takes tasks from it.
    """

    is_conclusive: bool
    reports: Mapping[str, TaskReport]
    trouble: str = ""
    troubled_at: float = float("-inf")
    absent: frozenset[str] = frozenset()
    waits: Mapping[str, QueueWait] = field(default_factory=dict)
    listeners: Mapping[str, Listeners] = field(default_factory=dict)


class Dispatcher(ABC):
    """Carries the steps of one run; used from one thread.

    Errors: ``ServerError`` from every method but ``wait``, ``note_...`` and ``close``, after which
    the call may be repeated; ``Patience`` knows for how long that is of use.
    """

    @abstractmethod
    def open(self) -> None:
        """Reach the servers; the loop sends nothing before it has succeeded.

        Raises:
            SupersededLoopError: another loop of the run is alive, or a later one was.
        """

    @abstractmethod
    def submit(self, tasks: Sequence[StepTask]) -> None:
        """Send tasks, in this order; sending one twice does no harm.

        What the loop has reported so far is in Dagster's log before any of them is sent.
        """

    @abstractmethod
    def wait(self, timeout_seconds: float) -> list[tuple[str, TaskResult]]:
        """The results that arrived, with their task ids.

        Returns as soon as there is one, when a signal arrives, or after the timeout.

        Raises:
            SupersededLoopError: another loop of the run has taken over.
        """

    @abstractmethod
    def acknowledge(self, task_ids: Collection[str]) -> None:
        """The results of these tasks have been acted on, they need not be kept."""

    @abstractmethod
    def inspect(self, tasks: Sequence[StepTask]) -> Inspection:
        """Compare what is awaited with what broker and backend know."""

    @abstractmethod
    def look_into(self, queue: str, tasks: Sequence[StepTask]) -> QueueLook:
        """What is to be seen of a queue for people.

        Args:
            tasks: a few that wait there, whose places are of interest.
        """

    @abstractmethod
    def fetch(self, task_ids: Sequence[str]) -> list[tuple[str, TaskResult]]:
        """Results whose arrival was not noticed."""

    @abstractmethod
    def cancel(self, tasks: Sequence[StepTask], reason: str) -> Mapping[str, TaskState]:
        """Stop tasks; see ``RunBackend.cancel``.

        Returns:
            the same. EXPIRED also stands for CANCELLED while a worker may still hold a claim that
            the server has forgotten.
        """

    @abstractmethod
    def condemn(self, task_id: str) -> bool:
        """See ``RunBackend.condemn``."""

    @abstractmethod
    def reopen(self, task_id: str) -> bool:
        """See ``RunBackend.reopen``."""

    @abstractmethod
    def note_end(self, end: AttemptEnd) -> None:
        """Tell the history of an attempt that has ended, sooner or later, or never.

        It returns at once, and raises nothing.
        """

    @abstractmethod
    def note_withheld(self, withheld: Withheld) -> None:
        """Tell people what the run holds back now, sooner or later, or never.

        It returns at once, and raises nothing.
        """

    @abstractmethod
    def close(self, *, leave_running: bool = False) -> None:
        """The loop is over.

        Args:
            leave_running: the run will be resumed by another loop, so its steps go on.
        """
