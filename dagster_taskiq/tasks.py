"""What a child process does with a task: load the code, execute the step or run, say what came.

Runs in the main thread of its process, where Dagster can be interrupted and may redirect the
process's output. What is costly to make and the same for many steps is kept between them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from dagster import DagsterEvent, DagsterInstance, DagsterRun

from dagster_taskiq._dagster import (
    DagsterExecutionInterruptedError,
    DagsterRunStatus,
    EngineEventData,
    ExecuteRunArgs,
    ExecuteStepArgs,
    InstanceRef,
    ReconstructableJob,
    capture_interrupts,
    create_execution_plan,
    deserialize_instance_ref,
    error_info,
    execute_or_resume_run,
    execute_plan_iterator,
    pack_value,
    serialize_value,
    unpack_value,
)
from dagster_taskiq.envelope import TaskName
from dagster_taskiq.errors import DagsterTaskiqError
from dagster_taskiq.flights import QUEUE_WAIT_MARKER
from dagster_taskiq.results import Outcome, Place, TaskResult

#: Keys of a step's payload, and of a run's.
ARGS_KEY = "execute_step_args_packed"
EXECUTABLE_KEY = "executable_dict"
RUN_ARGS_KEY = "execute_job_args_packed"

#: Exit code of a run's process that ended without having finished its run.
EXIT_UNFINISHED = 4

#: Exit code of a run's process whose run another process has taken over.
EXIT_SUPERSEDED = 5


class StepRefusedError(DagsterTaskiqError):
    """The step or run must not or cannot be executed here; the message says why."""


def execute_run(name: TaskName, payload: Mapping[str, Any], place: Place, queue: str) -> TaskResult:
    """Execute or resume a whole run; this process is its process.

    Args:
        name: which of the two.
        payload: ``ExecuteRunArgs``, packed.
        place: where this is, for the run's events.
        queue: that the run was taken from.

    Returns:
        the exit code: 0 where the run has come to an end, whichever. Like Dagster's own run
        workers, it is not 0 where the run failed.
    """
    with capture_interrupts():
        try:
            args = unpack_value(payload[RUN_ARGS_KEY], as_type=ExecuteRunArgs)
            instance = _instance(args.instance_ref)
            run = _startable_run(instance, args.run_id, name)
            _report_run_start(instance, run, place, queue)
            exit_code = execute_or_resume_run(
                instance, args.run_id, is_resumed=name is TaskName.RESUME_JOB
            )
            run = instance.get_run_by_id(args.run_id) or run
            if not run.is_finished:
                reason = f"The run's process ended while the run was {run.status.value}."
                return TaskResult(Outcome.FINISHED, place, reason=reason, exit_code=EXIT_UNFINISHED)
        except StepRefusedError as refusal:
            return TaskResult(Outcome.ERROR, place, reason=str(refusal))
        except Exception:
            return TaskResult(Outcome.ERROR, place, error=pack_value(error_info()))
    return TaskResult(Outcome.FINISHED, place, exit_code=exit_code)


def _startable_run(instance: DagsterInstance, run_id: str, name: TaskName) -> DagsterRun:
    """The run, if it still waits to be started (or resumed): much can happen in a queue."""
    run = _known_run(instance, run_id)
    waiting = (
        (DagsterRunStatus.STARTING, DagsterRunStatus.STARTED)
        if name is TaskName.RESUME_JOB
        else (DagsterRunStatus.STARTING,)
    )
    if run.status not in waiting:
        raise StepRefusedError(f"Run {run_id} is {run.status.value}: it is not started any more.")
    return run


def _report_run_start(instance: DagsterInstance, run: DagsterRun, place: Place, queue: str) -> None:
    instance.report_engine_event(
        f"Executing the run on worker {place.worker}.",
        run,
        EngineEventData(metadata=_metadata(place, queue), marker_end=QUEUE_WAIT_MARKER),
    )


def is_run_over(payload: Mapping[str, Any]) -> bool:
    """Whether the run that a step belongs to is finished, or is not there any more.

    Args:
        payload: of the step's task.
    """
    args = unpack_value(payload[ARGS_KEY], as_type=ExecuteStepArgs)
    run = _instance(args.instance_ref).get_run_by_id(args.run_id)
    return run is None or run.is_finished


def execute_plan(payload: Mapping[str, Any], place: Place, queue: str) -> TaskResult:
    """Execute one step.

    Args:
        payload: ``ExecuteStepArgs`` and ``ReconstructableJob``, packed.
        place: where this is, for the step's events.
        queue: that the step was taken from.

    Returns:
        the events of the step, also when it failed or was interrupted, since Dagster reports
        both as events; an error only where the step could not be brought to run.
    """
    events: list[str] = []
    with capture_interrupts():
        try:
            args = unpack_value(payload[ARGS_KEY], as_type=ExecuteStepArgs)
            for event in _step_events(args, payload[EXECUTABLE_KEY], place, queue):
                events.append(serialize_value(event))  # noqa: PERF401 - what came before an error counts
        except (DagsterExecutionInterruptedError, KeyboardInterrupt):
            return TaskResult(
                Outcome.FINISHED,
                place,
                tuple(events),
                reason="It was interrupted before it had started.",
                is_cancelled=True,
            )
        except StepRefusedError as refusal:
            return TaskResult(Outcome.ERROR, place, tuple(events), reason=str(refusal))
        except Exception:
            return TaskResult(Outcome.ERROR, place, tuple(events), error=pack_value(error_info()))
    return TaskResult(Outcome.FINISHED, place, tuple(events))


def _step_events(
    args: ExecuteStepArgs, executable: Mapping[str, Any], place: Place, queue: str
) -> Any:
    instance = _instance(args.instance_ref)
    run = _live_run(instance, args.run_id)
    (step_key,) = args.step_keys_to_execute or ()
    location = run.remote_job_origin.location_name if run.remote_job_origin else None
    instance.inject_env_vars(location)
    job = ReconstructableJob.from_dict(dict(executable))
    plan = create_execution_plan(
        job,
        run.run_config,
        step_keys_to_execute=[step_key],
        known_state=args.known_state,
        repository_load_data=job.repository.repository_load_data,
    )
    yield _report_start(instance, run, step_key, place, queue)
    yield from execute_plan_iterator(
        execution_plan=plan,
        job=job,
        dagster_run=run,
        instance=instance,
        retry_mode=args.retry_mode,
        run_config=run.run_config,
    )


def _report_start(
    instance: DagsterInstance, run: DagsterRun, step_key: str, place: Place, queue: str
) -> DagsterEvent:
    return instance.report_engine_event(
        f'Executing step "{step_key}" on worker {place.worker}.',
        run,
        EngineEventData(metadata=_metadata(place, queue), marker_end=QUEUE_WAIT_MARKER),
        step_key=step_key,
    )


def _metadata(place: Place, queue: str) -> dict[str, Any]:
    return {
        "worker": place.worker,
        "host": place.host,
        "pid": str(os.getpid()),
        "slot": place.slot,
        "queue": queue,
    }


def _known_run(instance: DagsterInstance, run_id: str) -> DagsterRun:
    run = instance.get_run_by_id(run_id)
    if run is None:
        raise StepRefusedError(
            f"Run {run_id} is not in this worker's Dagster instance ({_describe(instance)}): the "
            "worker needs the same dagster.yaml and storage as the run."
        )
    return run


def _live_run(instance: DagsterInstance, run_id: str) -> DagsterRun:
    run = _known_run(instance, run_id)
    if run.is_finished or run.status is DagsterRunStatus.CANCELING:
        raise StepRefusedError(f"Run {run_id} is {run.status.value}: its steps do not start.")
    return run


def _describe(instance: DagsterInstance) -> str:
    home = os.getenv("DAGSTER_HOME")
    return f"DAGSTER_HOME={home}" if home else type(instance.run_storage).__name__


def _instance(ref: InstanceRef | None) -> DagsterInstance:
    """The instance of the message, or this process's own where it was sent by reference."""
    if ref is not None:
        return _instance_of(serialize_value(ref))
    return _own_instance()


@lru_cache(maxsize=4)
def _instance_of(serialized_ref: str) -> DagsterInstance:
    return DagsterInstance.from_ref(deserialize_instance_ref(serialized_ref))


@lru_cache(maxsize=1)
def _own_instance() -> DagsterInstance:
    if not os.getenv("DAGSTER_HOME"):
        raise StepRefusedError(
            "This worker has no Dagster instance: set DAGSTER_HOME to the directory of the "
            "dagster.yaml that the run uses, and start the worker again."
        )
    return DagsterInstance.get()
