"""``task_always_eager`` runs whole jobs in the calling process, through the workers' task code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
from dagster import (
    DagsterEventType,
    DagsterInstance,
    JobExecutionResult,
    ReexecutionOptions,
    execute_job,
    reconstructable,
)
from dagster._core.errors import DagsterUnmetExecutorRequirementsError

from dagster_taskiq._dagster.names import ExecutionPlan
from dagster_taskiq.defaults import BACKEND_URL_VARIABLE, BROKER_URL_VARIABLE
from dagster_taskiq.errors import ConfigError
from dagster_taskiq.execution import tasks
from dagster_taskiq.execution.tasks import TaskRunner
from dagster_taskiq.loop.core_execution_loop import _check_outputs_are_shared
from dagster_taskiq_tests.unit import loop_jobs as jobs

EAGER = {"config_source": {"task_always_eager": True}}


@pytest.fixture(autouse=True)
def _no_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DAGSTER_HOME", BROKER_URL_VARIABLE, BACKEND_URL_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DagsterInstance]:
    """One for all, since making its databases takes longer than a run; each test has its run."""
    with DagsterInstance.local_temp(str(tmp_path_factory.mktemp("instance"))) as instance:
        yield instance


@contextmanager
def ran(
    job: Any,
    instance: DagsterInstance,
    ops: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    **options: Any,
) -> Iterator[JobExecutionResult]:
    run_config = {"execution": {"config": {**EAGER, **(config or {})}}, "ops": ops or {}}
    with execute_job(
        reconstructable(job), instance, run_config=run_config, raise_on_error=False, **options
    ) as result:
        yield result


def steps(result: JobExecutionResult, kind: DagsterEventType) -> list[str]:
    """The steps with such an event, in their order."""
    return [str(e.step_key) for e in result.all_events if e.event_type is kind]


SUCCESS = DagsterEventType.STEP_SUCCESS


def test_a_job_runs_without_any_server(instance: DagsterInstance) -> None:
    """Through the same task code, whose events say where the steps ran."""
    with ran(jobs.diamond_job, instance) as result:
        assert result.success
        assert result.output_for_node("total") == 4
        messages = [str(event.message) for event in result.all_events]
        assert sum("on worker eager@" in message for message in messages) == 4
        assert sum("Sending step" in message for message in messages) == 4


def test_steps_go_through_the_workers_task(
    instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its arguments are the message's payload, and nothing else."""
    payloads = []
    execute_plan = TaskRunner.execute_plan

    def note(runner: TaskRunner, payload: Any, place: Any, arrival: Any) -> Any:
        payloads.append(payload)
        return execute_plan(runner, payload, place, arrival)

    monkeypatch.setattr(TaskRunner, "execute_plan", note)
    with ran(jobs.single_job, instance) as result:
        assert result.success
    assert [set(payload) for payload in payloads] == [{tasks.ARGS_KEY, tasks.EXECUTABLE_KEY}]


def test_dynamic_steps_are_mapped_and_collected(instance: DagsterInstance) -> None:
    """Also over no outputs at all."""
    with ran(jobs.dynamic_job, instance) as result:
        assert result.success
        assert result.output_for_node("total") == 1 + 2 + 3 + 4
        assert result.output_for_node("total_of_none") == 0


def test_skipped_outputs_skip_what_needs_them(instance: DagsterInstance) -> None:
    """A fan-in takes what is there, a chain is skipped to its end."""
    with ran(jobs.skip_job, instance) as result:
        assert result.success
        assert result.output_for_node("total") == 6
        skipped = steps(result, DagsterEventType.STEP_SKIPPED)
        assert sorted(skipped) == ["after_skipped", "skipped", "skipped_too"]


def test_retries_with_their_delay(instance: DagsterInstance) -> None:
    """A policy with a delay and an op that asks for a retry; each sees its attempt's number."""
    with ran(jobs.retry_job, instance) as result:
        assert result.success
        assert result.output_for_node("total") == 3
        up_for_retry = steps(result, DagsterEventType.STEP_UP_FOR_RETRY)
        assert sorted(up_for_retry) == ["asks_for_retry", "third_time", "third_time"]
        restarted = steps(result, DagsterEventType.STEP_RESTARTED)
        assert sorted(restarted) == sorted(up_for_retry)


def test_exhausted_retries_fail_the_run(instance: DagsterInstance) -> None:
    """The rest of the job has run."""
    with ran(jobs.exhausted_job, instance) as result:
        assert not result.success
        assert steps(result, DagsterEventType.STEP_UP_FOR_RETRY) == ["never"]
        assert steps(result, DagsterEventType.STEP_FAILURE) == ["never"]
        assert steps(result, SUCCESS) == ["one"]


def test_disabled_retries(instance: DagsterInstance) -> None:
    """``retries: disabled`` counts here too."""
    with ran(jobs.exhausted_job, instance, config={"retries": {"disabled": {}}}) as result:
        assert steps(result, DagsterEventType.STEP_UP_FOR_RETRY) == []
        assert steps(result, DagsterEventType.STEP_FAILURE) == ["never"]


def test_a_failing_step_fails_the_run(instance: DagsterInstance) -> None:
    """With the op's own error; what depends on it does not run, the rest does."""
    with ran(jobs.failing_job, instance, {"may_fail": {"config": {"fails": True}}}) as result:
        assert not result.success
        assert sorted(steps(result, SUCCESS)) == ["one", "two"]
        assert "as configured" in str(result.failure_data_for_node("may_fail"))
        assert steps(result, DagsterEventType.STEP_START).count("total") == 0


def test_reexecution_from_failure(instance: DagsterInstance) -> None:
    """Only what failed and what needs it runs; the rest is loaded from the first run."""
    with ran(jobs.failing_job, instance, {"may_fail": {"config": {"fails": True}}}) as first:
        run_id = first.run_id
    options = ReexecutionOptions.from_failure(run_id, instance)
    with ran(
        jobs.failing_job,
        instance,
        {"may_fail": {"config": {"fails": False}}},
        reexecution_options=options,
    ) as second:
        assert second.success
        assert steps(second, SUCCESS) == ["may_fail", "total"]
        assert second.output_for_node("total") == 13


def test_op_selection(instance: DagsterInstance) -> None:
    """The selected steps alone."""
    with ran(jobs.chain_job, instance, op_selection=["one", "add_one"]) as result:
        assert result.success
        assert steps(result, SUCCESS) == ["one", "add_one"]


def test_a_resource_that_cannot_be_made_fails_the_step(instance: DagsterInstance) -> None:
    """With the resource's error, not with a silence about the step's end."""
    # not entered: the result would make the resources of the job
    result = execute_job(
        reconstructable(jobs.resource_job),
        instance,
        run_config={"execution": {"config": EAGER}},
        raise_on_error=False,
    )
    assert not result.success
    assert steps(result, DagsterEventType.STEP_FAILURE) == ["needs_database"]
    assert "no such database" in str(result.failure_data_for_node("needs_database"))


def test_assets_with_partitions_and_checks(instance: DagsterInstance) -> None:
    """Both assets are materialized for the partition, and the check is evaluated."""
    with ran(jobs.asset_job, instance, tags={"dagster/partition": "2024-01-05"}) as result:
        assert result.success
        assert steps(result, DagsterEventType.LOADED_INPUT) == ["downstream_asset"]
        materialized = [
            event.materialization
            for event in result.all_events
            if event.event_type is DagsterEventType.ASSET_MATERIALIZATION
        ]
        assert {m.partition for m in materialized} == {"2024-01-05"}
        (check,) = result.get_asset_check_evaluations()
        assert check.passed


def test_steps_run_in_the_order_of_their_priority(instance: DagsterInstance) -> None:
    """Where several are ready, the highest first."""
    with ran(jobs.priority_job, instance) as result:
        assert steps(result, SUCCESS) == ["urgent", "mistaken", "unhurried"]


def test_values_in_memory_are_refused(instance: DagsterInstance) -> None:
    """As in dagster-celery, before the run exists, with a text that says what to use instead."""
    before = instance.get_runs_count()
    with pytest.raises(DagsterUnmetExecutorRequirementsError, match="persistent IO manager"):
        ran(jobs.memory_job, instance).__enter__()
    assert instance.get_runs_count() == before


def test_a_plan_with_values_in_memory_is_refused_by_the_loop_too() -> None:
    """Where a run was made without that check."""
    plan = cast("ExecutionPlan", SimpleNamespace(artifacts_persisted=False))
    with pytest.raises(ConfigError, match="IO manager"):
        _check_outputs_are_shared(plan)


def test_a_job_without_steps(instance: DagsterInstance) -> None:
    """It ends at once."""
    with ran(jobs.empty_job, instance) as result:
        assert result.success


def test_a_step_does_not_start_in_a_run_that_is_over(
    instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A late message of a finished run is refused with the reason."""
    payloads = []
    execute_plan = TaskRunner.execute_plan

    def note(runner: TaskRunner, payload: Any, place: Any, arrival: Any) -> Any:
        payloads.append((payload, place, arrival))
        return execute_plan(runner, payload, place, arrival)

    monkeypatch.setattr(TaskRunner, "execute_plan", note)
    with ran(jobs.single_job, instance) as result:
        before = len(result.all_events)
        late = execute_plan(TaskRunner(), *payloads[0])
        assert late.events == ()
        assert "SUCCESS" in late.reason
        assert len(instance.all_logs(result.run_id)) >= before
        assert steps(result, SUCCESS) == ["one"]
