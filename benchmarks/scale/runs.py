"""Runs of a simulation: the product's ``Client`` for each, with steps that mean nothing."""

from __future__ import annotations

import random
import threading
import time

from dagster_taskiq.backend import TaskState
from dagster_taskiq.connections import Servers
from dagster_taskiq.defaults import DEFAULT_QUEUE, DEFAULT_STEP_PRIORITY, RECONCILE_SECONDS
from dagster_taskiq.errors import ServerError
from dagster_taskiq.execution.event_batches import EventWriter
from dagster_taskiq.loop.client import Client
from dagster_taskiq.loop.dispatcher import StepTask
from dagster_taskiq.messages.envelope import step_task_id

#: What a step's arguments are filled up to: about what ``measure`` finds for a step of a small
#: job.
PAYLOAD_BYTES = 1300

#: How long a run waits for results, at most, before it looks what else is due.
_WAIT_SECONDS = 0.5

#: Pause before a server that was away is tried again.
_RETRY_SECONDS = 0.5


class SimulatedRun:
    """Keeps a number of steps queued or running, as long as its process lives.

    Args:
        run_id: its own.
        held: how many of its steps workers hold from the beginning.
        in_flight: how many, with these.
        cancel_every_seconds: how often it cancels one of them; None is never.
    """

    def __init__(
        self,
        servers: Servers,
        run_id: str,
        held: int,
        in_flight: int,
        lease_seconds: float,
        cancel_every_seconds: float | None,
    ) -> None:
        self.errors = 0
        self.inspections = 0
        #: Whether it may begin to cancel: not before all workers have their steps.
        self.may_cancel = False
        #: Set once its steps may be claimed.
        self.is_open = threading.Event()
        self._servers = servers
        self._in_flight = in_flight
        self._lease_seconds = lease_seconds
        self._cancel_every_seconds = cancel_every_seconds
        self._run_id = run_id
        tasks = [_task(run_id, number) for number in range(held)]
        self._sent = held
        self._flights = {task.task_id: task for task in tasks}
        self._thread = threading.Thread(target=self._live, name=self._run_id, daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def _live(self) -> None:
        client = Client(
            servers=self._servers,
            run_id=self._run_id,
            generation=0,
            is_resumable=False,
            lease_seconds=self._lease_seconds,
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
        pause = self._cancel_every_seconds
        cancel_at = now + random.uniform(0, pause) if pause else float("inf")
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
            if now >= cancel_at and pause and self.may_cancel:
                cancel_at = now + pause
                self._cancel_one(client)

    def _fill(self, client: Client) -> None:
        missing = self._in_flight - len(self._flights)
        if missing > 0:
            tasks = [self._next_task() for _ in range(missing)]
            client.submit(tasks)
            self._flights |= {task.task_id: task for task in tasks}

    def _next_task(self) -> StepTask:
        self._sent += 1
        return _task(self._run_id, self._sent - 1)

    def _cancel_one(self, client: Client) -> None:
        if not self._flights:
            return
        task = random.choice(list(self._flights.values()))
        states = client.cancel([task], "the simulation cancels some")
        if states[task.task_id] is TaskState.CANCELLED:
            del self._flights[task.task_id]  # nobody will report it


def task_id_of(run_id: str, number: int) -> str:
    """The id of a run's step, counted from 0."""
    return step_task_id(run_id, f"step_{number}", 1)


def _task(run_id: str, number: int) -> StepTask:
    return StepTask(
        task_id=task_id_of(run_id, number),
        step_key=f"step_{number}",
        attempt=1,
        queue=DEFAULT_QUEUE,
        priority=DEFAULT_STEP_PRIORITY,
        make_payload=lambda: {"padding": "x" * PAYLOAD_BYTES},
    )
