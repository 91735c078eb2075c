"""What of a step's task goes into its message."""

from __future__ import annotations

import json

from dagster_taskiq.execution.code_locations import code_location
from dagster_taskiq.loop.dispatcher import StepTask
from dagster_taskiq.messages.envelope import Envelope, TaskName


def envelope_of(
    task: StepTask, run_id: str, *, lease_seconds: float, cancel_grace_seconds: float, epoch: str
) -> Envelope:
    """The envelope of a step's task.

    Args:
        task: of the step.
        run_id: its run.
        lease_seconds, cancel_grace_seconds, epoch: see ``Envelope``.
    """
    payload = task.make_payload()
    return Envelope(
        task_id=task.task_id,
        name=TaskName.EXECUTE_PLAN,
        run_id=run_id,
        step_key=task.step_key,
        attempt=task.attempt,
        queue=task.queue,
        priority=task.priority,
        lease_seconds=lease_seconds,
        cancel_grace_seconds=cancel_grace_seconds,
        epoch=epoch,
        payload=json.dumps(payload),
        code_location=code_location(payload),
        limits=task.limits,
        job=task.job,
        trace=task.trace,
    )
