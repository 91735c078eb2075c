"""What the page's tables say, row by row: the read model in words.

A row's ``tone`` is how it is marked: ``good``, ``bad``, ``warn``, ``busy`` or ``calm``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from dagster_taskiq.dashboard.looks import MOST_WAITING, Look
from dagster_taskiq.dashboard.words import DASH, ago, count_of, duration, short_duration, short_id
from dagster_taskiq.messages.envelope import PROTOCOL, QueueKind
from dagster_taskiq.messages.worker_records import PAUSED, WorkerRecord
from dagster_taskiq.overview import QueueView, RunView, ServerView, TaskStatus, TaskView

#: The most runs, and tasks of one run, that the page shows in flight.
MOST_RUNS = 100
MOST_TASKS = 60

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
class ServerRow:
    """A server."""

    roles: str
    product: str
    address: str
    answer: str
    tone: str
    problem: str


def server_row(server: ServerView) -> ServerRow:
    """A server in words."""
    is_away = bool(server.problem)
    answer = "does not answer" if is_away else f"answers in {short_duration(server.seconds)}"
    return ServerRow(
        " and ".join(server.roles).capitalize(),
        server.product or DASH,
        server.address,
        answer,
        "bad" if is_away else "good",
        server.problem,
    )


# --- workers ---


@dataclass(frozen=True)
class WorkRow:
    """What a worker executes in one of its slots."""

    title: str
    run_id: str
    run: str
    lasts: str
    since: float | None


@dataclass(frozen=True)
class WorkerRow:
    """A worker, or one that is gone, which has no id to order it about by.

    Attributes:
        steps, runs: busy and all slots of the kind.
        work: the longest first.
        notes: sentences about its record.
    """

    worker_id: str
    name: str
    state: str
    tone: str
    queues: Sequence[str]
    steps: tuple[int, int]
    runs: tuple[int, int]
    work: Sequence[WorkRow]
    lives: str
    heard: str
    version: str
    pid: int
    refused: int
    notes: Sequence[str]
    is_paused: bool
    is_gone: bool = False


def worker_rows(look: Look) -> list[WorkerRow]:
    """The workers, and below them those that are gone, the last one first."""
    rows = [_worker_row(record, look) for record in look.overview.workers]
    for gone in look.news.gone:
        state, tone = ("lost", "bad") if gone.was_silent else ("gone", "calm")
        row = _row_of(gone.record, look, state, tone)
        rows.append(replace(row, work=(), is_gone=True, heard=ago(gone.at, look.at)))
    return rows


def _worker_row(record: WorkerRecord, look: Look) -> WorkerRow:
    silent = look.news.silent_seconds.get(record.worker_id)
    if silent is not None:
        return _row_of(record, look, f"silent for {duration(silent)}", "warn")
    tone = "good" if record.state == "running" else "warn"
    return _row_of(record, look, record.state, tone)


def _row_of(record: WorkerRecord, look: Look, state: str, tone: str) -> WorkerRow:
    return WorkerRow(
        worker_id=record.worker_id,
        name=record.name,
        state=state,
        tone=tone if record.is_trusted else "warn",
        queues=record.queues,
        steps=(record.busy_slots, record.slots),
        runs=(record.busy_run_slots, record.run_slots),
        work=[_work_row(task, look.at) for task in look.overview.tasks_of_worker(record)],
        lives=duration(look.at - record.started_at) if record.started_at else DASH,
        heard=ago(record.sent_at or None, look.at),
        version=record.version,
        pid=record.pid,
        refused=record.refused,
        notes=list(_notes(record)),
        is_paused=record.state == PAUSED,
    )


def _work_row(task: TaskView, now: float) -> WorkRow:
    lasts = DASH if task.claimed_at is None else duration(now - task.claimed_at)
    return WorkRow(title_of(task), task.run_id, short_id(task.run_id), lasts, task.claimed_at)


def _notes(record: WorkerRecord) -> Iterable[str]:
    if record.is_outdated:
        yield "Its record is outdated by this host's clock."
    elif not record.is_trusted:
        yield "Its record is not signed with the signing key that is set here."
    if record.state == PAUSED and record.pause_reason:
        yield f"Paused: {record.pause_reason}"
    if record.other_backend:
        yield f"It gives back tasks whose backend is {record.other_backend}."
    if record.protocol != PROTOCOL:
        yield f"It executes tasks of protocol {record.protocol} only; runs here send {PROTOCOL}."
    if record.state == "no processes":
        yield "It can start no processes, and takes nothing until it can: see its log."
    if record.refused:
        yield f"It has refused {count_of(record.refused, 'message')}."


# --- queues ---


@dataclass(frozen=True)
class QueueRow:
    """One part of a queue.

    Attributes:
        oldest: how long the one has waited that has waited longest.
        priorities: with how many tasks wait; None where the server cannot tell.
        reason: why tasks wait, beside the tasks before them.
    """

    name: str
    kind: str
    depth: int
    oldest: str
    oldest_at: float | None
    priorities: Sequence[tuple[int, int]] | None
    running: int
    workers: Sequence[str]
    state: str
    tone: str
    reason: str
    blindness: str
    is_paused: bool


def queue_rows(look: Look) -> list[QueueRow]:
    """The queues: what is stuck first, then what has tasks."""
    rows = [_queue_row(queue, look.at) for queue in look.overview.queues]
    return sorted(
        rows, key=lambda it: (it.tone != "bad", not it.is_paused, not it.depth, not it.running)
    )


def _queue_row(queue: QueueView, now: float) -> QueueRow:
    state, tone = "idle", "calm"
    if queue.pause is not None:
        state, tone = "paused", "warn"
    elif queue.is_stuck:
        state, tone = "stuck", "bad"
    elif queue.depth:
        state, tone = "waiting", "warn" if queue.wait else "busy"
    elif queue.running:
        state, tone = "running", "busy"
    elif not queue.workers:
        state, tone = "no worker", "warn"
    oldest_at = queue.oldest_sent_at
    return QueueRow(
        name=queue.name,
        kind=queue.kind.value,
        depth=queue.depth,
        oldest=DASH if oldest_at is None else duration(now - oldest_at),
        oldest_at=oldest_at,
        priorities=None if queue.priorities is None else list(queue.priorities.items()),
        running=queue.running,
        workers=queue.workers,
        state=state,
        tone=tone,
        reason=queue.wait.reason if queue.wait and (queue.depth or queue.pause) else "",
        blindness=queue.blindness,
        is_paused=queue.pause is not None,
    )


# --- tasks ---


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
    """

    run_id: str
    short_id: str
    loop: str
    tone: str
    tasks: Sequence[TaskRow]
    counts: str
    more: int


def run_rows(look: Look, only: str = "") -> list[RunRows]:
    """The runs in flight: those with lost tasks first, then those that execute something.

    Args:
        only: id of the one run that is wanted.
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
    return [_run_rows(it, known.get(it), found[it], look.at, depths) for it in ordered]


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
    now: float,
    depths: Mapping[tuple[str | None, QueueKind | None], int],
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
    for task in tasks[:MOST_TASKS]:
        rows.append(_task_row(task, now, depths, reason))
        reason = task.reason
    states = [task.status for task in tasks]
    counts = [f"{states.count(it):,} {it.value}" for it in _ORDER if it in states]
    more = max(0, len(tasks) - MOST_TASKS)
    return RunRows(run_id, short_id(run_id), loop, tone, rows, ", ".join(counts), more)


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
