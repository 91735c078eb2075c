"""What a run's event log says of its steps: waiting, running where, done."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from dagster import DagsterEvent, DagsterInstance, DagsterRunStatus, EventLogEntry

from dagster_taskiq.defaults import QUEUE_WAIT_MARKER

#: Events read at once.
_PAGE = 500


class State(Enum):
    """Of a step."""

    WAITING = "waiting"
    RUNNING = "running"
    RETRYING = "retrying"
    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass
class Step:
    """A step and its latest attempt.

    Attributes:
        priority: in its queue, the run's part included.
        worker: without the host, since all of the demo is on one.
        pid: of the worker's child process.
        started_at, ended_at: seconds since the epoch.
    """

    key: str
    queue: str
    priority: int
    state: State = State.WAITING
    worker: str = ""
    pid: str = ""
    attempts: int = 1
    started_at: float | None = None
    ended_at: float | None = None

    def seconds(self, now: float) -> float | None:
        """How long the latest attempt has run; None before it has begun."""
        if self.started_at is None:
            return None
        return max(0.0, (self.ended_at or now) - self.started_at)


class Progress:
    """The steps of the newest run of an instance, in the order in which they were first sent."""

    def __init__(self, instance: DagsterInstance) -> None:
        self.steps: dict[str, Step] = {}
        self._instance = instance
        self._run_id: str | None = None
        self._cursor: str | None = None

    def status(self) -> DagsterRunStatus | None:
        """The run's, as the storage has it now; None while there is no run."""
        runs = self._instance.get_runs(limit=1)
        if not runs:
            return None
        self._run_id = runs[0].run_id
        return runs[0].status

    def update(self) -> list[Step]:
        """Read what is new in the log; the steps that it is about."""
        if self._run_id is None:
            self.status()
        if self._run_id is None:
            return []
        changed: dict[str, Step] = {}
        while True:
            page = self._instance.get_records_for_run(self._run_id, self._cursor, limit=_PAGE)
            self._cursor = page.cursor
            for record in page.records:
                step = self._apply(record.event_log_entry)
                if step is not None:
                    changed[step.key] = step
            if not page.has_more:
                return list(changed.values())

    def _apply(self, entry: EventLogEntry) -> Step | None:
        event = entry.dagster_event
        if event is None or event.step_key is None:
            return None
        if event.is_engine_event:
            return self._apply_engine_event(event, event.step_key, entry.timestamp)
        step = self.steps.get(event.step_key)
        ended = _end_of(event)
        if step is None or ended is None:
            return None
        step.state, step.ended_at = ended, entry.timestamp
        return step

    def _apply_engine_event(self, event: DagsterEvent, key: str, at: float) -> Step | None:
        data = event.engine_event_data
        values: dict[str, Any] = {name: item.value for name, item in data.metadata.items()}
        if data.marker_start == QUEUE_WAIT_MARKER:
            step = self.steps.setdefault(key, Step(key, values["queue"], values["priority"]))
            step.state, step.attempts = State.WAITING, values["attempt"]
            step.worker, step.pid, step.started_at, step.ended_at = "", "", None, None
            return step
        if data.marker_end == QUEUE_WAIT_MARKER and key in self.steps:
            step = self.steps[key]
            if "worker" not in values:
                step.state = State.STOPPED
                return step
            step.state, step.started_at = State.RUNNING, at
            step.worker, step.pid = values["worker"].partition("@")[0], values["pid"]
            return step
        return None


def _end_of(event: DagsterEvent) -> State | None:
    if event.is_step_success:
        return State.DONE
    if event.is_step_failure:
        return State.FAILED
    return State.RETRYING if event.is_step_up_for_retry else None
