"""What the page remembers of its own looks: depths of the last hour, and who has become silent."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dagster_taskiq.defaults import HEARTBEAT_SECONDS
from dagster_taskiq.messages.worker_records import WorkerRecord
from dagster_taskiq.overview import Overview, TaskStatus, TaskView

#: How far the charts go back.
MEMORY_SECONDS = 3600.0

#: Between two samples that are kept.
SAMPLE_SECONDS = 10.0

#: After this time without a heartbeat a worker is called silent.
SILENT_SECONDS = 2.5 * HEARTBEAT_SECONDS

#: How many queues are remembered.
_MOST_QUEUES = 500

#: How many tasks are remembered by their names.
_MOST_TASKS = 5000


@dataclass(frozen=True)
class Sample:
    """How much there was at one moment.

    Attributes:
        at: seconds since the epoch.
        waiting, running: tasks.
        busy, slots: of those for steps and for runs together.
    """

    at: float
    waiting: int
    running: int
    busy: int
    slots: int


@dataclass
class _Heard:
    sent_at: float
    changed: float  # monotonic


class Memory:
    """What the looks have brought.

    Whether a worker is silent is told by when its record changed here, since the clocks of hosts
    may differ.

    Args:
        clock: seconds since the epoch.
        monotonic: seconds that go on evenly.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._monotonic = monotonic
        self._samples: deque[Sample] = deque(maxlen=int(MEMORY_SECONDS / SAMPLE_SECONDS) + 1)
        self._heard: dict[str, _Heard] = {}
        self._last_note = 0.0
        self._tasks: dict[str, TaskView] = {}
        self._queues: dict[str, float] = {}

    def note(self, overview: Overview) -> Overview:
        """Keep what one look has brought; the same with the names of tasks that are known here.

        What a worker has just taken is told by its next heartbeat alone, and what it had when it
        died by none: but it was seen when it waited.
        """
        self._note_sample(overview)
        self._note_workers(overview.workers)
        now = self._clock()
        self._queues.update((it.name, now) for it in overview.queues if it.depth or it.workers)
        known = {it.task_id: it for it in overview.tasks() if it.step_key is not None}
        runs = [
            replace(run, tasks=[self._named(task) for task in run.tasks]) for run in overview.runs
        ]
        # those that are still there, or were until now
        self._tasks = {**dict(list(self._tasks.items())[-_MOST_TASKS:]), **known}
        running = Counter(
            (task.kind, task.queue)
            for run in runs
            for task in run.tasks
            if task.status is TaskStatus.RUNNING
        )
        queues = [replace(it, running=running[it.kind, it.name]) for it in overview.queues]
        return replace(overview, runs=runs, queues=queues)

    def _named(self, task: TaskView) -> TaskView:
        seen = self._tasks.get(task.task_id)
        if task.step_key is not None or seen is None or seen.run_id != task.run_id:
            return task
        return replace(task, step_key=seen.step_key, attempt=seen.attempt, queue=seen.queue)

    def _note_sample(self, overview: Overview) -> None:
        now = self._clock()
        if self._samples and 0 <= now - self._samples[-1].at < SAMPLE_SECONDS:
            return
        records = overview.workers
        tasks = (task for run in overview.runs for task in run.tasks)
        self._samples.append(
            Sample(
                now,
                waiting=sum(it.depth for it in overview.queues),
                running=sum(it.status is TaskStatus.RUNNING for it in tasks),
                busy=sum(it.busy_slots + it.busy_run_slots for it in records),
                slots=sum(it.slots + it.run_slots for it in records),
            )
        )

    def _note_workers(self, records: Sequence[WorkerRecord]) -> None:
        now = self._monotonic()
        # nobody was looked at for a while: what was silent then may have spoken since
        was_away = now - self._last_note > SILENT_SECONDS
        self._last_note = now
        heard = {}
        for record in records:
            known = self._heard.get(record.worker_id)
            if known is None or was_away or known.sent_at != record.sent_at:
                known = _Heard(record.sent_at, now)
            heard[record.worker_id] = known
        self._heard = heard

    def silent_seconds(self) -> dict[str, float]:
        """For how long each worker that is silent has been, by its id."""
        now = self._monotonic()
        silences = {key: now - heard.changed for key, heard in self._heard.items()}
        return {key: seconds for key, seconds in silences.items() if seconds > SILENT_SECONDS}

    def queues(self) -> list[str]:
        """Names of the queues that had tasks or workers in the last hour.

        RabbitMQ lists no queues: one that its last worker has left would be seen no more.
        """
        now = self._clock()
        recent = sorted(self._queues.items(), key=lambda it: it[1], reverse=True)[:_MOST_QUEUES]
        self._queues = {name: at for name, at in recent if now - at <= MEMORY_SECONDS}
        return list(self._queues)

    def samples(self) -> list[Sample]:
        """Those of the last hour, the oldest first."""
        now = self._clock()
        return [it for it in self._samples if now - it.at <= MEMORY_SECONDS]
