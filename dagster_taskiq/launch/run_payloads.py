"""What of a whole run goes into its message: how its code is found, and Dagster's instance."""

from __future__ import annotations

import json
from typing import Any, cast

from dagster import DagsterInstance, DagsterRun

from dagster_taskiq._dagster.names import ExecuteRunArgs, pack_value
from dagster_taskiq._dagster.storage import is_own_instance
from dagster_taskiq.errors import UnloadableCodeError
from dagster_taskiq.execution.code_locations import RUN_ARGS_KEY, digest_of, location_of
from dagster_taskiq.execution.known_runs import load_data_of

#: Plans whose digests are kept, each of some hundred bytes.
_KEPT_DIGESTS = 1024

#: The digests of the load data of plans, by the ids of their snapshots, which are digests, too.
_digests: dict[str, str] = {}


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
    location = location_of(pack_value(pointer), _load_data_digest(instance, run))
    return json.dumps({RUN_ARGS_KEY: pack_value(arguments)}), location


def _load_data_digest(instance: DagsterInstance, run: DagsterRun) -> str:
    """Of what the run's definitions were made of; empty for nothing.

    To have it the run's whole plan is read. Newer releases of Dagster keep something of every code
    location in a workspace, its name, so each launch would do that.
    """
    plan_id = run.execution_plan_snapshot_id
    if not run.has_repository_load_data or plan_id is None:
        return ""
    digest = _digests.get(plan_id)
    if digest is None:
        digest = digest_of(pack_value(load_data_of(instance, run)))
        if len(_digests) >= _KEPT_DIGESTS:
            _digests.clear()
        _digests[plan_id] = digest
    return digest
