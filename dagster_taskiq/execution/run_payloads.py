"""What of a whole run goes into its message: how its code is found, and Dagster's instance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

from dagster import DagsterInstance, DagsterRun, RunsFilter

from dagster_taskiq._dagster.names import ExecuteRunArgs, JobPythonOrigin, pack_value
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
    location = location_of(_pointer_to(run.job_code_origin), _load_data_digest(instance, run))
    return json.dumps({RUN_ARGS_KEY: pack_value(arguments)}), location


def payloads_of(instance: DagsterInstance, run_ids: Sequence[str]) -> dict[str, str]:
    """The code locations of runs, with a payload of each.

    Of a location with several states it is that of the first run in the given order. Runs that
    were deleted, or do not say where their code is, are left out.
    """
    runs = {run.run_id: run for run in instance.get_runs(RunsFilter(run_ids=list(run_ids)))}
    payloads: dict[str, str] = {}
    known: set[str] = set()
    for run in (runs[run_id] for run_id in run_ids if run_id in runs):
        if run.job_code_origin is None:
            continue
        of_any_state = location_of(_pointer_to(run.job_code_origin))
        if of_any_state not in known:
            known.add(of_any_state)
            payload, location = payload_of(instance, run)
            payloads[location] = payload
    return payloads


def _pointer_to(origin: JobPythonOrigin) -> Any:
    """Dagster's pointer to the code of a job, packed."""
    return pack_value(cast("Any", origin.repository_origin.code_pointer))


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
