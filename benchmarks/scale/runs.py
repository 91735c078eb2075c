"""Runs of a simulation: the product's ``Client`` for each, with steps that mean nothing."""

from __future__ import annotations

import itertools
import random
import threading
import time

from benchmarks.scale.crowd import Share, task_id_of
from dagster_taskiq.backend import TaskState
from dagster_taskiq.defaults import DEFAULT_QUEUE, DEFAULT_STEP_PRIORITY, RECONCILE_SECONDS
from dagster_taskiq.errors import ServerError
from dagster_taskiq.execution.event_batches import EventWriter
from dagster_taskiq.loop.client import Client
from dagster_taskiq.loop.dispatcher import StepTask

#: What a step's arguments are filled up to: about what ``measure`` finds for a step of a small
#: job.
PAYLOAD_BYTES = 1300

#: How long a run waits for results, at most, before it looks what else is due.
_WAIT_SECONDS = 0.5

#: Pause before a server that was away is tried again.
_RETRY_SECONDS = 0.5

#: Orders to cancel a second, of all runs together.
_CANCELS_PER_SECOND = 2.0


class SimulatedRun:
    """Keeps its steps queued or running, as long as its process lives.

    Attributes:
        errors, inspections: see ``Record``; since ``begin``.
        is_open: set once its steps may be claimed.
    """

    def __init__(self, share: Share, run_id: str) -> None:
        self.errors = 0
        self.inspections = 0
        self.is_open = threading.Event()
        self._share = share
        self._run_id = run_id
        self._in_flight = share.crowd.steps_by_run + share.crowd.waiting
        self._cancel_every_seconds = share.crowd.runs / _CANCELS_PER_SECOND
        self._may_cancel = False
        self._numbers = itertools.count()
        is_held = share.crowd.step_seconds is None
        held = self._next_tasks(share.crowd.steps_by_run if is_held else 0)
        self._flights = {task.task_id: task for task in held}
        self._thread = threading.Thread(target=self._live, name=run_id, daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def begin(self) -> None:
        """All workers have their steps: count from now on, and cancel some."""
        self.errors = self.inspections = 0
        self._may_cancel = True

    def _live(self) -> None:
        client = Client(
            servers=self._share.servers,
            run_id=self._run_id,
            generation=0,
            is_resumable=False,
            lease_seconds=self._share.crowd.lease_seconds,
            cancel_grace_seconds=30.0,
            events=EventWriter(),
        )
        client.open()
        self.is_open.set()
        while True:
            try:
                self._work(client)
            except ServerError:
                self.errors += 1
                time.sleep(_RETRY_SECONDS)

    def _work(self, client: Client) -> None:
        now = time.monotonic()
        reconcile_at = now + random.uniform(0, RECONCILE_SECONDS)
        cancel_at = now + random.uniform(0, self._cancel_every_seconds)
        while True:
            self._fill(client)
            done = [task_id for task_id, _ in client.wait(random.uniform(0, _WAIT_SECONDS))]
            if done:
                client.acknowledge(done)
                for task_id in done:
                    self._flights.pop(task_id, None)
            now = time.monotonic()
            if now >= reconcile_at:
                reconcile_at = now + RECONCILE_SECONDS
                client.inspect(list(self._flights.values()))
                self.inspections += 1
            if now >= cancel_at and self._may_cancel:
                cancel_at = now + self._cancel_every_seconds
                self._cancel_one(client)

    def _fill(self, client: Client) -> None:
        missing = self._in_flight - len(self._flights)
        if missing > 0:
            tasks = self._next_tasks(missing)
            client.submit(tasks)
            self._flights |= {task.task_id: task for task in tasks}

    def _next_tasks(self, count: int) -> list[StepTask]:
        return [_task(self._run_id, number) for number in itertools.islice(self._numbers, count)]

    def _cancel_one(self, client: Client) -> None:
        if not self._flights:
            return
        task = random.choice(list(self._flights.values()))
        states = client.cancel([task], "the simulation cancels some")
        if states[task.task_id] is TaskState.CANCELLED:
            del self._flights[task.task_id]  # nobody will report it


def _task(run_id: str, number: int) -> StepTask:
    return StepTask(
        task_id=task_id_of(run_id, number),
        step_key=f"step_{number}",
        attempt=1,
        queue=DEFAULT_QUEUE,
        priority=DEFAULT_STEP_PRIORITY,
        make_payload=lambda: {"padding": "x" * PAYLOAD_BYTES},
    )
