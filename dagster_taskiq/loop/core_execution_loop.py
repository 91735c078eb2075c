"""The execution loop: it turns an execution plan into tasks, and their results into events.

One round: let ``ActiveExecution`` decide what is ready, send that, sleep until a result, a signal,
a delayed retry or the next reconciliation, take the results, and reconcile if it is time. Results
wake the loop by push; the reconciliation every few seconds compares what it waits for with what
broker and backend know, and so heals a wake-up that was lost, finds workers that died, and sends
again what vanished.

It knows Dagster, a ``Dispatcher``, and the backend's words for the state of a task, but not how
messages travel. Its parts are objects that are handed to each other; each uses those above it:

    Flights         the attempts that are under way
    Outages         servers that are away, and for how long that is borne
    Sending         ready steps become tasks, which go to the dispatcher
    Endings         what an attempt came to goes to ``ActiveExecution``
    Receiving       results, and tasks that workers give back
    Judge           decides over lost tasks by Dagster's log
    Stopping        the end of all of them
    Waiting         says why tasks wait
    Reconciliation  what is waited for, compared with what broker and backend know
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from dagster import DagsterEvent, MetadataValue

from dagster_taskiq._dagster.indexed_execution import IndexedExecution
from dagster_taskiq._dagster.names import (
    ActiveExecution,
    DagsterExecutionInterruptedError,
    EngineEventData,
    ExecutionPlan,
    ExecutionStep,
    InstanceConcurrencyContext,
    PlanOrchestrationContext,
)
from dagster_taskiq._dagster.replay import seconds_to_next_ready
from dagster_taskiq.aio.tracing import Tracing
from dagster_taskiq.config.settings import Settings
from dagster_taskiq.errors import ConfigError, ServerError, SupersededLoopError
from dagster_taskiq.loop.adoption import adopt
from dagster_taskiq.loop.dispatcher import Dispatcher
from dagster_taskiq.loop.endings import Endings
from dagster_taskiq.loop.flights import Flights, LoopRun
from dagster_taskiq.loop.judging import Judge
from dagster_taskiq.loop.outages import Outages
from dagster_taskiq.loop.receiving import Receiving
from dagster_taskiq.loop.reconciliation import Reconciliation
from dagster_taskiq.loop.sending import MakePayload, Sending
from dagster_taskiq.loop.stopping import Stopping
from dagster_taskiq.loop.waiting import Waiting
from dagster_taskiq.servers.patience import Patience
from dagster_taskiq.tags import has_misleading_priority, task_priority

#: Pause before a server that was away is tried again.
_RETRY_SECONDS = 1.0


def core_execution_loop(
    context: PlanOrchestrationContext,
    plan: ExecutionPlan,
    settings: Settings,
    open_dispatcher: Callable[[], Dispatcher],
    make_payload: MakePayload,
    now: Callable[[], float] = time.monotonic,
    tracing: Tracing | None = None,
) -> Iterator[DagsterEvent]:
    """Execute a plan's steps on workers.

    Args:
        context: of the run.
        plan: the steps.
        settings: default queue and priority, and the limits of the run.
        open_dispatcher: called once, unless the plan has no steps.
        make_payload: builds the packed arguments of a step from it and its known state.
        now: the clock, in monotonic seconds; another one for tests.
        tracing: hears of the run and its attempts.

    Yields:
        the steps' events that their results carry, which their workers have logged, and the loop's
        own, which it logs.
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
        IndexedExecution(
            plan,
            retry_mode=context.executor.retries,
            sort_key_fn=lambda step: -priority_of(step),
            max_concurrent=settings.max_concurrent,
            tag_concurrency_limits=[dict(limit) for limit in settings.tag_concurrency_limits],
            instance_concurrency_context=concurrency,
        ) as active,
    ):
        dispatcher = open_dispatcher()
        tracing = tracing or Tracing()
        trace = tracing.run(context.run_id, context.job_name)
        run = LoopRun(context, dispatcher, Flights(concurrency), now, trace)
        loop = _Loop(run, active, concurrency, settings, make_payload, priority_of)
        try:
            yield from _events_of(loop, run, settings)
        finally:
            dispatcher.close(leave_running=loop.leaves_steps_running)
            trace.ended()
            tracing.flush()


def _events_of(loop: _Loop, run: LoopRun, settings: Settings) -> Iterator[DagsterEvent]:
    """The loop from its beginning to its end; where it fails, the steps end with it."""
    context = run.context
    try:
        if page := settings.page_of(context.run_id):
            yield DagsterEvent.engine_event(
                context,
                "The dashboard shows where this run's steps are.",
                EngineEventData(metadata={"dashboard": MetadataValue.url(page)}),
            )
        yield from loop.open()
        if context.resume_from_failure:
            yield from loop.adopt()
        yield from loop.run()
    except SupersededLoopError as error:
        loop.leave_steps_running()
        run.trace.ended(str(error))
        raise
    except BaseException as error:
        # also when Dagster closes this generator: nothing may run on unwatched
        loop.stop_everything()
        run.trace.ended(f"{type(error).__name__}: {error}")
        raise


class _Loop:
    """The rounds of one run's loop; it makes the parts and calls them in order."""

    def __init__(
        self,
        run: LoopRun,
        active: ActiveExecution,
        concurrency: InstanceConcurrencyContext,
        settings: Settings,
        make_payload: MakePayload,
        priority_of: Callable[[ExecutionStep], int],
    ) -> None:
        self._active = active
        self._concurrency = concurrency
        self._is_interrupted = False
        self._run = run
        patience = Patience(
            settings.server_patience_seconds,
            # a loop that takes over knows that these servers have worked, and what is under way
            has_worked=run.context.resume_from_failure,
            now=run.now,
        )
        self._outages = outages = Outages(run, patience)
        self._sending = Sending(run, active, settings, make_payload, priority_of, outages)
        endings = Endings(run, active)
        self._receiving = Receiving(run, endings, self._sending)
        judge = Judge(run, endings, self._sending)
        stop_seconds = settings.lease_seconds + settings.cancel_grace_seconds
        self._stopping = Stopping(run, active, endings, outages, stop_seconds)
        self._reconciliation = Reconciliation(
            run,
            outages,
            self._receiving,
            endings,
            judge,
            self._stopping,
            Waiting(run, active, settings),
        )

    @property
    def leaves_steps_running(self) -> bool:
        """Whether another loop of the run takes over."""
        return self._stopping.leaves_steps_running

    def leave_steps_running(self) -> None:
        """Another loop of the run has taken over."""
        self._stopping.leaves_steps_running = True

    # --- beginning ---

    def open(self) -> Iterator[DagsterEvent]:
        """Wait until the servers take the run, or for an interrupt, which ``run`` handles."""
        while not self._check_for_interrupts():
            try:
                self._run.dispatcher.open()
            except ServerError as error:
                yield from self._outages.note("open", error)
                self._run.dispatcher.wait(_RETRY_SECONDS)
            else:
                self._outages.over("open")
                return

    def adopt(self) -> Iterator[DagsterEvent]:
        """Take over the run from a former process; see ``adoption``."""
        yield from adopt(self._run, self._active, self._concurrency, self._sending)
        # what workers have dropped meanwhile is sent again at once, the rest of what is missing
        # when it is certain that nobody has it: the backend may just have forgotten everything
        self._reconciliation.due_at = self._run.now()

    def _check_for_interrupts(self) -> bool:
        self._is_interrupted = self._is_interrupted or self._active.check_for_interrupts()
        return self._is_interrupted

    # --- the rounds ---

    def run(self) -> Iterator[DagsterEvent]:
        """Go round until every step has ended, or all were stopped."""
        flights = self._run.flights
        while True:
            if self._check_for_interrupts() and not flights.is_stopping:
                yield from self._stopping.interrupt()
                if self.leaves_steps_running:
                    break
            yield from self._stopping.send_cancels()
            yield from self._active.plan_events_iterator(self._run.context)
            if not flights.is_stopping:
                yield from self._sending.take_ready_steps()
                yield from self._active.concurrency_event_iterator(self._run.context)
            # only here: results that have just come may have made dynamic steps, which
            # ``is_complete`` knows of when the lines above have asked for what is ready
            if not flights and (self._active.is_complete or flights.is_stopping):
                break
            yield from self._sending.send()
            yield from self._wait_and_look()
        if flights.is_stopping:
            raise DagsterExecutionInterruptedError("The run was interrupted while steps were left.")

    def _wait_and_look(self) -> Iterator[DagsterEvent]:
        yield from self._receiving.receive(self._run.dispatcher.wait(self._seconds_to_wait()))
        yield from self._reconciliation.reconcile()

    def _seconds_to_wait(self) -> float:
        times = [self._reconciliation.due_at - self._run.now()]
        ready = seconds_to_next_ready(self._active)
        if ready is not None and not self._run.flights.is_stopping:
            # a pool that is asked at the very moment it says would be asked a hair too early
            times.append(max(ready, 0.01))
        if self._run.flights.unsent or self._stopping.is_untold:
            times.append(_RETRY_SECONDS)
        return max(0.0, min(times))

    # --- the end of a loop that has failed ---

    def stop_everything(self) -> None:
        """Stop the steps and wait for the word, without yielding: the loop itself has failed.

        What the steps did is in Dagster's log; the pool slots that they held are freed.
        """
        if self.leaves_steps_running or not self._run.flights:
            return
        self._stopping.begin()
        try:
            while self._run.flights:
                for _ in self._stopping.send_cancels():
                    pass
                for _ in self._wait_and_look():
                    pass
        except Exception:
            # the error that brought us here is the one to be raised
            self._run.context.log.exception(
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
