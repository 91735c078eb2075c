"""The parts of the read model: servers, queues, runs, tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from dagster_taskiq.backend import TaskState
from dagster_taskiq.messages.attempt_ends import AttemptEnd
from dagster_taskiq.messages.queue_names import QueueKind
from dagster_taskiq.messages.queue_pauses import QueuePause
from dagster_taskiq.messages.queue_waits import QueueWait, WaitKind
from dagster_taskiq.messages.results import Place
from dagster_taskiq.messages.withheld_steps import Withheld
from dagster_taskiq.messages.worker_records import WorkerRecord


class TaskStatus(str, Enum):
    """What a task that is not over does, in people's words."""

    WAITING = "waiting"
    RUNNING = "running"
    #: Its worker has not been heard of; its run will judge.
    LOST = "lost"
    #: A worker has given it back or dropped its message; its run will send it again.
    RETURNED = "returned"


_STATUSES: Mapping[TaskState, TaskStatus] = {
    TaskState.UNKNOWN: TaskStatus.WAITING,
    TaskState.CLAIMED: TaskStatus.RUNNING,
    TaskState.EXPIRED: TaskStatus.LOST,
    TaskState.DROPPED: TaskStatus.RETURNED,
    TaskState.REFUSED: TaskStatus.RETURNED,
}


@dataclass(frozen=True)
class TaskView:
    """A task that waits in a queue, is executed, or waits for a judgement.

    Attributes:
        state: UNKNOWN for one that waits; see ``TaskState``.
        step_key: empty for a whole run; None where only its id is known.
        attempt: see ``Envelope``; None as before.
        queue: as people name it; None as before.
        priority: of one that waits.
        position: in its queue, from 1, of one that waits.
        sent_at: of one that waits, by the clock of its sender; seconds since the epoch, None where
            that did not say.
        place: where it is executed.
        claimed_at: by the clock of its worker; seconds since the epoch.
        reason: why it is not executed, in sentences, beside the tasks before it; empty for none.
        job: name of its run's job; empty where nobody has told.
    """

    task_id: str
    run_id: str
    state: TaskState
    step_key: str | None = None
    attempt: int | None = None
    queue: str | None = None
    priority: int | None = None
    position: int | None = None
    sent_at: float | None = None
    place: Place | None = None
    claimed_at: float | None = None
    reason: str = ""
    job: str = ""

    @property
    def status(self) -> TaskStatus:
        """What it does."""
        return _STATUSES[self.state]

    @property
    def kind(self) -> QueueKind | None:
        """A step or a whole run; None where only its id is known."""
        if self.step_key is None:
            return None
        return QueueKind.STEPS if self.step_key else QueueKind.RUNS

    @property
    def since(self) -> float | None:
        """Since when it waits or is executed, in seconds since the epoch."""
        return self.sent_at if self.status is TaskStatus.WAITING else self.claimed_at


@dataclass(frozen=True)
class QueueView:
    """The part of a queue for tasks of one kind.

    Attributes:
        name: as people name it.
        depth: how many tasks wait.
        priorities: how many of each priority, the highest first; None where the server cannot tell.
        oldest_sent_at: when the one was sent that has waited longest, by its sender's clock, in
            seconds since the epoch; None where nothing waits or nobody can tell.
        waiting: the next of them, as many as were asked for; None where the server cannot tell.
            What is no task of ours, or is not signed as it must be, is left out.
        running: how many tasks of it are known to be executed.
        workers: names of those that listen on it.
        pause: who holds it up for all workers; None for nobody.
        wait: why a task would wait there, beside the tasks before it; None for no reason.
        blindness: why the server cannot tell, a sentence; empty where it can.
    """

    name: str
    kind: QueueKind
    depth: int
    priorities: Mapping[int, int] | None
    oldest_sent_at: float | None
    waiting: Sequence[TaskView] | None
    running: int
    workers: Sequence[str]
    wait: QueueWait | None
    pause: QueuePause | None = None
    blindness: str = ""

    @property
    def unseen(self) -> int:
        """How many tasks wait that are not among ``waiting``."""
        return max(0, self.depth - len(self.waiting or ()))

    @property
    def is_stuck(self) -> bool:
        """Whether tasks wait that no worker will take as things are, and nobody has wanted that."""
        is_meant = self.wait is not None and self.wait.kind in (WaitKind.BUSY, WaitKind.PAUSED)
        return self.depth > 0 and self.wait is not None and not is_meant


@dataclass(frozen=True)
class RunView:
    """A run that is not over.

    Attributes:
        has_loop: whether an execution loop of it lives.
        is_resumable: whether it may get another one.
        tasks: those that are executed or wait for a judgement, by step.
        withheld: the steps that its living loop holds back, as it has told some seconds ago;
            ``Overview.withheld_of`` leaves out those that were sent since then.
    """

    run_id: str
    has_loop: bool
    is_resumable: bool
    tasks: Sequence[TaskView]
    withheld: Withheld = Withheld()


@dataclass(frozen=True)
class ServerView:
    """A server as it answers.

    Attributes:
        roles: "broker", "backend", or both.
        product: its name and version, as it says them; None where it does not answer.
        address: without a password.
        seconds: that its answer took; None as before.
        problem: why it does not answer, in a sentence; empty where it does.
    """

    roles: tuple[str, ...]
    product: str | None
    address: str
    seconds: float | None
    problem: str = ""


@dataclass(frozen=True)
class Overview:
    """All of it; a server's parts are of one moment after the other.

    Attributes:
        workers: that live.
        lost_workers: that do not, and have not signed off.
        ended: the attempts that ended last, the newest first, as many of each group as were asked
            for.
    """

    servers: Sequence[ServerView] = ()
    workers: Sequence[WorkerRecord] = ()
    queues: Sequence[QueueView] = ()
    runs: Sequence[RunView] = ()
    ended: Sequence[AttemptEnd] = ()
    lost_workers: Sequence[WorkerRecord] = ()

    def tasks(self) -> Iterator[TaskView]:
        """The tasks that are executed or wait for a judgement, by run; then those that wait."""
        for run in self.runs:
            yield from run.tasks
        for queue in self.queues:
            yield from queue.waiting or ()

    def withheld_of(self, run_id: str) -> Withheld:
        """The steps that a run holds back, by all that is seen here."""
        told = next((run.withheld for run in self.runs if run.run_id == run_id), Withheld())
        if not told.groups:
            return told
        return told.without({task.step_key or "" for task in self.tasks() if task.run_id == run_id})

    def tasks_of_worker(self, record: WorkerRecord) -> list[TaskView]:
        """What a worker executes, the longest first."""
        found = [
            task
            for run in self.runs
            for task in run.tasks
            if task.place is not None and task.place.worker_id == record.worker_id
        ]
        return sorted(found, key=lambda task: task.claimed_at or float("inf"))
