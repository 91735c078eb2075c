"""The way out: ready steps become tasks, and the dispatcher gets them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dagster import DagsterEvent

from dagster_taskiq._dagster.names import (
    ActiveExecution,
    EngineEventData,
    ExecutionStep,
)
from dagster_taskiq._dagster.replay import cut_known_state
from dagster_taskiq.aio.vigil import AbsenceWatch
from dagster_taskiq.config.settings import Settings
from dagster_taskiq.defaults import QUEUE_WAIT_MARKER
from dagster_taskiq.errors import ServerError
from dagster_taskiq.loop.claim_watch import ClaimWatch
from dagster_taskiq.loop.dispatcher import StepTask
from dagster_taskiq.loop.flights import Flight, LoopRun
from dagster_taskiq.loop.outages import Outages
from dagster_taskiq.messages.envelope import step_task_id
from dagster_taskiq.tags import step_queue, step_time_limits

#: While many steps become ready, those that are ready so far are sent this often. Workers would
#: otherwise be idle until the events of all are written.
_SEND_EVERY_SECONDS = 0.02

#: Builds a step's packed arguments.
MakePayload = Callable[[ExecutionStep, Any], Mapping[str, Any]]


class Sending:
    """Sends the steps of one run.

    Args:
        run: see ``LoopRun``.
        active: says which steps are ready, and what they read of earlier ones.
        settings: default queue, and the lease of claims.
        make_payload: builds the packed arguments of a step from it and its known state.
        priority_of: the priority of a step's task.
        outages: hear of servers that are away.
    """

    def __init__(
        self,
        run: LoopRun,
        active: ActiveExecution,
        settings: Settings,
        make_payload: MakePayload,
        priority_of: Callable[[ExecutionStep], int],
        outages: Outages,
    ) -> None:
        self._context = run.context
        self._dispatcher = run.dispatcher
        self._flights = run.flights
        self._now = run.now
        self._trace = run.trace
        self._active = active
        self._settings = settings
        self._make_payload = make_payload
        self._priority_of = priority_of
        self._outages = outages
        #: By step, the number of this run's first attempt: it may execute another run again.
        self._first_attempts: dict[str, int] = {}
        self._sent_at = 0.0

    def take_ready_steps(self) -> Iterator[DagsterEvent]:
        """Make tasks of the steps that are ready, and send what has come together so far."""
        for step in self._active.get_steps_to_execute():
            flight = self.new_flight(step)
            task = flight.task
            yield DagsterEvent.engine_event(
                self._context.for_step(step),
                f'Sending step "{step.key}" to queue "{task.queue}".',
                EngineEventData(
                    metadata={
                        "queue": task.queue,
                        "priority": task.priority,
                        "attempt": task.attempt,
                        "task id": task.task_id,
                    },
                    marker_start=QUEUE_WAIT_MARKER,
                ),
            )
            flight.sent_at = self._now()
            self._flights.add(flight)
            self._flights.unsent.append(task)
            if self._now() - self._sent_at > _SEND_EVERY_SECONDS and not self._outages.is_waiting:
                yield from self.send()
        self._flights.count_when_taken = len(self._flights)

    def send(self) -> Iterator[DagsterEvent]:
        """Send what is unsent; it stays so while a server is away."""
        self._sent_at = self._now()
        if not self._flights.unsent:
            return
        began_at = time.time_ns()  # a worker may have begun before the server has confirmed
        try:
            self._dispatcher.submit(self._flights.unsent)
        except ServerError as error:
            yield from self._outages.note("send", error)
            return
        ended_at = time.time_ns()
        for task in self._flights.unsent:
            flight = self._flights.find(task.task_id)
            assert flight is not None
            flight.sent_at, flight.sent_on = self._now(), began_at / 1e9
            flight.trace.submitted(began_at, ended_at)
        self._flights.unsent = []
        self._outages.over("send")

    def repeat(self, flight: Flight) -> None:
        """Have a task sent again that was reopened, as if it had never been sent."""
        flight.absence = AbsenceWatch()
        flight.claim = ClaimWatch(self._settings.lease_seconds)
        flight.sent_at = self._now()
        flight.trace.sent_again()
        self._flights.unsent.append(flight.task)

    def note_retries(self, step_key: str, count: int) -> None:
        """A number of the step's former attempts were of this run, the others of one before it."""
        attempts = self._active.retry_state.get_attempt_count(step_key)
        self._first_attempts[step_key] = attempts - count + 1

    def new_flight(self, step: ExecutionStep) -> Flight:
        """The next attempt of a step, which is under way only once it is added to the flights."""
        attempt = self._active.retry_state.get_attempt_count(step.key) + 1
        first_attempt = self._first_attempts.setdefault(step.key, attempt)
        queue = step_queue(step.tags, self._context.dagster_run.tags, self._settings.default_queue)
        priority = self._priority_of(step)
        task_id = step_task_id(self._context.run_id, step.key, attempt)
        trace = self._trace.attempt(step.key, attempt, queue, priority, task_id)
        task = StepTask(
            task_id=task_id,
            step_key=step.key,
            attempt=attempt,
            queue=queue,
            priority=priority,
            make_payload=lambda: self._make_payload(step, cut_known_state(self._active, step)),
            limits=step_time_limits(step.tags),
            job=self._context.dagster_run.job_name,
            trace=trace.context,
        )
        return Flight(
            task,
            step,
            attempt - first_attempt + 1,
            sent_at=self._now(),
            claim=ClaimWatch(self._settings.lease_seconds),
            trace=trace,
        )
