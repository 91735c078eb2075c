"""What is in flight, run by run: its table, and what of it is not shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dagster_taskiq.dashboard.looks import MOST_WAITING, Look
from dagster_taskiq.dashboard.words import DASH, count_of, duration, short_id
from dagster_taskiq.messages.envelope import QueueKind
from dagster_taskiq.messages.queue_looks import named
from dagster_taskiq.messages.withheld_steps import Withheld
from dagster_taskiq.overview import QueueView, RunView, TaskStatus, TaskView

#: The most tasks that a page shows in flight, and the most of one run beside others.
MOST_ROWS = 300
_MOST_OF_RUN = 60

_TONES = {
    TaskStatus.LOST: "bad",
    TaskStatus.RETURNED: "warn",
    TaskStatus.RUNNING: "busy",
    TaskStatus.WAITING: "calm",
}
_ORDER = list(_TONES)

#: What tasks are ordered by.
_Urgency = tuple[int, str, float]


@dataclass(frozen=True)
class TaskRow:
    """A task in flight.

    Attributes:
        place: in its queue, of those that wait there.
        reason: why it is not executed.
        is_as_before: whether the row above has the same reason.
    """

    task_id: str
    title: str
    attempt: str
    state: str
    tone: str
    queue: str
    priority: str
    place: str
    worker: str
    slot: str
    lasts: str
    since: float | None
    reason: str
    is_as_before: bool
    is_step: bool


@dataclass(frozen=True)
class RunRows:
    """A run and its tasks in flight.

    Attributes:
        loop: what is to be said of its execution loop; empty where one lives.
        more: how many of its tasks are not shown.
        withheld: which steps it holds back and why, in sentences.
    """

    run_id: str
    short_id: str
    job: str
    loop: str
    tone: str
    tasks: Sequence[TaskRow]
    counts: str
    more: int
    withheld: Sequence[str]


def run_rows(look: Look, only: str = "") -> tuple[list[RunRows], int]:
    """The runs in flight: those with lost tasks first, then those that execute something.

    Args:
        only: id of the one run that is wanted.

    Returns:
        the first ones, and how many there are beside them.
    """
    known = {run.run_id: run for run in look.overview.runs}
    depths: dict[tuple[str | None, QueueKind | None], int] = {
        (it.name, it.kind): it.depth for it in look.overview.queues
    }
    tasks: dict[str, list[TaskView]] = {run_id: [] for run_id in known}
    for task in look.overview.tasks():
        tasks.setdefault(task.run_id, []).append(task)
    found = {run_id: own for run_id, own in tasks.items() if only in ("", run_id)}
    for own in found.values():
        own.sort(key=_urgency)

    def urgency_of(run_id: str) -> _Urgency:
        own = found[run_id]
        return _urgency(own[0]) if own else (len(_ORDER), "", 0.0)

    ordered = sorted(found, key=lambda it: (*urgency_of(it), it))
    most_of_run = MOST_ROWS if only else _MOST_OF_RUN
    rows: list[RunRows] = []
    left = MOST_ROWS
    for run_id in ordered:
        if left <= 0:
            break
        shown = found[run_id][: min(left, most_of_run)]
        withheld = _withheld_notes(look.overview.withheld_of(run_id))
        run = known.get(run_id)
        rows.append(_run_rows(run_id, run, found[run_id], shown, look.at, depths, withheld))
        left -= max(1, len(shown))
    return rows, len(ordered) - len(rows)


def _urgency(task: TaskView) -> _Urgency:
    """Those that wait by their queues, the others by how long they have been at it."""
    number = _ORDER.index(task.status)
    if task.position is not None:
        return number, task.queue or "", float(task.position)
    return number, "", float("inf") if task.since is None else task.since


def _run_rows(
    run_id: str,
    run: RunView | None,
    tasks: Sequence[TaskView],
    shown: Sequence[TaskView],
    now: float,
    depths: Mapping[tuple[str | None, QueueKind | None], int],
    withheld: Sequence[str],
) -> RunRows:
    loop, tone = "", "good"
    if run is None:
        loop, tone = "not begun, or not known to the backend", "calm"
    elif not run.has_loop:
        loop, tone = (
            (
                "its process is gone, it may be resumed"
                if run.is_resumable
                else "its process is gone"
            ),
            "warn",
        )
    rows: list[TaskRow] = []
    reason = ""
    for task in shown:
        rows.append(_task_row(task, now, depths, reason))
        reason = task.reason
    states = [task.status for task in tasks]
    counts = [f"{states.count(it):,} {it.value}" for it in _ORDER if it in states]
    more = len(tasks) - len(shown)
    job = next((task.job for task in tasks if task.job), "")
    told = ", ".join(counts)
    return RunRows(run_id, short_id(run_id), job, loop, tone, rows, told, more, withheld)


def _withheld_notes(withheld: Withheld) -> list[str]:
    notes = []
    for group in withheld.groups:
        keys = named([key for key, _ in group.steps])
        notes.append(f"Ready, but held back: {keys}. {group.reason}")
    if withheld.more:
        notes.append(f"{count_of(withheld.more, 'more step')} held back.")
    return notes


def _task_row(
    task: TaskView,
    now: float,
    depths: Mapping[tuple[str | None, QueueKind | None], int],
    reason: str,
) -> TaskRow:
    place = ""
    if task.position is not None:
        depth = depths.get((task.queue, task.kind))
        place = f"{task.position:,}" + (f" of {depth:,}" if depth else "")
    return TaskRow(
        task_id=task.task_id,
        title=title_of(task),
        attempt=str(task.attempt) if (task.attempt or 0) > 1 else "",
        state=task.status.value,
        tone=_TONES[task.status],
        queue=task.queue or DASH,
        priority=DASH if task.priority is None else str(task.priority),
        place=place,
        worker=task.place.worker if task.place else "",
        slot=str(task.place.slot) if task.place else "",
        lasts=DASH if task.since is None else duration(now - task.since),
        since=task.since,
        reason=task.reason,
        is_as_before=bool(task.reason) and task.reason == reason,
        is_step=task.kind is not QueueKind.RUNS,
    )


def title_of(task: TaskView) -> str:
    """What a task executes."""
    if task.step_key is None:
        return f"task {short_id(task.task_id)}"
    return task.step_key or "(the whole run)"


def unseen_notes(queues: Iterable[QueueView]) -> list[str]:
    """Of each queue how many of its tasks are not shown one by one, and why."""
    notes = []
    for it in queues:
        if it.unseen:
            is_long = it.depth > MOST_WAITING
            why = it.blindness or (
                f"Only the next {MOST_WAITING} are."
                if is_long
                else "They are too long for a look, or not signed as they must be by the settings "
                "here."
            )
            more = "more task" if it.waiting else "task"
            count = count_of(it.unseen, more)
            notes.append(f"Not shown: {count} in queue {it.name} ({it.kind.value}). {why}")
    return notes
