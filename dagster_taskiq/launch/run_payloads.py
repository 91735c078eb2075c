"""What of a whole run goes into its message: how its code is found, and Dagster's instance."""

from __future__ import annotations

import json
from typing import Any, cast

from dagster import DagsterInstance, DagsterRun

from dagster_taskiq._dagster.names import ExecuteRunArgs, pack_value
from dagster_taskiq._dagster.storage import is_own_instance
from dagster_taskiq.errors import UnloadableCodeError
from dagster_taskiq.execution.code_locations import RUN_ARGS_KEY, location_of


def payload_of(instance: DagsterInstance, run: DagsterRun) -> tuple[str, str]:
    """A run's payload, and its code location, as they stand in its envelope.

    Raises:
        UnloadableCodeError: the run does not say where its code is.
    """
    if run.job_code_origin is None:
        raise UnloadableCodeError(f"Run {run.run_id} does not say where its job's code is.")
    arguments = ExecuteRunArgs(
        job_origin=run.job_code_origin,
        run_id=run.run_id,
        instance_ref=None if is_own_instance(instance) else instance.get_ref(),
        set_exit_code_on_failure=True,
    )
    pointer = cast("Any", run.job_code_origin.repository_origin.code_pointer)
    return json.dumps({RUN_ARGS_KEY: pack_value(arguments)}), location_of(pack_value(pointer))
