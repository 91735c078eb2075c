"""What a backend must do, in six roles: for the execution loop, for workers, for people, and three
of modules of their own: to hold queues up (``pauses``), to keep a history (``history``), and to say
what runs hold back (``withheld``).

The backend is the one place that decides who may run a task. ``life`` draws a task's life in it and
says what each operation does to it, as pure functions; ``memory`` is the whole contract on top of
them, in one process. Tombstones live in the record of the run. Every operation is atomic and may be
repeated after an answer that was lost.

The epoch is the identity of the server's present life. It changes when the server restarted, was
flushed or failed over, and then nothing that is missing proves anything: a step's task that was
sent in an older epoch cannot be claimed, live workers re-assert their claims, and the loop waits
one lease before it judges.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from dagster_taskiq.backend.history import HistoryBackend
from dagster_taskiq.backend.pauses import PauseBackend
from dagster_taskiq.backend.withheld import WithheldBackend
from dagster_taskiq.errors import SupersededLoopError
from dagster_taskiq.messages.results import Place
from dagster_taskiq.messages.withheld_steps import Withheld
from dagster_taskiq.messages.worker_records import RunningTask, WorkerRecord

#: How long an order waits for its worker: one that has not taken it by then is gone.
CONTROL_EXPIRES_SECONDS = 600


class ClaimAnswer(str, Enum):
    """What came of an attempt to claim a task."""

    #: The task is ours until the lease ends.
    GRANTED = "granted"
    #: Another worker holds it, or held it until its lease ended: the loop will judge.
    CLAIMED = "claimed"
    #: Held, but not begun: another worker may claim it if the holder dies.
    PENDING = "pending"
    DONE = "done"
    CANCELLED = "cancelled"
    LOST = "lost"
    #: A worker has refused it: the loop will send it again.
    REFUSED = "refused"
    #: It was sent in an older life of the backend: the loop will send it again if need be.
    STALE = "stale"
    #: No execution loop of its run is alive.
    RUN_GONE = "run-gone"


class TaskState(str, Enum):
    """What the backend knows of a task."""

    UNKNOWN = "unknown"
    CLAIMED = "claimed"
    #: Claimed, but the lease ended without a result; or a worker dropped its message, which was of
    #: an older epoch, so that somebody may hold a claim that the server has forgotten.
    EXPIRED = "expired"
    #: A worker dropped its message while the run had no living loop; nobody has ever claimed it.
    DROPPED = "dropped"
    #: A worker that could not execute it has given it back; its result says why.
    REFUSED = "refused"
    DONE = "done"
    CANCELLED = "cancelled"
    LOST = "lost"


@dataclass(frozen=True)
class Claim:
    """A worker's exclusive right to execute one task.

    Attributes:
        token: distinguishes this claim from every other one on the task.
        lease_seconds: how long it holds without renewal.
        epoch: of the backend when the task was sent; a step's claim is granted only in that one.
    """

    run_id: str
    task_id: str
    token: str
    lease_seconds: float
    epoch: str
    place: Place


@dataclass(frozen=True)
class Renewal:
    """The answer to one claim's renewal.

    Attributes:
        is_held: whether the claim still is ours.
        cancel_order: the order to stop the task, as ``cancel`` was given it; None if there is none.
        is_run_alive: whether an execution loop of its run is alive.
        is_resumable: whether a run whose loop died may get another one.
        epoch: of the backend, now.
    """

    is_held: bool
    cancel_order: str | None
    is_run_alive: bool
    is_resumable: bool
    epoch: str


@dataclass(frozen=True)
class TaskReport:
    """What the backend knows of one task.

    Attributes:
        place: where it runs, while it is claimed.
        lease_left_seconds: until the claim ends without renewal, by the server's clock.
    """

    state: TaskState
    place: Place | None = None
    lease_left_seconds: float = 0.0


#: States of a task that somebody executes, or that waits for a judgement.
NOT_ENDED = (TaskState.CLAIMED, TaskState.EXPIRED, TaskState.DROPPED, TaskState.REFUSED)


@dataclass(frozen=True)
class RunReport:
    """What the backend knows of a run that is not over.

    Attributes:
        has_loop: whether an execution loop of it lives.
        is_resumable: whether it may get another loop.
        tasks: by id, those in one of the states ``NOT_ENDED``.
        withheld: what its living loop has told last that it holds back, for people.
    """

    run_id: str
    has_loop: bool
    is_resumable: bool
    tasks: Mapping[str, TaskReport]
    withheld: Withheld = Withheld()


def superseded_error(run_id: str, generation: int) -> SupersededLoopError:
    """The error of ``RunBackend.open_run``; the generation is of the loop that goes on."""
    return SupersededLoopError(
        f"Run {run_id} is executed by another process (resume number {generation}): "
        "this one, started before, stops."
    )


class RunBackend(ABC):
    """The execution loop's side."""

    @abstractmethod
    async def open_run(
        self, run_id: str, *, generation: int, token: str, is_resumable: bool, lease_seconds: float
    ) -> str:
        """Make this loop the one live loop of the run.

        Args:
            generation: how often the run was resumed; a lower one than the run has seen, or an
                equal one while another loop lives, is refused.

        Returns:
            the epoch.

        Raises:
            SupersededLoopError: refused.
        """

    @abstractmethod
    async def renew_run(
        self, run_id: str, *, generation: int, token: str, is_resumable: bool, lease_seconds: float
    ) -> str | None:
        """Say that the loop lives, with all that it said when it opened the run.

        The server may have forgotten it meanwhile, and has it written again then.

        Returns:
            the epoch, or None when another loop has taken over or this one has closed the run.
        """

    @abstractmethod
    async def close_run(self, run_id: str, *, token: str) -> None:
        """The loop is over: no task of the run can be claimed any more."""

    @abstractmethod
    async def disown_run(self, run_id: str) -> None:
        """No other loop will take over: once the run's loop is dead its steps are stopped.

        It holds, whatever the present loop says of itself, until another loop opens the run.
        """

    @abstractmethod
    async def wait_for_results(self, run_id: str, timeout_seconds: float) -> dict[str, bytes]:
        """The results that arrived, by task id: as soon as there is one, or after the timeout."""

    @abstractmethod
    async def read_results(self, run_id: str, task_ids: Sequence[str]) -> dict[str, bytes]:
        """Those of the results that are stored."""

    @abstractmethod
    async def forget_results(self, run_id: str, task_ids: Sequence[str]) -> None:
        """Delete results that have been read and acted on."""

    @abstractmethod
    async def inspect(
        self, run_id: str, task_ids: Sequence[str]
    ) -> tuple[str, dict[str, TaskReport]]:
        """The epoch, and what is known of each task, in one round trip."""

    async def epoch(self) -> str:
        """The epoch."""
        epoch, _ = await self.inspect("", [])
        return epoch

    @abstractmethod
    async def cancel(
        self, run_id: str, orders: Mapping[str, str]
    ) -> tuple[str, dict[str, TaskState]]:
        """Stop tasks: unclaimed ones become cancelled, holders of claimed ones are told.

        Args:
            orders: by task id, what the holder is told, ready to be sent.

        Returns:
            the epoch, and the state of each when it was told. CANCELLED: nobody executes it and
            nobody will. CLAIMED: its worker will report. EXPIRED: its claim has ended, the loop
            judges. DONE, LOST: it was over.
        """

    @abstractmethod
    async def condemn(self, run_id: str, task_id: str) -> bool:
        """Declare a task lost; False when it is claimed, done, or has a result."""

    @abstractmethod
    async def reopen(self, run_id: str, task_id: str) -> bool:
        """Let an expired or refused task be claimed again, as if nobody ever had claimed it.

        Returns:
            False when it is claimed, done, lost or cancelled, or has an order to cancel.
        """


class ClaimBackend(ABC):
    """The worker's side."""

    @abstractmethod
    async def claim(
        self, claim: Claim, *, needs_live_run: bool, until_begun: bool = False
    ) -> ClaimAnswer:
        """Claim a task; the same claim may be repeated, which renews it.

        Args:
            needs_live_run: whether only a task whose run has a living loop is granted.
            until_begun: whether a claim whose lease has ended counts only after ``begin``. Before,
                it must be certain otherwise that its holder has done nothing.
        """

    @abstractmethod
    async def begin(self, claim: Claim) -> None:
        """A task that was claimed ``until_begun`` has begun: nobody else may claim it any more."""

    @abstractmethod
    async def release(self, claim: Claim) -> None:
        """End the lease of a claim now, if it is held; whoever holds it has stopped for good."""

    @abstractmethod
    async def renew(self, claims: Sequence[Claim]) -> list[Renewal]:
        """Extend the leases of all claims in one round trip, in their order."""

    @abstractmethod
    async def complete(
        self, claim: Claim, result: bytes, *, expires_seconds: float, is_refused: bool = False
    ) -> bool:
        """Store the result, wake the loop and end the claim, if the claim is held.

        Args:
            is_refused: the task has not begun and is for another worker: it may be reopened.

        Returns:
            False when the claim was not ours any more; nothing was stored then.
        """


class ControlBackend(ABC):
    """The list of workers, messages to them, and the list of runs."""

    @abstractmethod
    async def heartbeat(
        self,
        record: WorkerRecord,
        *,
        expires_seconds: float,
        running: Sequence[RunningTask] = (),
    ) -> None:
        """Say that the worker lives, and for ``running`` what it executes."""

    @abstractmethod
    async def goodbye(self, worker_id: str) -> None:
        """Remove the worker from the list."""

    @abstractmethod
    async def workers(self) -> list[WorkerRecord]:
        """The live workers, by name.

        Records that cannot be read are left out; what is not ``is_trusted`` is for people only.
        """

    @abstractmethod
    async def lost_workers(self) -> list[WorkerRecord]:
        """The workers that are silent since their last heartbeat expired, by name, as ``LOST``.

        Each for ``LOST_WORKER_SECONDS``, as it described itself last. They are for people only.
        """

    @abstractmethod
    async def running(self) -> list[RunningTask]:
        """What the live workers said last that they execute, which may be over by now.

        It is for people; what is not signed as it must be, or cannot be read, is left out.
        """

    @abstractmethod
    async def runs(self) -> list[RunReport]:
        """The runs that have a living loop, or a task that is ``NOT_ENDED``, by id.

        It is a listing for people, not one atomic step: of runs that change meanwhile it may show
        one moment or another.
        """

    @abstractmethod
    async def tidy(self) -> None:
        """Remove what has expired, a bounded amount of it.

        Workers call it now and then, each at times of its own.
        """

    @abstractmethod
    async def send_control(self, worker_id: str, order: str) -> None:
        """Put an order, ready to be sent, into the worker's control mailbox."""

    @abstractmethod
    async def wait_for_control(self, worker_id: str, timeout_seconds: float) -> list[bytes]:
        """The orders that arrived, whoever sent them, as soon as there is one.

        Returns:
            none after the timeout.
        """


class Backend(
    RunBackend, ClaimBackend, ControlBackend, PauseBackend, HistoryBackend, WithheldBackend
):
    """All roles, on one server.

    Errors: ``UnreachableServerError`` or ``RefusedByServerError`` with the address and without
    the password, from every method.
    """

    #: URL without its password, for messages and logs.
    address: str

    @property
    @abstractmethod
    def identity(self) -> str:
        """Which state this is: the same for all who share it, whatever becomes of its data.

        It is known once the server was reached. Empty where nothing that lasts tells one server
        from another of its kind, as on Redis, where a flush takes everything with it.
        """

    @abstractmethod
    async def product(self) -> str:
        """Name and version of the server, as it says them: ``Valkey 8.1.1``."""

    @abstractmethod
    async def startup(self) -> None:
        """Reach the server, or raise within the connect timeout."""

    @abstractmethod
    async def shutdown(self) -> None:
        """Close the connections."""
