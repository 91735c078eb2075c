"""The JSON of the listings; ``docs/command-line.md`` describes it.

Keys are only ever added. A time is in seconds since the epoch, by the clock of whoever has written
it; what is not known is ``null``.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dagster_taskiq.messages.attempt_ends import AttemptEnd
from dagster_taskiq.messages.queue_pauses import QueuePause
from dagster_taskiq.messages.withheld_steps import Withheld
from dagster_taskiq.messages.worker_records import WorkerRecord
from dagster_taskiq.overview import Overview, QueueView, ServerView, TaskView


def server_shape(server: ServerView) -> dict[str, Any]:
    """A server."""
    return {**asdict(server), "roles": list(server.roles)}


def worker_shape(record: WorkerRecord) -> dict[str, Any]:
    """A worker, as it describes itself."""
    values = {key: it for key, it in asdict(record).items() if key != "pings"}
    for name in ("memory_bytes", "dagster", "python", "storage"):
        values[name] = values[name] or None
    return {key: list(it) if isinstance(it, tuple) else it for key, it in values.items()}


def queue_shape(queue: QueueView) -> dict[str, Any]:
    """One part of a queue, without its tasks."""
    priorities = queue.priorities
    return {
        "name": queue.name,
        "kind": queue.kind.value,
        "depth": queue.depth,
        "priorities": None if priorities is None else {str(it): n for it, n in priorities.items()},
        "oldest_sent_at": queue.oldest_sent_at,
        "running": queue.running,
        "workers": list(queue.workers),
        "pause": queue.pause and _pause_shape(queue.pause),
        "is_stuck": queue.is_stuck,
        "wait": queue.wait and {"kind": queue.wait.kind.value, "reason": queue.wait.reason},
        "blindness": queue.blindness or None,
    }


def _pause_shape(pause: QueuePause) -> dict[str, Any]:
    return {"reason": pause.reason, "paused_at": pause.paused_at, "host": pause.host}


def task_shape(task: TaskView | AttemptEnd) -> dict[str, Any]:
    """A task in flight, or an attempt that has ended."""
    return _end_shape(task) if isinstance(task, AttemptEnd) else _flight_shape(task)


def _flight_shape(task: TaskView) -> dict[str, Any]:
    place = task.place
    return {
        "task_id": task.task_id,
        "run_id": task.run_id,
        "kind": task.kind and task.kind.value,
        "step_key": task.step_key or None,
        "job": task.job or None,
        "attempt": task.attempt,
        "queue": task.queue,
        "state": task.status.value,
        "priority": task.priority,
        "position": task.position,
        "sent_at": task.sent_at,
        "claimed_at": task.claimed_at,
        "worker": place and place.worker,
        "host": place and place.host,
        "pid": place and place.pid,
        "slot": place and place.slot,
        "reason": task.reason or None,
        "started_at": None,
        "ended_at": None,
        "is_retried": None,
    }


def _end_shape(end: AttemptEnd) -> dict[str, Any]:
    return {
        "task_id": end.task_id,
        "run_id": end.run_id,
        "kind": end.kind,
        "step_key": end.step_key or None,
        "job": end.job or None,
        "attempt": end.attempt,
        "queue": end.queue,
        "state": end.outcome.value,
        "priority": None,
        "position": None,
        "sent_at": end.sent_at,
        "claimed_at": None,
        "worker": end.worker or None,
        "host": end.host or None,
        "pid": None,
        "slot": end.slot,
        "reason": end.reason or None,
        "started_at": end.started_at,
        "ended_at": end.ended_at,
        "is_retried": end.is_retried,
    }


def withheld_shape(withheld: Withheld) -> list[dict[str, Any]]:
    """The steps that a run holds back, those that are named."""
    return [
        {"step_key": key, "since": since, "pool": group.pool or None, "reason": group.reason}
        for group in withheld.groups
        for key, since in group.steps
    ]


def unseen_shape(overview: Overview) -> list[dict[str, Any]]:
    """Of each queue how many of its tasks are not shown one by one, where there are any."""
    return [
        {"queue": queue.name, "kind": queue.kind.value, "count": queue.unseen}
        for queue in overview.queues
        if queue.unseen
    ]
