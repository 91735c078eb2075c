"""What a run's process makes of a run that was cancelled meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from dagster import DagsterEventType, DagsterInstance, DagsterRun, DagsterRunStatus
from dagster._core.definitions.reconstruct import ReconstructableJob

from dagster_taskiq._dagster.patches import execute_or_resume_run
from dagster_taskiq_tests.acceptance import jobs


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[DagsterInstance]:
    with DagsterInstance.local_temp(str(tmp_path)) as instance:
        yield instance


def starting_run(instance: DagsterInstance) -> DagsterRun:
    """A run whose process has found it waiting to be started."""
    return instance.create_run_for_job(
        jobs.simple,
        run_config={"execution": {"config": {"config_source": {"task_always_eager": True}}}},
        status=DagsterRunStatus.STARTING,
        job_code_origin=ReconstructableJob.for_module(jobs.__name__, "simple").get_python_origin(),
    )


def status_of(instance: DagsterInstance, run: DagsterRun) -> DagsterRunStatus:
    found = instance.get_run_by_id(run.run_id)
    assert found is not None
    return found.status


@pytest.mark.parametrize("is_resumed", [False, True])
def test_a_run_that_is_cancelled_while_its_code_loads(
    instance: DagsterInstance, is_resumed: bool
) -> None:
    """It is CANCELED, not a failure of the framework, and none of its steps starts."""
    run = starting_run(instance)
    instance.report_run_canceling(run)
    assert execute_or_resume_run(instance, run.run_id, is_resumed=is_resumed) == 0
    assert status_of(instance, run) is DagsterRunStatus.CANCELED
    messages = [entry.message for entry in instance.all_logs(run.run_id)]
    assert any("cancelled before its process had begun with it" in text for text in messages)


@pytest.mark.parametrize("is_resumed", [False, True])
def test_a_run_that_nobody_has_cancelled(instance: DagsterInstance, is_resumed: bool) -> None:
    """Is executed as ever, also after one that was."""
    for _ in range(2):
        run = starting_run(instance)
        assert execute_or_resume_run(instance, run.run_id, is_resumed=is_resumed) == 0
        assert status_of(instance, run) is DagsterRunStatus.SUCCESS


def test_when_a_run_has_begun(instance: DagsterInstance) -> None:
    """As soon as its start is in the log, before its first step; a cancelled one never has."""
    seen: list[tuple[DagsterRunStatus, int]] = []

    def note() -> None:
        starts = instance.all_logs(run.run_id, of_type=DagsterEventType.STEP_START)
        seen.append((status_of(instance, run), len(starts)))

    run = starting_run(instance)
    instance.report_run_canceling(run)
    execute_or_resume_run(instance, run.run_id, is_resumed=False, on_run_start_logged=note)
    assert seen == []
    run = starting_run(instance)
    execute_or_resume_run(instance, run.run_id, is_resumed=False, on_run_start_logged=note)
    assert seen == [(DagsterRunStatus.STARTED, 0)]
