"""The attempts that have ended: what the page keeps of them, and their table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dagster_taskiq.dashboard.memory import MEMORY_SECONDS
from dagster_taskiq.dashboard.words import DASH, ago, short_duration, short_id
from dagster_taskiq.defaults import HISTORY_ENDS
from dagster_taskiq.messages.attempt_ends import AttemptEnd, EndGroup, EndOutcome

#: How many ends of each group a look reads, and the first one, which has all that are kept.
FEW_ENDS, ALL_ENDS = 60, HISTORY_ENDS

#: The most ends of a group that are remembered.
_MOST_OF_GROUP = 5000

#: How many ended attempts the page shows: those that went wrong, and the others.
MOST_WRONG, MOST_OTHER = 25, 15

#: The same on a page of their own, and on the page of a run.
ALL_SHOWN = 300

_WRONG = (EndGroup.FAILED, EndGroup.RETRIED)


@dataclass(frozen=True)
class Ends:
    """The attempts that have ended, as far as they are known here.

    Attributes:
        all: the newest first.
        known_since: of a group the moment, in seconds since the epoch, before which some are not
            known; none for a group of which all of the last hour are.
    """

    all: Sequence[AttemptEnd] = ()
    known_since: Mapping[EndGroup, float] = field(default_factory=dict)


class EndMemory:
    """Adds up what looks bring of ended attempts, of which each has the last few."""

    def __init__(self) -> None:
        self._ends: dict[EndGroup, dict[str, AttemptEnd]] = {it: {} for it in EndGroup}
        self._known_since: dict[EndGroup, float] = {}
        self.next_most = ALL_ENDS

    def note(self, ends: Sequence[AttemptEnd], now: float) -> Ends:
        """Keep what a look has brought; what is known then.

        Args:
            ends: at most ``next_most`` of each group, the newest first.
            now: seconds since the epoch.
        """
        most, self.next_most = self.next_most, FEW_ENDS
        for group, known in self._ends.items():
            read = [it for it in ends if it.group is group]
            fresh = [it for it in read if it.task_id not in known]
            if len(fresh) == len(read) >= most:
                # more may have ended since the look before
                if most == ALL_ENDS:
                    self._known_since[group] = read[-1].ended_at
                else:
                    self.next_most = ALL_ENDS
                    continue
            known.update((it.task_id, it) for it in fresh)
            self._forget(group, now)
        everything = [it for known in self._ends.values() for it in known.values()]
        everything.sort(key=lambda it: it.ended_at, reverse=True)
        since = {group: at for group, at in self._known_since.items() if now - at < MEMORY_SECONDS}
        return Ends(everything, since)

    def _forget(self, group: EndGroup, now: float) -> None:
        """Keep those of the last hour, and as many as the backend does."""
        known = self._ends[group]
        ordered = sorted(known.values(), key=lambda it: it.ended_at, reverse=True)
        kept = [
            it
            for number, it in enumerate(ordered[:_MOST_OF_GROUP])
            if number < ALL_ENDS or now - it.ended_at <= MEMORY_SECONDS
        ]
        if len(ordered) > _MOST_OF_GROUP:
            self._known_since[group] = kept[-1].ended_at
        self._ends[group] = {it.task_id: it for it in kept}


# --- the table ---


@dataclass(frozen=True)
class EndRow:
    """An attempt that has ended.

    Attributes:
        waited: from when it was sent to when it began.
        lasted: from then to its end.
    """

    task_id: str
    title: str
    attempt: str
    outcome: str
    tone: str
    run_id: str
    run: str
    job: str
    queue: str
    worker: str
    waited: str
    lasted: str
    ended: str
    ended_at: float
    reason: str


@dataclass(frozen=True)
class EndTable:
    """Those that went wrong, and the others; the newest first.

    Attributes:
        more: how many are known beside them.
    """

    wrong: Sequence[EndRow]
    others: Sequence[EndRow]
    more: int


def end_table(ends: Ends, now: float, only: str = "", *, are_all: bool = False) -> EndTable:
    """The table of what has ended.

    Args:
        only: id of the one run that is wanted.
        are_all: whether all are wanted.
    """
    found = [it for it in ends.all if only in ("", it.run_id)]
    most_wrong, most_other = (ALL_SHOWN, ALL_SHOWN) if are_all else (MOST_WRONG, MOST_OTHER)
    wrong = [it for it in found if it.group in _WRONG][:most_wrong]
    others = [it for it in found if it.group not in _WRONG][:most_other]
    return EndTable(
        [_end_row(it, now) for it in wrong],
        [_end_row(it, now) for it in others],
        len(found) - len(wrong) - len(others),
    )


def _end_row(end: AttemptEnd, now: float) -> EndRow:
    outcome = end.outcome.value + (", retried" if end.is_retried else "")
    waited, lasted = wait_seconds(end), _run_seconds(end)
    return EndRow(
        task_id=end.task_id,
        title=end.step_key or "(the whole run)",
        attempt=str(end.attempt) if end.attempt > 1 else "",
        outcome=outcome,
        tone=_tone(end),
        run_id=end.run_id,
        run=short_id(end.run_id),
        job=end.job,
        queue=end.queue,
        worker=end.worker or DASH,
        waited=short_duration(waited),
        lasted=DASH if lasted is None else short_duration(lasted),
        ended=ago(end.ended_at, now),
        ended_at=end.ended_at,
        reason=end.reason,
    )


def _tone(end: AttemptEnd) -> str:
    if end.group in _WRONG:
        return "warn" if end.is_retried else "bad"
    return "good" if end.outcome is EndOutcome.SUCCEEDED else "calm"


def wait_seconds(end: AttemptEnd) -> float | None:
    """How long it has waited before it began; clocks of two hosts may differ."""
    if end.sent_at is None or end.started_at is None:
        return None
    return max(0.0, end.started_at - end.sent_at)


def _run_seconds(end: AttemptEnd) -> float | None:
    return None if end.started_at is None else max(0.0, end.ended_at - end.started_at)


def unknown_note(ends: Ends, now: float) -> str:
    """What of the last hour is not known, a sentence; empty for nothing."""
    if not ends.known_since:
        return ""
    minutes = int((now - max(ends.known_since.values())) // 60)
    return f"more has ended than is kept: all of it is known for {minutes} min"
