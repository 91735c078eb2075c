"""What a run's process and a child say to each other about a step, and what they leave out."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from dagster import (
    DagsterEventType,
    DagsterInstance,
    DagsterRunStatus,
    execute_job,
    reconstructable,
)
from hypothesis import given
from hypothesis import strategies as st

from dagster_taskiq._dagster.names import (
    ExecuteStepArgs,
    KnownExecutionState,
    RetryMode,
    deserialize_events,
    pack_value,
    unpack_value,
)
from dagster_taskiq._dagster.patches import execute_or_resume_run
from dagster_taskiq.defaults import BACKEND_URL_VARIABLE, BROKER_URL_VARIABLE
from dagster_taskiq.execution.code_locations import ARGS_KEY, EXECUTABLE_KEY
from dagster_taskiq.execution.step_messages import OUTCOME_ONLY_KEY, StepPayloads
from dagster_taskiq.execution.tasks import TaskRunner
from dagster_taskiq.messages.results import TaskResult
from dagster_taskiq_tests.unit import loop_jobs as jobs
from dagster_taskiq_tests.unit.loop_jobs import EAGER

#: Every way in which steps of these end: with outputs and without, skipped, retried, failed; with
#: checks and hooks.
JOBS = [
    jobs.diamond_job,
    jobs.skip_job,
    jobs.dynamic_job,
    jobs.retry_job,
    jobs.exhausted_job,
    jobs.resource_job,
    jobs.check_job,
    jobs.hook_job,
]

OF_OUTCOME = {
    DagsterEventType.STEP_OUTPUT,
    DagsterEventType.STEP_SUCCESS,
    DagsterEventType.STEP_FAILURE,
    DagsterEventType.STEP_UP_FOR_RETRY,
    DagsterEventType.RESOURCE_INIT_FAILURE,
}


@pytest.fixture(autouse=True)
def _no_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DAGSTER_HOME", BROKER_URL_VARIABLE, BACKEND_URL_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DagsterInstance]:
    """One for all, since making its databases takes longer than a run; each test has its run."""
    with DagsterInstance.local_temp(str(tmp_path_factory.mktemp("instance"))) as instance:
        yield instance


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> list[TaskResult]:
    """What the children return."""
    found: list[TaskResult] = []
    execute = TaskRunner.execute_plan

    def noted(self: TaskRunner, *arguments: Any) -> TaskResult:
        found.append(execute(self, *arguments))
        return found[-1]

    monkeypatch.setattr(TaskRunner, "execute_plan", noted)
    return found


def launched(job: Any, instance: DagsterInstance) -> str:
    """Execute a job in what is the process of a launched run to Dagster; the run's id."""
    known = reconstructable(job)
    run = instance.create_run_for_job(
        known.get_definition(), run_config=EAGER, job_code_origin=known.get_python_origin()
    )
    execute_or_resume_run(instance, run.run_id, is_resumed=False)
    return run.run_id


def story(instance: DagsterInstance, run_id: str) -> tuple[DagsterRunStatus, list[str]]:
    """How a run ended, and what its log says of its steps."""
    run = instance.get_run_by_id(run_id)
    assert run
    events = [it.dagster_event for it in instance.all_logs(run_id) if it.dagster_event]
    return run.status, [f"{it.step_key} {it.event_type_value}" for it in events if it.step_key]


def kinds(result: TaskResult) -> set[DagsterEventType]:
    return {event.event_type for event in deserialize_events(result.events)}


@pytest.mark.parametrize("job", JOBS, ids=lambda job: getattr(job, "__name__", "") or job.name)
def test_a_launched_run_is_the_same_by_outputs_and_ends_alone(
    job: Any, instance: DagsterInstance, results: list[TaskResult]
) -> None:
    """As one whose caller is given all events: the same in the log, to the same end."""
    all_told = execute_job(reconstructable(job), instance, EAGER, raise_on_error=False)
    assert any(kinds(result) - OF_OUTCOME for result in results)
    assert all(result.started_at is None for result in results), "older loops do not know it"
    results.clear()

    run_id = launched(job, instance)
    assert results
    assert all(kinds(result) <= OF_OUTCOME for result in results)
    assert all(result.started_at for result in results)
    assert story(instance, run_id) == story(instance, all_told.run_id)


def test_who_executes_a_job_gets_all_events_of_its_steps(instance: DagsterInstance) -> None:
    """``execute_job`` returns what the executor yields, so that has all that the log has."""
    result = execute_job(reconstructable(jobs.retry_job), instance, EAGER, raise_on_error=False)
    told = [f"{it.step_key} {it.event_type_value}" for it in result.all_events if it.step_key]
    assert (result.dagster_run.status, sorted(told)) == (
        DagsterRunStatus.SUCCESS,
        sorted(story(instance, result.run_id)[1]),
    )


def test_who_executes_a_job_in_a_launched_run_gets_all_events_of_its_steps(
    instance: DagsterInstance, results: list[TaskResult]
) -> None:
    """In a step and in a hook, while the launched run itself hears only of outputs and ends."""
    run_id = launched(jobs.nesting_job, instance)
    status, told = story(instance, run_id)
    assert status is DagsterRunStatus.SUCCESS
    assert "nests HOOK_COMPLETED" in told
    *nested, own = results
    assert len(nested) == 6
    assert all(kinds(result) - OF_OUTCOME for result in nested)
    assert kinds(own) <= OF_OUTCOME


def test_a_launched_run_understands_a_worker_that_returns_all(
    instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch, results: list[TaskResult]
) -> None:
    """One of an older version, which does not know that the payload asks for less."""
    noted = TaskRunner.execute_plan

    def older(self: TaskRunner, payload: Any, *arguments: Any) -> TaskResult:
        assert payload[OUTCOME_ONLY_KEY]
        known = {key: it for key, it in payload.items() if key != OUTCOME_ONLY_KEY}
        return noted(self, known, *arguments)

    monkeypatch.setattr(TaskRunner, "execute_plan", older)
    run_id = launched(jobs.diamond_job, instance)
    assert story(instance, run_id)[0] is DagsterRunStatus.SUCCESS
    assert all(kinds(result) - OF_OUTCOME for result in results)


@given(st.text(min_size=1), st.integers(0, 9), st.sampled_from(RetryMode))
def test_a_payload_is_what_dagster_packs_for_one_step(
    instance: DagsterInstance, key: str, attempts: int, mode: RetryMode
) -> None:
    """Though all but step and state is packed once for the run."""
    job = reconstructable(jobs.diamond_job)
    context = SimpleNamespace(
        reconstructable_job=job,
        run_id="run",
        instance=instance,
        executor=SimpleNamespace(retries=mode),
    )
    state = KnownExecutionState(previous_retry_attempts={key: attempts} if attempts else {})
    payloads = StepPayloads(cast("Any", context))
    payloads.of(cast("Any", SimpleNamespace(key="former")), KnownExecutionState({"former": 3}))
    args = ExecuteStepArgs(
        job_origin=job.get_python_origin(),
        run_id="run",
        step_keys_to_execute=[key],
        instance_ref=instance.get_ref(),
        retry_mode=mode.for_inner_plan(),
        known_state=state,
        print_serialized_events=False,
    )
    payload = payloads.of(cast("Any", SimpleNamespace(key=key)), state)
    assert payload == {ARGS_KEY: pack_value(args), EXECUTABLE_KEY: job.to_dict()}
    assert unpack_value(payload[ARGS_KEY], as_type=ExecuteStepArgs) == args
