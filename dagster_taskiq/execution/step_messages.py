"""What a run's process and a child say to each other about a step: its payload and its result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dagster import DagsterEvent

from dagster_taskiq._dagster.names import (
    ExecuteStepArgs,
    ExecutionStep,
    KnownExecutionState,
    PlanOrchestrationContext,
    pack_value,
    serialize_value,
)
from dagster_taskiq._dagster.patches import is_run_worker
from dagster_taskiq._dagster.replay import is_of_outcome
from dagster_taskiq._dagster.storage import is_own_instance
from dagster_taskiq.execution.attempt_log import last_start
from dagster_taskiq.execution.code_locations import ARGS_KEY, EXECUTABLE_KEY
from dagster_taskiq.messages.results import Outcome, Place, TaskResult

#: Where a payload says that nobody reads other events of the step than those of its outcome. A
#: child of an older version does not know it, and returns all.
OUTCOME_ONLY_KEY = "outcome_only"


class StepPayloads:
    """The payloads of one run's steps; what is the same in all of them is packed once.

    Args:
        context: of the run.
    """

    def __init__(self, context: PlanOrchestrationContext) -> None:
        job = context.reconstructable_job
        is_own = is_own_instance(context.instance)
        args = ExecuteStepArgs(
            job_origin=job.get_python_origin(),
            run_id=context.run_id,
            step_keys_to_execute=[],
            instance_ref=None if is_own else context.instance.get_ref(),
            retry_mode=context.executor.retries.for_inner_plan(),
            known_state=None,
            print_serialized_events=False,
        )
        self._args: Any = pack_value(args)
        self._constant: dict[str, Any] = {EXECUTABLE_KEY: job.to_dict()}
        # who calls ``execute_job`` is given all events that come back
        if is_run_worker(context.run_id):
            self._constant[OUTCOME_ONLY_KEY] = True

    def of(self, step: ExecutionStep, known_state: KnownExecutionState) -> dict[str, Any]:
        """The payload of a step's next attempt, ready for JSON; not to be changed.

        Args:
            known_state: cut to what the step reads.
        """
        own = {"step_keys_to_execute": [step.key], "known_state": pack_value(known_state)}
        return {ARGS_KEY: {**self._args, **own}, **self._constant}


class StepTale:
    """What a child has to tell of a step, as its events come.

    Args:
        payload: of the step.
        place: where it is executed.
    """

    def __init__(self, payload: Mapping[str, Any], place: Place) -> None:
        self._outcome_only = bool(payload.get(OUTCOME_ONLY_KEY))
        self._place = place
        self._events: list[str] = []
        self._started_at: float | None = None
        self.has_begun = False

    def note(self, event: DagsterEvent) -> None:
        """An event of the step, which is on its way into Dagster's log."""
        if self._outcome_only and not self.has_begun:
            self._started_at = last_start([event])
        self.has_begun = True
        if not self._outcome_only or is_of_outcome(event):
            self._events.append(serialize_value(event))

    def result(self, outcome: Outcome, **said: Any) -> TaskResult:
        """The result of the step.

        Args:
            said: other fields of it.
        """
        events = tuple(self._events)
        return TaskResult(outcome, self._place, events, started_at=self._started_at, **said)
