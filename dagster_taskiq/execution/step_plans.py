"""The plan of one step, at a cost that does not grow with its job.

To execute a step Dagster builds the plan of its whole job and cuts it down. A child that works for
a run keeps the job's plan instead, and takes out of it the step and what it reads of: the steps
whose outputs are its inputs. Those made by a dynamic output are resolved from the message's state.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dagster import DagsterRun

from dagster_taskiq._dagster.names import (
    ExecutionPlan,
    ExecutionStep,
    IExecutionStep,
    KnownExecutionState,
    ReconstructableJob,
    ResolvedFromDynamicStepHandle,
    StepHandle,
    UnresolvedCollectExecutionStep,
    create_execution_plan,
)
from dagster_taskiq.errors import SoftTimeLimitError, UnloadableCodeError
from dagster_taskiq.execution.code_locations import EXECUTABLE_KEY
from dagster_taskiq.execution.loaded_code import LOADED

#: Runs whose plans are kept. A child seldom works for more of them in turn.
_RUNS = 8


@dataclass(frozen=True)
class RunPlan:
    """What the steps of a run have in common.

    Attributes:
        executable: the packed job, whole: selections and what its definitions were loaded with
            are part of it.
        job: the same, unpacked.
        run_config: always the same object, by which its resolved form is known.
        plan: of all steps, with no state.
    """

    executable: Mapping[str, Any]
    job: ReconstructableJob
    run_config: Mapping[str, Any]
    plan: ExecutionPlan

    def of_step(self, step_key: str, state: KnownExecutionState) -> ExecutionPlan:
        """The plan to execute one step, which knows the state that its message brought."""
        step = self._step(step_key, state)
        steps = {
            handle.step_key: self._source(handle.step_key)
            for step_input in step.step_inputs
            for handle in step_input.get_step_output_handle_dependencies()
        }
        steps[step.key] = step
        return self.plan._replace(
            step_dict={it.handle: it for it in steps.values()},
            step_dict_by_key=steps,
            executable_map={step.key: step.handle},
            resolvable_map={},
            step_handles_to_execute=[step.handle],
            known_state=state,
        )

    def _step(self, key: str, state: KnownExecutionState) -> ExecutionStep:
        step = self._source(key)
        if isinstance(step, UnresolvedCollectExecutionStep):
            step = step.resolve(state.dynamic_mappings)
        assert isinstance(step, ExecutionStep)
        return step

    def _source(self, key: str) -> IExecutionStep:
        """The step of that key; one that collects without knowing yet how much."""
        handle = StepHandle.parse_from_key(key)
        if not isinstance(handle, ResolvedFromDynamicStepHandle):
            return self.plan.get_step(handle)
        unresolved: Any = self.plan.get_step(handle.unresolved_form)
        output = {unresolved.resolved_by_output_name: [handle.mapping_key]}
        step: IExecutionStep
        (step,) = unresolved.resolve({unresolved.resolved_by_step_key: output})
        return step


class RunPlans:
    """The plans of the runs that a process has worked for last."""

    def __init__(self) -> None:
        self._plans: OrderedDict[str, RunPlan] = OrderedDict()

    def of_run(self, run: DagsterRun, executable: Mapping[str, Any]) -> RunPlan:
        """The run's plan, built if need be.

        Args:
            run: as Dagster has it.
            executable: the packed job.
        """
        known = self._plans.get(run.run_id)
        if known is None or known.executable != executable:
            known = self._plans[run.run_id] = _build(run, executable)
        self._plans.move_to_end(run.run_id)
        if len(self._plans) > _RUNS:
            self._plans.popitem(last=False)
        return known


def make_plan(run: DagsterRun, payload: Mapping[str, Any]) -> None:
    """Have the plan of a step's run in the processes that are forked from this one.

    Args:
        run: the step's.
        payload: of the step's task.
    """
    with suppress(Exception):  # the step will tell
        PLANS.of_run(run, payload[EXECUTABLE_KEY])


def _load(job: ReconstructableJob) -> None:
    """Load a job's code, which is kept; an error says what was looked for, and where."""
    try:
        with LOADED.loading():
            job.get_definition()
    except SoftTimeLimitError:
        raise
    except Exception as error:
        pointer = job.repository.pointer
        directory = getattr(pointer, "working_directory", None) or "not given"
        first_line = next(iter(str(error).splitlines()), "")
        raise UnloadableCodeError(
            f'The code of job "{job.job_name}" cannot be loaded: {type(error).__name__}: '
            f'{first_line.rstrip(".")}. Looked for "{pointer.describe()}"; directory of the code '
            f"location: {directory}; directory of the worker: {Path.cwd()}. The worker needs the "
            "same code as the run: install it as a package on both, or start the worker where the "
            "code lies."
        ) from error


def _build(run: DagsterRun, executable: Mapping[str, Any]) -> RunPlan:
    job = ReconstructableJob.from_dict(dict(executable))
    _load(job)
    plan = create_execution_plan(
        job, run.run_config, repository_load_data=job.repository.repository_load_data
    )
    return RunPlan(executable, job, run.run_config, plan)


#: Of this process.
PLANS = RunPlans()
