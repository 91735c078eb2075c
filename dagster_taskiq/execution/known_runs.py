"""The run that a task belongs to, as Dagster's instance has it, and whether the task may begin.

A step's run is read at most once in `AGE_SECONDS`, since to read it takes a tenth of a short step's
time. What else ends steps is seen sooner: a claim is refused where the run is cancelled or its loop
is gone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from dagster import DagsterInstance, DagsterRun

from dagster_taskiq._dagster.names import DagsterRunStatus
from dagster_taskiq.errors import TaskRefusedError, WrongInstanceError
from dagster_taskiq.messages.envelope import TaskName

#: How old may be what is known of a step's run, its status and tags.
AGE_SECONDS = 1.0


class LiveRuns:
    """The runs that this process has executed steps of within the last second.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._found: dict[str, tuple[float, DagsterRun]] = {}

    def find(self, instance: DagsterInstance, run_id: str) -> DagsterRun:
        """The run of a step that is to begin.

        Args:
            instance: always the same one.

        Raises:
            WrongInstanceError: there is none.
            TaskRefusedError: it is finished or being cancelled.
        """
        now = self._clock()
        self._found = {key: it for key, it in self._found.items() if now - it[0] < AGE_SECONDS}
        if run_id not in self._found:
            # aged from before it was read
            self._found[run_id] = (now, _live_run(instance, run_id))
        return self._found[run_id][1]


def startable_run(instance: DagsterInstance, run_id: str, name: TaskName) -> DagsterRun:
    """The run, if it still waits to be started (or resumed): much can happen in a queue.

    Raises:
        WrongInstanceError: there is none.
        TaskRefusedError: it does not.
    """
    run = _known_run(instance, run_id)
    waiting = (
        (DagsterRunStatus.STARTING, DagsterRunStatus.STARTED)
        if name is TaskName.RESUME_JOB
        else (DagsterRunStatus.STARTING,)
    )
    if run.status not in waiting:
        raise TaskRefusedError(f"Run {run_id} is {run.status.value}: it is not started any more.")
    return run


def _known_run(instance: DagsterInstance, run_id: str) -> DagsterRun:
    run = instance.get_run_by_id(run_id)
    if run is None:
        raise WrongInstanceError(
            f"Run {run_id} is not in this worker's Dagster instance ({_describe(instance)}): the "
            "worker needs the same dagster.yaml and storage as the run."
        )
    return run


def _live_run(instance: DagsterInstance, run_id: str) -> DagsterRun:
    run = _known_run(instance, run_id)
    if run.is_finished or run.status is DagsterRunStatus.CANCELING:
        raise TaskRefusedError(f"Run {run_id} is {run.status.value}: its steps do not start.")
    return run


def _describe(instance: DagsterInstance) -> str:
    home = os.getenv("DAGSTER_HOME")
    return f"DAGSTER_HOME={home}" if home else type(instance.run_storage).__name__
