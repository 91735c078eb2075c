"""The life of a task in the backend, and of a run's record, as pure functions.

    (nothing) --claim--> claimed --complete--> done          the result is stored with the claim
        |                   |                                 held, checked and written at once
        |                   '--lease ends--> (expired) --condemn--> lost
        |                                        '------reopen----> (nothing)
        |                   |--complete refused--> refused --reopen, cancel--> ...
        |--cancel--> cancelled
        '--a claim of another epoch or without a loop--> dropped --claim, reopen, cancel, ...

``done``, ``lost`` and ``cancelled`` are tombstones: a second delivery finds them and is dropped.

A launched run is claimed ``until_begun``: no loop judges it, so while it has not begun, a claim on
it that has ended counts as none.

Each function takes the state, the moment and what is asked, and returns the new state and the
answer. Where nothing changes the same state object comes back. A server must do the same in one
atomic step: ``memory`` calls these functions, ``redis_scripts`` says the same in Lua and
``postgresql_functions.sql`` in PL/pgSQL, and ``contract/test_backend_lockstep.py`` compares them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from dagster_taskiq.backend.base import Claim, ClaimAnswer, Renewal, TaskReport, TaskState
from dagster_taskiq.defaults import CLOSED_RECORD_EXPIRES_SECONDS, RUN_RECORD_EXPIRES_SECONDS
from dagster_taskiq.messages.results import Place


@dataclass(frozen=True)
class Moment:
    """When something happens, by the server's clock, and in which life of the server."""

    seconds: float
    epoch: str


class Mark(str, Enum):
    """What the record of a run says of a task."""

    CLAIMED = "claimed"
    DONE = "done"
    REFUSED = "refused"
    CANCELLED = "cancelled"
    LOST = "lost"
    DROPPED = "dropped"


@dataclass(frozen=True)
class Hold:
    """A claim that was granted; ``ends_at`` is by the server's clock."""

    token: str
    place: Place
    ends_at: float


@dataclass(frozen=True)
class StoredResult:
    """What a worker has stored; ``ends_at`` is by the server's clock."""

    data: bytes
    ends_at: float


@dataclass(frozen=True)
class TaskLife:
    """All that the backend keeps of a task.

    Attributes:
        mark: what the record of its run says; None if nothing.
        ended_by: token of the claim that has ended it as done or refused.
        dropped_in: epoch of the message that was dropped, if that was the server's own then;
            empty for a message of an older epoch, which somebody may have claimed before.
        order: to cancel it, which its worker was given.
        has_begun: whether a launched run has.
        hold: the claim that holds it.
    """

    mark: Mark | None = None
    ended_by: str = ""
    dropped_in: str = ""
    order: str | None = None
    has_begun: bool = False
    hold: Hold | None = None
    result: StoredResult | None = None

    def at(self, moment: Moment) -> TaskLife:
        """The same without what has expired."""
        life = self
        if life.hold and life.hold.ends_at <= moment.seconds:
            life = life.without_hold()
        if life.result and life.result.ends_at <= moment.seconds:
            life = life.without_result()
        return life

    def without_hold(self) -> TaskLife:
        """The same when the lease of the claim has ended."""
        return replace(self, hold=None)

    def without_result(self) -> TaskLife:
        """The same when the result has been deleted or has expired."""
        return replace(self, result=None)

    def without_record(self) -> TaskLife:
        """What is left when the record of its run is gone."""
        return TaskLife(hold=self.hold, result=self.result)

    def is_held_by(self, claim: Claim) -> bool:
        """Whether that claim holds it."""
        return self.hold is not None and self.hold.token == claim.token

    @property
    def is_open(self) -> bool:
        """Whether nobody has ended or judged it."""
        return self.mark in (None, Mark.CLAIMED, Mark.DROPPED)

    @property
    def known_mark(self) -> Mark | None:
        """What the record says, or that it is done where the record has lost it."""
        is_lost = self.result is not None and self.is_open and self.hold is None
        return Mark.DONE if is_lost else self.mark


@dataclass(frozen=True)
class RunLoop:
    """The lease of a run's execution loop; ``ends_at`` is by the server's clock."""

    token: str
    ends_at: float


@dataclass(frozen=True)
class RunLife:
    """The record of a run, beside its tasks, and the lease of its loop.

    Attributes:
        generation: of the newest loop; -1 before the first.
        is_resumable: whether another loop may follow; None where nobody has said.
        is_closed: whether its loop has come to its end.
        ends_at: when the record expires, by the server's clock; None where there is none.
        withheld: what a loop has told that it holds back, with the token of that loop.
    """

    generation: int = -1
    is_resumable: bool | None = None
    is_closed: bool = False
    ends_at: float | None = None
    loop: RunLoop | None = None
    withheld: tuple[str, bytes] = ("", b"")

    @property
    def withheld_now(self) -> bytes:
        """What its living loop has told that it holds back; empty for nothing."""
        token, data = self.withheld
        return data if self.loop is not None and self.loop.token == token else b""

    def at(self, moment: Moment) -> RunLife:
        """The same without what has expired."""
        run = self
        if run.loop and run.loop.ends_at <= moment.seconds:
            run = run.without_loop()
        if run.ends_at is not None and run.ends_at <= moment.seconds:
            run = RunLife(loop=run.loop)
        return run

    def without_loop(self) -> RunLife:
        """The same when the lease of the loop has ended."""
        return replace(self, loop=None)

    def kept(self, moment: Moment) -> RunLife:
        """The record after a change: it lives longer, and less long when the run is over."""
        seconds = CLOSED_RECORD_EXPIRES_SECONDS if self.is_closed else RUN_RECORD_EXPIRES_SECONDS
        return replace(self, ends_at=moment.seconds + seconds)

    def is_lower(self, generation: int, token: str) -> bool:
        """Whether a loop comes after another one that it must leave the run to."""
        is_other = self.loop is not None and self.loop.token != token
        return generation < self.generation or (generation == self.generation and is_other)


# --- the run's loop ---


def open_run(
    run: RunLife,
    moment: Moment,
    *,
    generation: int,
    token: str,
    is_resumable: bool,
    lease_seconds: float,
) -> tuple[RunLife, bool]:
    """See ``RunBackend.open_run``; False when the loop is refused."""
    if run.is_lower(generation, token):
        return run, False
    loop = RunLoop(token, moment.seconds + lease_seconds)
    opened = RunLife(generation, is_resumable, loop=loop, withheld=run.withheld)
    return opened.kept(moment), True


def renew_run(
    run: RunLife,
    moment: Moment,
    *,
    generation: int,
    token: str,
    is_resumable: bool,
    lease_seconds: float,
) -> tuple[RunLife, bool]:
    """See ``RunBackend.renew_run``; False when the loop is refused.

    A record that the server has forgotten is written again. What ``disown_run`` has said stays, and
    so does the end that this loop itself has come to: renewals may overtake each other.
    """
    is_over = run.is_closed and generation == run.generation
    if is_over or run.is_lower(generation, token):
        return run, False
    may_follow = is_resumable if run.is_resumable is None else run.is_resumable
    loop = RunLoop(token, moment.seconds + lease_seconds)
    renewed = RunLife(generation, may_follow, loop=loop, withheld=run.withheld)
    return renewed.kept(moment), True


def close_run(run: RunLife, moment: Moment, *, token: str) -> tuple[RunLife, bool]:
    """See ``RunBackend.close_run``; False when another loop has taken over or the lease is over."""
    if run.loop is None or run.loop.token != token:
        return run, False
    closed = replace(run, is_resumable=False, is_closed=True, loop=None, withheld=("", b""))
    return closed.kept(moment), True


def disown_run(run: RunLife, moment: Moment) -> RunLife:
    """See ``RunBackend.disown_run``."""
    return replace(run, is_resumable=False).kept(moment)


def tell_withheld(run: RunLife, data: bytes, *, token: str) -> tuple[RunLife, bool]:
    """See ``WithheldBackend.tell_withheld``; empty for nothing."""
    if run.loop is None or run.loop.token != token:
        return run, False
    return replace(run, withheld=(token, data)), True


# --- a task, as its workers see it ---


def claim_task(
    life: TaskLife,
    run: RunLife,
    moment: Moment,
    claim: Claim,
    *,
    needs_live_run: bool,
    until_begun: bool,
) -> tuple[TaskLife, ClaimAnswer]:
    """See ``ClaimBackend.claim``."""
    is_waiting = until_begun and not life.has_begun
    if life.is_held_by(claim):
        return _held(life, moment, claim), ClaimAnswer.GRANTED
    if life.hold:
        return life, ClaimAnswer.PENDING if is_waiting else ClaimAnswer.CLAIMED
    ended = life.known_mark
    is_free = ended in (None, Mark.DROPPED) or (is_waiting and ended is Mark.CLAIMED)
    if ended and not is_free:
        return life, ClaimAnswer(ended.value)
    if needs_live_run:
        # a loop that lives after all must not wait for what is in no queue any more
        if claim.epoch != moment.epoch:
            return replace(life, mark=Mark.DROPPED, dropped_in=""), ClaimAnswer.STALE
        if run.loop is None:
            dropped = replace(life, mark=Mark.DROPPED, dropped_in=moment.epoch)
            return dropped, ClaimAnswer.RUN_GONE
    return _held(life, moment, claim), ClaimAnswer.GRANTED


def _held(life: TaskLife, moment: Moment, claim: Claim) -> TaskLife:
    hold = Hold(claim.token, claim.place, moment.seconds + claim.lease_seconds)
    return replace(life, mark=Mark.CLAIMED, hold=hold)


def begin_task(life: TaskLife, claim: Claim) -> TaskLife:
    """See ``ClaimBackend.begin``."""
    return replace(life, has_begun=True) if life.is_held_by(claim) else life


def release_task(life: TaskLife, claim: Claim) -> TaskLife:
    """See ``ClaimBackend.release``."""
    return life.without_hold() if life.is_held_by(claim) else life


def renew_claim(
    life: TaskLife, run: RunLife, moment: Moment, claim: Claim
) -> tuple[TaskLife, Renewal]:
    """See ``ClaimBackend.renew``: a claim that the server may have forgotten is asserted again."""
    is_held = life.is_held_by(claim) or _is_forgotten(life, moment, claim)
    life = _held(life, moment, claim) if is_held else life
    return life, Renewal(
        is_held=is_held,
        cancel_order=life.order,
        is_run_alive=run.loop is not None,
        is_resumable=bool(run.is_resumable),
        epoch=moment.epoch,
    )


def complete_task(
    life: TaskLife,
    moment: Moment,
    claim: Claim,
    result: bytes,
    *,
    expires_seconds: float,
    is_refused: bool,
) -> tuple[TaskLife, bool]:
    """See ``ClaimBackend.complete``."""
    mark = Mark.REFUSED if is_refused else Mark.DONE
    if life.mark is mark and life.ended_by == claim.token:
        return life, True
    if not life.is_held_by(claim) and not _is_forgotten(life, moment, claim):
        return life, False
    stored = StoredResult(result, moment.seconds + expires_seconds)
    return TaskLife(mark, claim.token, has_begun=life.has_begun, result=stored), True


def _is_forgotten(life: TaskLife, moment: Moment, claim: Claim) -> bool:
    """Whether the server, in a new life, may have forgotten the claim, and nobody has judged it."""
    return life.hold is None and claim.epoch != moment.epoch and life.is_open


# --- a task, as its loop sees it ---


def report_task(life: TaskLife, moment: Moment) -> TaskReport:
    """See ``RunBackend.inspect``."""
    if life.hold:
        left_seconds = life.hold.ends_at - moment.seconds
        return TaskReport(TaskState.CLAIMED, life.hold.place, left_seconds)
    mark = life.known_mark
    is_old_drop = mark is Mark.DROPPED and life.dropped_in != moment.epoch
    if mark is Mark.CLAIMED or is_old_drop:
        return TaskReport(TaskState.EXPIRED)
    return TaskReport(TaskState(mark.value) if mark else TaskState.UNKNOWN)


def cancel_task(life: TaskLife, order: str) -> tuple[TaskLife, TaskState]:
    """See ``RunBackend.cancel``; where the answer is CLAIMED, the holder must be told."""
    mark = life.known_mark
    if mark is Mark.DONE:
        return life, TaskState.DONE
    if life.hold:
        return replace(life, order=order), TaskState.CLAIMED
    if mark is Mark.CLAIMED:
        # it may have started, so the loop judges it; a worker that lives hears of the order
        return replace(life, order=order), TaskState.EXPIRED
    if mark is Mark.LOST:
        return life, TaskState.LOST
    return replace(life, mark=Mark.CANCELLED), TaskState.CANCELLED


def condemn_task(life: TaskLife) -> tuple[TaskLife, bool]:
    """See ``RunBackend.condemn``."""
    if life.hold or life.result or life.mark is Mark.DONE:
        return life, False
    return replace(life, mark=Mark.LOST), True


def reopen_task(life: TaskLife) -> tuple[TaskLife, bool]:
    """See ``RunBackend.reopen``."""
    if life.mark is Mark.REFUSED:
        life = life.without_result()
    elif not life.is_open:
        return life, False
    if life.hold or life.result or life.order is not None:
        return life, False
    return TaskLife(), True
