"""Executes a task in a child process: loads the code, executes the step or run, says what came.

Runs in the main thread of its process, where Dagster can be interrupted and may redirect the
process's output. Objects that are costly to make and the same for many steps are kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from dagster import DagsterEvent, DagsterInstance, DagsterRun

from dagster_taskiq._dagster.names import (
    DagsterExecutionInterruptedError,
    DagsterRunStatus,
    ExecuteRunArgs,
    ExecuteStepArgs,
    InstanceRef,
    KnownExecutionState,
    capture_interrupts,
    error_info,
    execute_plan_iterator,
    pack_value,
    unpack_value,
)
from dagster_taskiq._dagster.patches import execute_or_resume_run, interrupts_end_no_attempt
from dagster_taskiq._dagster.replay import is_end_of_attempt
from dagster_taskiq.aio.tracing import StepTrace, Tracing
from dagster_taskiq.defaults import DATABASE_IDLE_SECONDS, SERVER_PATIENCE_SECONDS
from dagster_taskiq.errors import (
    CopyOfStepError,
    EventsNotWrittenError,
    TaskRefusedError,
    WrongInstanceError,
)
from dagster_taskiq.execution.arrivals import Arrival, report_run_start, report_step_start
from dagster_taskiq.execution.attempt_log import already_begun, end_in_words
from dagster_taskiq.execution.code_locations import ARGS_KEY, EXECUTABLE_KEY, RUN_ARGS_KEY
from dagster_taskiq.execution.event_batches import EventWriter, batched_events
from dagster_taskiq.execution.instances import open_instance
from dagster_taskiq.execution.known_runs import LiveRuns, startable_run
from dagster_taskiq.execution.loaded_code import LOADED
from dagster_taskiq.execution.run_payloads import payloads_of
from dagster_taskiq.execution.step_messages import StepTale
from dagster_taskiq.execution.step_plans import PLANS
from dagster_taskiq.execution.storage_connections import kept_connections
from dagster_taskiq.execution.storage_patience import DatabasePatience, patient_connections
from dagster_taskiq.messages.envelope import TaskName
from dagster_taskiq.messages.results import NOWHERE, Outcome, Place, TaskResult

#: What a step came to by the event that ends it, and which none of our outcomes tells.
_STEP_ENDS = {f"STEP_{it.upper()}": it for it in ("success", "failure", "up_for_retry", "skipped")}

#: Exit code of a run's process that ended without having finished its run.
EXIT_UNFINISHED = 4

#: Exit code of a run's process whose run another process has taken over.
EXIT_SUPERSEDED = 5


class TaskRunner:
    """Executes one task after the other, in one process.

    Args:
        database_idle_seconds: how long the database of Dagster's storage is left connected that
            nobody uses; 0 is not at all.
        patience_seconds: how long that database is waited for when it is away.
        refuses_copies: whether a step is not executed whose attempt Dagster's log has as begun.
        tracing: hears of each step.

    Attributes:
        step_end: what the last step came to, for metrics; empty where no event has said it.
    """

    def __init__(
        self,
        *,
        database_idle_seconds: float = DATABASE_IDLE_SECONDS,
        patience_seconds: float = SERVER_PATIENCE_SECONDS,
        refuses_copies: bool = False,
        tracing: Tracing | None = None,
    ) -> None:
        self.step_end = ""
        self._tracing = tracing or Tracing()
        self._refuses_copies = refuses_copies
        self._idle_seconds = database_idle_seconds
        self._patience = DatabasePatience(patience_seconds)
        self._runs = LiveRuns()
        self._known: tuple[InstanceRef | None, DagsterInstance] | None = None
        self._events = EventWriter()
        self._resources = ExitStack()

    def close(self) -> None:
        """Close the instance and its connections."""
        self._known = None
        self._runs = LiveRuns()
        self._events = EventWriter()
        self._resources.close()

    def execute_run(
        self,
        name: TaskName,
        payload: Mapping[str, Any],
        place: Place,
        arrival: Arrival,
        on_run_start_logged: Callable[[], None],
    ) -> TaskResult:
        """Execute or resume a whole run; this process is its process.

        Args:
            name: which of the two.
            payload: ``ExecuteRunArgs``, packed.
            place: where this is, for the run's events.
            arrival: for the run's events.
            on_run_start_logged: called when the log says that the run has started.

        Returns:
            the exit code: 0 where the run has come to an end, whichever. Like Dagster's own run
            workers, it is not 0 where the run failed.
        """
        self._patience.begin_anew()
        with capture_interrupts():
            try:
                args = unpack_value(payload[RUN_ARGS_KEY], as_type=ExecuteRunArgs)
                instance = self._instance(args.instance_ref)
                run = startable_run(instance, args.run_id, name)
                report_run_start(instance, run, place, arrival)
                self._events.flush()
                return _execute_run(instance, run, name, place, on_run_start_logged)
            except WrongInstanceError as refusal:
                # Dagster itself looks after a run that is resumed
                is_new = name is TaskName.EXECUTE_JOB
                outcome = Outcome.REFUSED if is_new else Outcome.ERROR
                return TaskResult(outcome, place, reason=str(refusal))
            except TaskRefusedError as refusal:
                return TaskResult(Outcome.ERROR, place, reason=str(refusal))
            except Exception:
                return TaskResult(Outcome.ERROR, place, error=pack_value(error_info()))

    def execute_plan(
        self,
        payload: Mapping[str, Any],
        place: Place,
        arrival: Arrival,
        on_loaded: Callable[[], None] = lambda: None,
    ) -> TaskResult:
        """Execute one step.

        Args:
            payload: ``ExecuteStepArgs`` and ``ReconstructableJob``, packed.
            place: where this is, for the step's events.
            arrival: for the step's events.
            on_loaded: called when the code is loaded, before the step's part of it runs.

        Returns:
            the events of the step, also when it failed; where the payload asks for no more, those
            that say what came of it. All are in Dagster's log. An error where the step could not
            be brought to run, or where the log did not take its events. ``COPY`` where the attempt
            has begun before, which nothing was written about. An interrupted step has no end among
            its events, unless its run is over, and an error that shows where it was: why it was
            interrupted is for the worker to add.
        """
        self._patience.begin_anew()

        def is_run_over() -> bool:
            run = self._run_of(payload)
            return run is not None and run.is_finished

        with capture_interrupts(), interrupts_end_no_attempt(is_run_over):
            result = self._traced_plan(payload, place, arrival, on_loaded)
            try:
                self._events.flush()
            except EventsNotWrittenError as error:
                return TaskResult(
                    Outcome.UNLOGGED,
                    place,
                    reason=str(error),
                    error=pack_value(error_info()),
                    is_cancelled=result.is_cancelled,
                )
        return result

    def _traced_plan(
        self,
        payload: Mapping[str, Any],
        place: Place,
        arrival: Arrival,
        on_loaded: Callable[[], None],
    ) -> TaskResult:
        trace = self._tracing.step(arrival.trace)
        outcome, reason = "interrupted", ""
        try:
            result = self._executed_plan(payload, place, arrival, on_loaded, trace)
            if not result.is_cancelled:
                outcome = "failed"
            reason = result.reason or str((result.error or {}).get("message", ""))
        finally:
            trace.ended(outcome, reason)
        return result

    def _executed_plan(
        self,
        payload: Mapping[str, Any],
        place: Place,
        arrival: Arrival,
        on_loaded: Callable[[], None],
        trace: StepTrace,
    ) -> TaskResult:
        tale = StepTale(payload, place)
        self.step_end = ""
        try:
            args = unpack_value(payload[ARGS_KEY], as_type=ExecuteStepArgs)
            executable = payload[EXECUTABLE_KEY]
            for event in self._step_events(args, executable, place, arrival, on_loaded, trace):
                tale.note(event)
                self.step_end = _STEP_ENDS.get(event.event_type_value, self.step_end)
                if is_end_of_attempt(event):
                    trace.note(*end_in_words(event))
        except (DagsterExecutionInterruptedError, KeyboardInterrupt):
            stopped = (
                "It was stopped." if tale.has_begun else "It was stopped before it had started."
            )
            error = pack_value(error_info())
            return tale.result(Outcome.FINISHED, error=error, reason=stopped, is_cancelled=True)
        except CopyOfStepError as refusal:
            return TaskResult(Outcome.COPY, place, reason=str(refusal))
        except WrongInstanceError as refusal:
            return TaskResult(Outcome.REFUSED, place, reason=str(refusal))
        except TaskRefusedError as refusal:
            return tale.result(Outcome.ERROR, reason=str(refusal))
        except Exception:
            return tale.result(Outcome.ERROR, error=pack_value(error_info()))
        return tale.result(Outcome.FINISHED)

    def _step_events(
        self,
        args: ExecuteStepArgs,
        executable: Mapping[str, Any],
        place: Place,
        arrival: Arrival,
        on_loaded: Callable[[], None],
        trace: StepTrace,
    ) -> Iterator[DagsterEvent]:
        instance = self._instance(args.instance_ref)
        run = self._runs.find(instance, args.run_id)
        (step_key,) = args.step_keys_to_execute or ()
        location = run.remote_job_origin.location_name if run.remote_job_origin else None
        instance.inject_env_vars(location)
        run_plan = PLANS.of_run(run, executable)
        known_state = args.known_state or KnownExecutionState()
        plan = run_plan.of_step(step_key, known_state)
        if self._refuses_copies:  # as late as can be, since it only counts what is in the log yet
            attempts = known_state.get_retry_state().get_attempt_count(step_key)
            _check_is_to_begin(instance, run.run_id, step_key, attempts + 1)
        on_loaded()
        trace.begin(arrival.attributes(run, step_key, place), arrival.sent_at, arrival.claimed_at)
        yield report_step_start(instance, run, step_key, place, arrival, trace.trace_id)
        self._events.flush()  # who looks for the step after a crash must find that it began
        yield from execute_plan_iterator(
            execution_plan=plan,
            job=run_plan.job,
            dagster_run=run,
            instance=instance,
            retry_mode=args.retry_mode,
            run_config=run_plan.run_config,
        )

    def is_run_over(self, payload: Mapping[str, Any]) -> bool:
        """Whether the run that a step belongs to is finished, or is not there any more.

        Args:
            payload: of the step's task.
        """
        run = self._run_of(payload)
        return run is None or run.is_finished

    def _run_of(self, payload: Mapping[str, Any]) -> DagsterRun | None:
        """The run that a step belongs to, as it is now; None if it was deleted."""
        args = unpack_value(payload[ARGS_KEY], as_type=ExecuteStepArgs)
        return self._instance(args.instance_ref).get_run_by_id(args.run_id)

    def fail_run(self, payload: Mapping[str, Any], reason: str) -> None:
        """Fail a run that could not start, unless something else has become of it.

        Args:
            payload: of the run's task.
            reason: why it could not start.
        """
        args = unpack_value(payload[RUN_ARGS_KEY], as_type=ExecuteRunArgs)
        instance = self._instance(args.instance_ref)
        run = instance.get_run_by_id(args.run_id)
        if run is not None and run.status is DagsterRunStatus.STARTING:
            instance.report_run_failed(run, f"The run could not start: {reason}")

    def find_code(self, run_ids: Sequence[str]) -> dict[str, str]:
        """Where the code of runs of this process's own instance is, see ``payloads_of``.

        Returns:
            nothing where it has none, and gets that of each task by its message.
        """
        return payloads_of(self._instance(None), run_ids) if os.getenv("DAGSTER_HOME") else {}

    def _instance(self, ref: InstanceRef | None) -> DagsterInstance:
        """The instance of the message, or this process's own where it was sent by reference."""
        if self._known is None or self._known[0] != ref:
            self.close()
            instance = LOADED.take_instance(ref) or self._patience.keep_trying(
                partial(open_instance, ref)
            )
            self._resources.callback(instance.dispose)
            self._resources.enter_context(patient_connections(instance, self._patience))
            self._resources.enter_context(kept_connections(instance, self._idle_seconds))
            self._events = self._resources.enter_context(batched_events(instance, self._patience))
            self._known = (ref, instance)
        return self._known[1]


def _execute_run(
    instance: DagsterInstance,
    run: DagsterRun,
    name: TaskName,
    place: Place,
    on_run_start_logged: Callable[[], None],
) -> TaskResult:
    exit_code = execute_or_resume_run(
        instance,
        run.run_id,
        is_resumed=name is TaskName.RESUME_JOB,
        on_run_start_logged=on_run_start_logged,
    )
    run = instance.get_run_by_id(run.run_id) or run
    if not run.is_finished:
        reason = f"The run's process ended while the run was {run.status.value}."
        return TaskResult(Outcome.FINISHED, place, reason=reason, exit_code=EXIT_UNFINISHED)
    return TaskResult(Outcome.FINISHED, place, exit_code=exit_code)


def _check_is_to_begin(instance: DagsterInstance, run_id: str, step_key: str, attempt: int) -> None:
    place = already_begun(instance, run_id, step_key, attempt)
    if place is None:
        return
    by = "" if place == NOWHERE else f" on worker {place.worker} (slot {place.slot})"
    raise CopyOfStepError(
        f'Attempt {attempt} of step "{step_key}" of run {run_id} has begun before{by}, by '
        "Dagster's log: this is a copy of its task, and the first claim is gone from the backend. "
        "See who can write to broker and backend."
    )
