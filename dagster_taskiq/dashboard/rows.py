"""What the tables of servers, workers and queues say, row by row.

A row's ``tone`` is how it is marked: ``good``, ``bad``, ``warn``, ``busy`` or ``calm``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from dagster_taskiq.dashboard.flight import title_of
from dagster_taskiq.dashboard.looks import Look
from dagster_taskiq.dashboard.words import (
    DASH,
    ago,
    count_of,
    duration,
    short_duration,
    short_id,
    size,
)
from dagster_taskiq.messages.envelope import PROTOCOL
from dagster_taskiq.messages.worker_records import LOST, PAUSED, WorkerRecord
from dagster_taskiq.overview import QueueView, ServerView, TaskView

#: The most workers that the page shows: those that need somebody first, then by their names.
MOST_WORKERS = 100


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
    """A worker, or one that was lost.

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
    done: int
    failed: int
    memory: str
    lives: str
    heard: str
    version: str
    pid: int
    refused: int
    notes: Sequence[str]
    is_paused: bool
    is_gone: bool = False


def worker_rows(look: Look) -> list[WorkerRow]:
    """The workers, and below them those that were lost."""
    work = _work_by_worker(look)
    rows = [_worker_row(it, look, work.get(it.worker_id, ())) for it in look.overview.workers]
    lost = [
        _row_of(record, look, f"{LOST} {ago(record.sent_at, look.at)}", "bad", ())
        for record in look.overview.lost_workers
    ]
    if len(rows) > MOST_WORKERS:
        rows.sort(key=lambda row: row.tone == "good")
    return rows + [replace(row, is_gone=True) for row in lost]


def _work_by_worker(look: Look) -> dict[str, list[TaskView]]:
    """What each worker executes, by its id; not asked worker by worker, as there may be many."""
    found: dict[str, list[TaskView]] = {}
    for run in look.overview.runs:
        for task in run.tasks:
            if task.place is not None:
                found.setdefault(task.place.worker_id, []).append(task)
    return found


def _worker_row(record: WorkerRecord, look: Look, work: Sequence[TaskView]) -> WorkerRow:
    silent = look.silent_seconds.get(record.worker_id)
    if silent is not None:
        return _row_of(record, look, f"silent for {duration(silent)}", "warn", work)
    tone = "good" if record.state == "running" else "warn"
    return _row_of(record, look, record.state, tone, work)


def _row_of(
    record: WorkerRecord, look: Look, state: str, tone: str, work: Sequence[TaskView]
) -> WorkerRow:
    longest_first = sorted(work, key=lambda task: task.claimed_at or float("inf"))
    return WorkerRow(
        worker_id=record.worker_id,
        name=record.name,
        state=state,
        tone=tone if record.is_trusted else "warn",
        queues=record.queues,
        steps=(record.busy_slots, record.slots),
        runs=(record.busy_run_slots, record.run_slots),
        work=[_work_row(task, look.at) for task in longest_first],
        done=record.done,
        failed=record.failed,
        memory=size(record.memory_bytes) if record.memory_bytes else DASH,
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
