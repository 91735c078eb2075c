"""A task for tests that are about messages; ``dataclasses.replace`` makes another one of it."""

from __future__ import annotations

from dagster_taskiq.messages.envelope import Envelope, TaskName, step_task_id

#: The first attempt of a step of a run that nobody knows.
STEP_TASK = Envelope(
    task_id=step_task_id("run", "step", 1),
    name=TaskName.EXECUTE_PLAN,
    run_id="run",
    step_key="step",
    attempt=1,
    queue="dagster",
    priority=5,
    lease_seconds=30.0,
    cancel_grace_seconds=1.0,
    epoch="e",
    payload="{}",
)
