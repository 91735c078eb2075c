"""The execution loop: it turns an execution plan into tasks, and their results into events.

One round: take results, let ``ActiveExecution`` decide what became ready, send that, and sleep
until a result, a signal, a delayed retry or the next reconciliation. Results wake the loop by
push; the reconciliation every few seconds compares what it waits for with what broker and backend
know, and so heals a wake-up that was lost, finds workers that died, and sends again what vanished.

It knows Dagster, a ``Dispatcher``, and the backend's words for the state of a task, but not how
messages travel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dagster import DagsterEvent

from dagster_taskiq._dagster.names import (
    ActiveExecution,
    DagsterExecutionInterruptedError,
    DagsterRunStatus,
    EngineEventData,
    ExecutionPlan,
    ExecutionStep,
    InstanceConcurrencyContext,
    PlanOrchestrationContext,
    SerializableErrorInfo,
    deserialize_events,
    fail_step,
    plain_error,
    retry_or_fail_step,
    unpack_error,
)
from dagster_taskiq._dagster.replay import (
    cut_known_state,
    free_pool_slot,
    hold_pool_slot,
    is_in_flight,
    replay_log,
    seconds_to_next_ready,
)
from dagster_taskiq.aio.vigil import AbsenceWatch
from dagster_taskiq.backend.base import TaskState
from dagster_taskiq.config.settings import Settings
from dagster_taskiq.defaults import (
    FOREIGN_WORKERS_SECONDS,
    IN_HAND_SECONDS,
    QUEUE_WAIT_MARKER,
    RECONCILE_SECONDS,
)
from dagster_taskiq.errors import (
    ConfigError,
    MalformedResultError,
    ServerError,
    SupersededLoopError,
)
from dagster_taskiq.execution.attempt_log import outcome, read_steps_log, says_sent
from dagster_taskiq.loop.claim_watch import ClaimWatch
from dagster_taskiq.loop.dispatcher import Dispatcher, Inspection, StepTask
from dagster_taskiq.loop.flights import (
    Flight,
    RunLog,
    error_of,
    reason_of_loss,
)
from dagster_taskiq.messages.envelope import step_task_id
from dagster_taskiq.messages.queue_waits import QueueWait
from dagster_taskiq.messages.results import NOWHERE, Outcome, TaskResult
from dagster_taskiq.servers.patience import Patience
from dagster_taskiq.tags import (
    has_misleading_priority,
    step_queue,
    step_time_limits,
    task_priority,
)

#: Pause before a server that was away is tried again.
_RETRY_SECONDS = 1.0

#: While many steps become ready, those that are ready so far are sent this often. Workers would
#: otherwise be idle until the events of all are written.
_SEND_EVERY_SECONDS = 0.02

#: States of a task that nobody works on and that has not ended.
_MAY_REOPEN = (TaskState.UNKNOWN, TaskState.EXPIRED, TaskState.DROPPED)

#: Builds a step's packed arguments.
MakePayload = Callable[[ExecutionStep, Any], Mapping[str, Any]]


def core_execution_loop(
    context: PlanOrchestrationContext,
    plan: ExecutionPlan,
    settings: Settings,
    open_dispatcher: Callable[[], Dispatcher],
    make_payload: MakePayload,
) -> Iterator[DagsterEvent]:
    """Execute a plan's steps on workers.

    Args:
        context: of the run.
        plan: the steps.
        settings: default queue and priority, and the limits of the run.
        open_dispatcher: called once, unless the plan has no steps.
        make_payload: builds the packed arguments of a step from it and its known state.

    Yields:
        the steps' events, which their workers have logged, and the loop's own, which it logs.
    """
    if not plan.step_keys_to_execute:
        return
    _check_outputs_are_shared(plan)
    _warn_of_misleading_priorities(context, plan)

    def priority_of(step: ExecutionStep) -> int:
        run_tags = context.dagster_run.tags
        return task_priority(step.tags, run_tags, settings.source.task_default_priority)

    with (
        InstanceConcurrencyContext(context.instance, context.dagster_run) as concurrency,
        ActiveExecution(
            plan,
            retry_mode=context.executor.retries,
            sort_key_fn=lambda step: -priority_of(step),
            max_concurrent=settings.max_concurrent,
            tag_concurrency_limits=[dict(limit) for limit in settings.tag_concurrency_limits],
            instance_concurrency_context=concurrency,
        ) as active,
    ):
        dispatcher = open_dispatcher()
        loop = _Loop(context, active, concurrency, dispatcher, settings, make_payload, priority_of)
        try:
            yield from loop.open()
            if context.resume_from_failure:
                yield from loop.adopt()
            yield from loop.run()
        except SupersededLoopError:
            loop.leaves_steps_running = True
            raise
        except BaseException:
            # also when Dagster closes this generator: nothing may run on unwatched
            loop.stop_everything()
            raise
        finally:
            dispatcher.close(leave_running=loop.leaves_steps_running)


class _Loop:
    def __init__(
        self,
        context: PlanOrchestrationContext,
        active: ActiveExecution,
        concurrency: InstanceConcurrencyContext,
        dispatcher: Dispatcher,
        settings: Settings,
        make_payload: MakePayload,
        priority_of: Callable[[ExecutionStep], int],
    ) -> None:
        self._context = context
        self._active = active
        self._concurrency = concurrency
        self._dispatcher = dispatcher
        self._settings = settings
        self._make_payload = make_payload
        self._priority_of = priority_of
        self._first_attempts: dict[str, int] = {}
        self._flights: dict[str, Flight] = {}
        self._unsent: list[StepTask] = []
        self._to_cancel: list[StepTask] = []
        self._is_stopping = False
        self._stop_deadline = float("inf")
        self._reconcile_at = time.monotonic() + RECONCILE_SECONDS
        self._sent_at = 0.0
        self._patience = Patience(
            settings.server_patience_seconds,
            # a loop that takes over knows that these servers have worked, and what is under way
            has_worked=context.resume_from_failure,
            now=time.monotonic,
        )
        self._is_interrupted = False
        self.leaves_steps_running = False

    # --- beginning ---

    def open(self) -> Iterator[DagsterEvent]:
        """Wait until the servers take the run, or for an interrupt, which ``run`` handles."""
        while not self._check_for_interrupts():
            try:
                self._dispatcher.open()
            except ServerError as error:
                yield from self._note_outage("open", error)
                self._dispatcher.wait(_RETRY_SECONDS)
            else:
                self._patience.worked("open")
                return

    def _check_for_interrupts(self) -> bool:
        self._is_interrupted = self._is_interrupted or self._active.check_for_interrupts()
        return self._is_interrupted

    # --- taking over ---

    def adopt(self) -> Iterator[DagsterEvent]:
        """Take over the run from a former process: its steps go on, finished ones stay finished.

        Yields:
            beside the loop's own events the failures that the log already has: Dagster ends a run
            as failed only for those that it was given in this process.
        """
        entries = read_steps_log(self._context.instance, self._context.run_id)
        replayed = replay_log(self._active, entries, says_sent)
        yield from replayed.failures
        for key, count in replayed.retries.items():
            attempts = self._active.retry_state.get_attempt_count(key)
            self._first_attempts[key] = attempts - count + 1
        for key in replayed.sent:
            step = self._active.get_step_by_key(key)
            task = self._task_for(step)
            hold_pool_slot(self._concurrency, step)
            self._flights[task.task_id] = self._flight(task, step)
        for key in replayed.ended:
            free_pool_slot(self._concurrency, self._active.get_step_by_key(key))
        yield DagsterEvent.engine_event(
            self._context,
            f"Resumed the run; {len(replayed.sent)} steps are queued or running.",
            EngineEventData(metadata={"steps": ", ".join(replayed.sent) or "none"}),
        )
        # what workers have dropped meanwhile is sent again at once, the rest of what is missing
        # when it is certain that nobody has it: the backend may just have forgotten everything
        self._reconcile_at = time.monotonic()

    # --- the rounds ---

    def run(self) -> Iterator[DagsterEvent]:
        while True:
            if self._check_for_interrupts() and not self._is_stopping:
                yield from self._interrupt()
                if self.leaves_steps_running:
                    break
            yield from self._send_cancels()
            yield from self._active.plan_events_iterator(self._context)
            if not self._is_stopping:
                yield from self._take_ready_steps()
                yield from self._active.concurrency_event_iterator(self._context)
            # only here: results that have just come may have made dynamic steps, which
            # ``is_complete`` knows of when the lines above have asked for what is ready
            if not self._flights and (self._active.is_complete or self._is_stopping):
                break
            yield from self._send()
            yield from self._receive(self._dispatcher.wait(self._seconds_to_wait()))
            yield from self._reconcile()
        if self._is_stopping:
            raise DagsterExecutionInterruptedError("The run was interrupted while steps were left.")

    def _seconds_to_wait(self) -> float:
        now = time.monotonic()
        times = [self._reconcile_at - now]
        ready = seconds_to_next_ready(self._active)
        if ready is not None and not self._is_stopping:
            # a pool that is asked at the very moment it says would be asked a hair too early
            times.append(max(ready, 0.01))
        if self._unsent or self._to_cancel:
            times.append(_RETRY_SECONDS)
        return max(0.0, min(times))

    # --- sending ---

    def _take_ready_steps(self) -> Iterator[DagsterEvent]:
        for step in self._active.get_steps_to_execute():
            task = self._task_for(step)
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
            self._flights[task.task_id] = self._flight(task, step)
            self._unsent.append(task)
            if (
                time.monotonic() - self._sent_at > _SEND_EVERY_SECONDS
                and not self._patience.is_waiting
            ):
                yield from self._send()

    def _flight(self, task: StepTask, step: ExecutionStep) -> Flight:
        attempt_in_run = task.attempt - self._first_attempts[step.key] + 1
        claim = ClaimWatch(self._settings.lease_seconds)
        return Flight(task, step, attempt_in_run, sent_at=time.monotonic(), claim=claim)

    def _task_for(self, step: ExecutionStep) -> StepTask:
        attempt = self._active.retry_state.get_attempt_count(step.key) + 1
        self._first_attempts.setdefault(step.key, attempt)
        return StepTask(
            task_id=step_task_id(self._context.run_id, step.key, attempt),
            step_key=step.key,
            attempt=attempt,
            queue=step_queue(
                step.tags, self._context.dagster_run.tags, self._settings.default_queue
            ),
            priority=self._priority_of(step),
            make_payload=lambda: self._make_payload(step, cut_known_state(self._active, step)),
            limits=step_time_limits(step.tags),
        )

    def _send(self) -> Iterator[DagsterEvent]:
        self._sent_at = time.monotonic()
        if not self._unsent:
            return
        try:
            self._dispatcher.submit(self._unsent)
        except ServerError as error:
            yield from self._note_outage("send", error)
            return
        for task in self._unsent:
            self._flights[task.task_id].sent_at = time.monotonic()
        self._unsent = []
        self._patience.worked("send")

    def _note_outage(self, what: str, error: ServerError) -> Iterator[DagsterEvent]:
        """Say once that a server is away; raises where it is of no use to wait for it."""
        try:
            is_new = self._patience.note(what, error)
        except ServerError:
            if not self._is_stopping:
                raise
            is_new = False  # a stop is told until it is heard or ``_stop_deadline`` is over
        if is_new:
            yield DagsterEvent.engine_event(
                self._context, f"{error} The run goes on when it is back.", EngineEventData()
            )

    # --- receiving ---

    def _receive(self, results: Sequence[tuple[str, TaskResult]]) -> Iterator[DagsterEvent]:
        for task_id, result in results:
            flight = self._flights.pop(task_id, None)
            if flight is None:
                continue  # a second copy of what the reconciliation has fetched, or of a lost one
            if result.outcome is Outcome.REFUSED:
                yield from self._take_back(flight, result)
                continue
            yield from self._finish(flight, result)
            self._dispatcher.acknowledge([task_id])

    def _take_back(self, flight: Flight, result: TaskResult) -> Iterator[DagsterEvent]:
        """A worker could not execute a task: the reconciliation sends it again, for another one."""
        if self._context.instance.get_run_by_id(self._context.run_id) is None:
            reason = "The run has been deleted from Dagster's instance: its steps do not start."
            yield from self._finish(flight, replace(result, outcome=Outcome.ERROR, reason=reason))
            self._dispatcher.acknowledge([flight.task.task_id])
            return
        self._flights[flight.task.task_id] = flight
        if self._is_stopping:
            yield from self._withdraw(flight)
            return
        if flight.refused_since is None:
            flight.refused_since = time.monotonic()
        worker = result.place.worker
        if worker not in flight.refusals:
            flight.refusals[worker] = result.reason
            yield DagsterEvent.engine_event(
                self._context.for_step(flight.step),
                f'Step "{flight.step.key}" waits for another worker: {worker} has given it back. '
                f"{result.reason}",
                EngineEventData(metadata={"queue": flight.task.queue}),
            )

    def _send_to_another(self, flight: Flight) -> Iterator[DagsterEvent]:
        """Send a task again that a worker has given back, for a while."""
        now = time.monotonic()
        if self._is_stopping:
            return  # it is being cancelled
        if flight.refused_since and now - flight.refused_since >= FOREIGN_WORKERS_SECONDS:
            reasons = " ".join(f"Worker {name}: {why}" for name, why in flight.refusals.items())
            yield from self._fail_unexecuted(flight, f"Each worker gave it back. {reasons}")
        elif self._dispatcher.reopen(flight.task.task_id):
            self._prepare_to_send_again(flight)

    def _finish(self, flight: Flight, result: TaskResult) -> Iterator[DagsterEvent]:
        """Feed what came of an attempt to ``ActiveExecution``, so that it is in flight no more."""
        try:
            events = deserialize_events(result.events)
            error = None if result.error is None else unpack_error(result.error)
        except MalformedResultError as malformed:
            # as after a death, the log says what came of the step
            reason = f"Its result cannot be read: {malformed}."
            result = replace(result, outcome=Outcome.DIED, error=None, reason=reason)
            error = None
        if result.outcome in (Outcome.DIED, Outcome.UNLOGGED):
            # what is in the log counts; the result has no events. Read only now, since a condemned
            # attempt may have ended after the log was read by which it was judged
            instance, run_id = self._context.instance, self._context.run_id
            events = outcome(instance, run_id, flight.step.key, flight.attempt_in_run)
        for event in events:
            yield event
            if event.step_key != flight.step.key:
                continue
            if event.is_resource_init_failure:
                # no end of the attempt, though older versions of Dagster take it for one
                error = event.engine_event_data.error
            else:
                self._active.handle_event(event)
        if is_in_flight(self._active, flight.step.key):
            error = error_of(flight, result, error)
            yield from self._fail(flight, error, may_retry=not result.is_cancelled)
        elif result.outcome is Outcome.UNLOGGED:
            yield DagsterEvent.engine_event(
                self._context.for_step(flight.step),
                f'Step "{flight.step.key}" has ended, but events after its end are lost: '
                f"{result.reason}",
                EngineEventData(error=error),
            )

    def _fail(
        self, flight: Flight, error: SerializableErrorInfo, *, may_retry: bool
    ) -> Iterator[DagsterEvent]:
        """Log the end of an attempt that did not log one itself."""
        step_context = self._context.for_step(flight.step)
        if may_retry and not self._is_stopping:
            event = retry_or_fail_step(self._context, step_context, error, self._active)
        else:
            event = fail_step(step_context, error)
        yield event
        self._active.handle_event(event)

    # --- reconciliation ---

    def _reconcile(self) -> Iterator[DagsterEvent]:
        now = time.monotonic()
        if now < self._reconcile_at:
            return
        self._reconcile_at = now + RECONCILE_SECONDS
        unsent = {task.task_id for task in self._unsent}
        flights = [flight for key, flight in self._flights.items() if key not in unsent]
        if not flights:
            return
        try:
            inspection = self._dispatcher.inspect([flight.task for flight in flights])
            self._patience.worked("inspect")
            yield from self._receive(self._fetch_results(inspection))
            log = RunLog(
                self._context.instance, self._context.run_id
            )  # for all that are judged: after an outage there may be hundreds
            for flight in flights:
                if flight.task.task_id in self._flights:
                    self._look_at_claim(flight, inspection, asked_at=now)
                    yield from self._compare(flight, inspection, log)
        except ServerError as error:
            yield from self._note_outage("inspect", error)
            stop_was_heard = False
        else:
            stop_was_heard = not self._to_cancel
        if not stop_was_heard and now > self._stop_deadline:
            yield from self._give_up_waiting()

    def _fetch_results(self, inspection: Inspection) -> list[tuple[str, TaskResult]]:
        """The stored results that no wake-up has brought."""
        with_result = (TaskState.DONE, TaskState.REFUSED)
        done = [key for key, report in inspection.reports.items() if report.state in with_result]
        return self._dispatcher.fetch(done) if done else []

    def _look_at_claim(self, flight: Flight, inspection: Inspection, asked_at: float) -> None:
        report = inspection.reports[flight.task.task_id]
        now = time.monotonic()
        if report.state is TaskState.CLAIMED:
            flight.place = report.place
            flight.claim.see(asked_at, report.lease_left_seconds)
        else:
            flight.claim.miss(now, is_expired=report.state is TaskState.EXPIRED)
        self._reconcile_at = min(self._reconcile_at, flight.claim.next_look_at(now))

    def _compare(
        self, flight: Flight, inspection: Inspection, log: RunLog
    ) -> Iterator[DagsterEvent]:
        """Act on what broker and backend know of one task."""
        report = inspection.reports[flight.task.task_id]
        if report.state is TaskState.UNKNOWN:
            yield from self._look_after_waiting(flight, inspection, log)
            return
        flight.absence.see()
        if report.state is TaskState.CLAIMED:
            return
        if report.state is TaskState.REFUSED:
            yield from self._send_to_another(flight)
            return
        is_over = report.state is not TaskState.EXPIRED or flight.claim.is_over(time.monotonic())
        # DONE here means that the result is gone: the log has what came of it
        if report.state in (TaskState.DONE, TaskState.DROPPED) or (
            inspection.is_conclusive and is_over
        ):
            yield from self._judge(flight, report.state, inspection, log)

    def _look_after_waiting(
        self, flight: Flight, inspection: Inspection, log: RunLog
    ) -> Iterator[DagsterEvent]:
        now = time.monotonic()
        if flight.task.task_id in inspection.absent:
            flight.absence.miss(now)
        else:
            flight.absence.see()
        if (
            flight.absence.seconds(now) > IN_HAND_SECONDS
            and inspection.is_conclusive
            and (flight.claim.is_over(now) or not flight.claim.was_seen)
        ):
            yield from self._judge(flight, TaskState.UNKNOWN, inspection, log)
            return
        yield from self._explain_wait(flight, inspection.waits.get(flight.task.queue))

    def _explain_wait(self, flight: Flight, wait: QueueWait | None) -> Iterator[DagsterEvent]:
        """Say why a task waits; fail it where no worker of its queue can ever execute it."""
        now = time.monotonic()
        news = flight.waits.news(wait, now - flight.sent_at, now)
        if news is not None:
            yield DagsterEvent.engine_event(
                self._context.for_step(flight.step),
                f'Step "{flight.step.key}" waits. {news.reason}',
                EngineEventData(metadata={"queue": flight.task.queue}),
            )
        if wait is not None and flight.waits.is_hopeless(now):
            yield from self._fail_unexecuted(flight, wait.reason)

    def _fail_unexecuted(self, flight: Flight, reason: str) -> Iterator[DagsterEvent]:
        """Fail an attempt that no worker has taken, unless one has by now."""
        task_id = flight.task.task_id
        if self._dispatcher.cancel([flight.task], reason)[task_id] is TaskState.CANCELLED:
            del self._flights[task_id]
            message = f'Step "{flight.step.key}" was not executed. {reason}'
            yield from self._fail(flight, plain_error(message, "StepError"), may_retry=False)

    def _judge(
        self, flight: Flight, state: TaskState, inspection: Inspection, log: RunLog
    ) -> Iterator[DagsterEvent]:
        """Decide over a task that nobody works on any more and that has no result.

        What Dagster's log says of the attempt decides: its end counts as its result, a start
        without an end makes it a failure, and one that never started is sent again.
        """
        task_id = flight.task.task_id
        ended = log.has_ended(flight)
        has_started = ended or log.has_started(flight)
        if state is TaskState.CANCELLED and self._is_stopping and not has_started:
            yield from self._withdraw(flight)
            return
        may_reopen = state in _MAY_REOPEN and not self._is_stopping
        if may_reopen and not has_started:
            if self._dispatcher.reopen(task_id):
                yield from self._send_again(flight)
            return
        is_over = ended or state is TaskState.DONE
        if not self._dispatcher.condemn(task_id) and not is_over:
            return  # it is claimed or has its result after all
        del self._flights[task_id]
        begun_at = log.place_of(flight)
        lost = TaskResult(
            Outcome.DIED,
            flight.place or NOWHERE if begun_at == NOWHERE else begun_at,
            reason=reason_of_loss(flight, inspection, begun_at),
        )
        yield from self._finish(flight, lost)

    def _send_again(self, flight: Flight) -> Iterator[DagsterEvent]:
        yield DagsterEvent.engine_event(
            self._context.for_step(flight.step),
            f'Sending step "{flight.step.key}" to queue "{flight.task.queue}" again: its task '
            "disappeared before a worker had started it.",
            EngineEventData(metadata={"task id": flight.task.task_id}),
        )
        self._prepare_to_send_again(flight)

    def _prepare_to_send_again(self, flight: Flight) -> None:
        flight.absence = AbsenceWatch()
        flight.claim = ClaimWatch(self._settings.lease_seconds)
        flight.sent_at = time.monotonic()
        self._unsent.append(flight.task)

    # --- stopping ---

    def _interrupt(self) -> Iterator[DagsterEvent]:
        """A signal asks this process to end: stop the steps, unless another loop takes over."""
        instance, run_id = self._context.instance, self._context.run_id
        run = instance.get_run_by_id(run_id)
        is_cancelled = run is not None and run.status is DagsterRunStatus.CANCELING
        self._active.mark_interrupted()
        self._is_stopping = True
        steps = [flight.step.key for flight in self._flights.values()]
        if not is_cancelled and instance.run_will_resume(run_id):
            self.leaves_steps_running = True
            yield DagsterEvent.engine_event(
                self._context,
                "Received a termination signal; the steps go on, since the run will be resumed.",
                EngineEventData.interrupted(steps),
            )
            return
        yield DagsterEvent.engine_event(
            self._context,
            "Received a termination signal; stopping the steps on their workers.",
            EngineEventData.interrupted(steps),
        )
        self._begin_stop()

    def _begin_stop(self) -> None:
        unsent = {task.task_id for task in self._unsent}
        for task_id in unsent:
            self._drop(self._flights[task_id])
        self._unsent = []
        self._to_cancel = [flight.task for flight in self._flights.values()]
        self._stop_deadline = (
            time.monotonic() + self._settings.lease_seconds + self._settings.cancel_grace_seconds
        )

    def _send_cancels(self) -> Iterator[DagsterEvent]:
        if not self._to_cancel:
            return
        try:
            states = self._dispatcher.cancel(self._to_cancel, "The run was terminated")
        except ServerError as error:
            yield from self._note_outage("cancel", error)
            return
        for task in self._to_cancel:
            flight = self._flights.get(task.task_id)
            if flight is not None and states[task.task_id] is TaskState.CANCELLED:
                yield from self._withdraw(flight)
        self._to_cancel = []
        self._patience.worked("cancel")

    def _withdraw(self, flight: Flight) -> Iterator[DagsterEvent]:
        """Forget a cancelled task that never started, and say so in the log."""
        self._drop(flight)
        yield DagsterEvent.engine_event(
            self._context.for_step(flight.step),
            f'Withdrew step "{flight.step.key}" from queue "{flight.task.queue}" before a worker '
            "had started it.",
            EngineEventData(marker_end=QUEUE_WAIT_MARKER),
        )

    def _drop(self, flight: Flight) -> None:
        """Forget a task that is known not to run."""
        del self._flights[flight.task.task_id]
        self._concurrency.free_step(flight.step.key)

    def _give_up_waiting(self) -> Iterator[DagsterEvent]:
        """Forget all tasks: by now every worker has stopped its steps by itself."""
        yield DagsterEvent.engine_event(
            self._context,
            "The servers have been away, or have refused, for longer than a lease: the workers "
            "have stopped the run's steps, though none could say so.",
            EngineEventData.interrupted([flight.step.key for flight in self._flights.values()]),
        )
        for flight in list(self._flights.values()):
            self._drop(flight)

    def stop_everything(self) -> None:
        """Stop the steps and wait for the word, without yielding: the loop itself has failed.

        What the steps did is in Dagster's log; the pool slots that they held are freed.
        """
        if self.leaves_steps_running or not self._flights:
            return
        self._is_stopping = True
        self._begin_stop()
        try:
            while self._flights:
                for _ in self._send_cancels():
                    pass
                for _ in self._receive(self._dispatcher.wait(self._seconds_to_wait())):
                    pass
                for _ in self._reconcile():
                    pass
        except Exception:
            # the error that brought us here is the one to be raised
            self._context.log.exception(
                "The run's steps could not be stopped; they stop when its lease ends."
            )


def _check_outputs_are_shared(plan: ExecutionPlan) -> None:
    if not plan.artifacts_persisted:
        raise ConfigError(
            "Steps on workers cannot pass values in memory: an IO manager of this job keeps them "
            "in the process that made them. Use one that every worker can read: the default "
            "filesystem one on a shared disk, S3, GCS, ..."
        )


def _warn_of_misleading_priorities(context: PlanOrchestrationContext, plan: ExecutionPlan) -> None:
    keys = [
        key
        for key in plan.step_keys_to_execute
        if has_misleading_priority(plan.get_step_by_key(key).tags or {})
    ]
    if keys:
        context.log.warning(
            "These steps have the tag dagster/priority, which does not count here, and no "
            "dagster-taskiq/priority: %s. Set both where both are meant.",
            ", ".join(keys),
        )
