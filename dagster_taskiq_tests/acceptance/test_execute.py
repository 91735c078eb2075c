"""Everything that a run can contain works on workers, as it does in Dagster's own executors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dagster import AssetKey, DagsterEventType, DagsterRunStatus

from dagster_taskiq_tests.acceptance.harness import (
    BROKERS,
    PAIRS,
    Run,
    Stack,
    open_stack,
    story_in_process,
)

SUCCESS = DagsterEventType.STEP_SUCCESS
FAILURE = DagsterEventType.STEP_FAILURE
SKIPPED = DagsterEventType.STEP_SKIPPED

SPREAD_3 = {"spread": {"config": {"count": 3}}}
SPREAD_0 = {"spread": {"config": {"count": 0}}}


# --- on every broker ----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=(*BROKERS, *PAIRS))
def any_stack(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    """A stack on each broker in turn, with one worker."""
    with open_stack(request.param, tmp_path_factory.mktemp("stack")) as stack:
        stack.worker().await_ready()
        yield stack


@pytest.mark.parametrize(
    ("job", "ops", "step", "value"),
    [
        ("parallel", {}, "total", 40),
        ("dynamic", SPREAD_3, "total", 0 + 1 + 2 + 3 * 2),
        ("fan_in_with_skip", {}, "total", 2),
    ],
)
def test_values_arrive_on_every_broker(
    any_stack: Stack, job: str, ops: dict[str, Any], step: str, value: int
) -> None:
    """A job's shape does not depend on the broker: each step gets what those before it made."""
    run = any_stack.run(job, ops=ops)
    assert run.is_success
    assert run.output(step) == value
    assert run.story() == story_in_process(job, run_config={"ops": ops})


def test_a_failure_and_its_repair_on_every_broker(any_stack: Stack) -> None:
    """A failed step fails the run, and a re-execution from failure runs what is left."""
    repaired = any_stack.directory / "repaired"
    failed = any_stack.run("repairable")
    assert failed.status is DagsterRunStatus.FAILURE
    repaired.touch()
    again = any_stack.run("repairable", retry_of=failed)
    repaired.unlink()
    assert again.is_success
    assert again.steps(SUCCESS) == ["flaky_once", "after"]


def test_a_retry_on_every_broker(any_stack: Stack) -> None:
    """A retry is another task, so it is not taken for the first one's second copy."""
    run = any_stack.run("retried", ops={"fails_at_first": {"config": {"failures": 2}}})
    assert run.is_success
    assert run.output("fails_at_first") == 3


def test_a_dead_child_on_every_broker(any_stack: Stack) -> None:
    """A step whose process dies is a failed step at once, and its worker goes on."""
    run = any_stack.run("deaths")
    assert run.status is DagsterRunStatus.FAILURE
    assert set(run.steps(FAILURE)) == {"exits", "segfaults", "kills_itself"}
    assert "add_one" in run.steps(SUCCESS)


# --- the broad list, on one broker --------------------------------------------------------------


def check_like_in_process(stack: Stack, job: str, **arguments: Any) -> Run:
    """Run a job on the worker; each step's events must be those of the in-process executor."""
    run = stack.run(job, **arguments)
    given = {key: arguments[key] for key in ("op_selection", "asset_selection") if key in arguments}
    config = {key: arguments[key] for key in ("ops", "resources") if key in arguments}
    if "tags" in arguments:
        given["partition_key"] = arguments["tags"]["dagster/partition"]
    assert run.story() == story_in_process(job, run_config=config, **given)
    return run


@pytest.mark.parametrize(
    ("job", "ops", "step", "value"),
    [
        ("simple", {}, "one", 1),
        ("diamond", {}, "plus", 4),
        ("serial", {}, "add_3", 5),
        ("composite", {}, "add_four.outer_second.second", 5),
        ("optional_outputs", {}, "after_taken", 2),
        ("dynamic", SPREAD_0, "total", 0),
    ],
)
def test_shapes(shared: Stack, job: str, ops: dict[str, Any], step: str, value: int) -> None:
    """Every shape of a job gives what the in-process executor gives."""
    run = check_like_in_process(shared, job, ops=ops)
    assert run.is_success
    assert run.output(step) == value


def test_skipped_steps(shared: Stack) -> None:
    """What hangs on an output that was not made is skipped, and what hangs on that."""
    run = shared.run("optional_outputs")
    assert run.is_success
    assert run.steps(SKIPPED) == ["after_left", "after_after_left"]


def test_one_step_of_a_dynamic_map(shared: Stack) -> None:
    """The steps of a map have the keys that Dagster gives them."""
    run = shared.run("dynamic", ops=SPREAD_3)
    assert {f"add_one[n{number}]" for number in range(3)} <= set(run.steps(SUCCESS))


def test_op_selection(shared: Stack) -> None:
    """Only the selected ops run."""
    run = check_like_in_process(shared, "serial", op_selection=["one", "add_0", "add_1"])
    assert run.is_success
    assert run.steps(SUCCESS) == ["one", "add_0", "add_1"]


def test_config_and_tags(shared: Stack) -> None:
    """An op on a worker sees its config and the tags of its run."""
    run = shared.run("configured", ops={"greet": {"config": {"greeting": "hello"}}})
    assert run.is_success
    assert run.output("greet") == "hello {'team/name': 'data'}"


def test_empty_job(stack: Stack) -> None:
    """A job without steps ends at once, and needs neither broker nor worker for that."""
    run = stack.run("empty", broker="redis://127.0.0.1:1/0")
    assert run.is_success


def test_in_memory_values_are_refused(stack: Stack) -> None:
    """An IO manager that keeps values in memory cannot serve steps in several processes."""
    run = stack.run("in_memory")
    assert run.process.poll() == 1
    assert "Please use a persistent IO manager" in run.output_of_process


def test_eager(stack: Stack) -> None:
    """``task_always_eager`` runs the steps in the run's process, without any server."""
    source = {"task_always_eager": True}
    run = stack.run("diamond", broker="redis://127.0.0.1:1/0", config_source=source)
    assert run.is_success
    assert run.story() == story_in_process("diamond")
    assert {note.pid for note in run.notes("ran")} == {run.process.pid}


def test_resources_are_torn_down_in_the_worker(shared: Stack) -> None:
    """A resource is opened and closed in the process of each step, also when the step fails."""
    before = len(shared.lines("resource-trace"))
    config = {"traced": {"config": {"fails": False}}}
    run = shared.run("with_resource", resources=config)
    assert run.kinds("use_resource")[-1] == "SUCCESS"
    assert run.kinds("fail_with_resource")[-1] == "FAILURE"
    lines = shared.lines("resource-trace")[before:]
    assert sorted(line["kind"] for line in lines) == ["closed"] * 2 + ["opened"] * 2
    (note,) = run.notes("ran")
    assert {"kind": "closed", "pid": note.pid} in lines
    assert run.process.pid not in {line["pid"] for line in lines}


def test_a_broken_resource(shared: Stack) -> None:
    """A resource that cannot be opened fails the step with the resource's own error."""
    config = {"traced": {"config": {"fails": True}}}
    run = shared.run("with_resource", resources=config)
    assert run.status is DagsterRunStatus.FAILURE
    assert run.kinds("use_resource")[-1] == "FAILURE"
    assert "the resource is broken" in run.failure("use_resource")


def test_hooks_run_in_the_worker(shared: Stack) -> None:
    """Success and failure hooks run, where the step ran."""
    run = shared.run("with_hooks")
    hooks = {note.kind: note for note in run.notes()}
    assert {kind: note.step for kind, note in hooks.items()} == {
        "success hook": "one",
        "failure hook": "fail",
    }
    assert run.process.pid not in {note.pid for note in hooks.values()}
    assert sorted(run.steps(DagsterEventType.HOOK_COMPLETED)) == ["fail", "one"]


# --- assets -------------------------------------------------------------------------------------


def materialized(run: Run) -> list[str]:
    """Keys of the assets that a run has materialized."""
    events = run.events(DagsterEventType.ASSET_MATERIALIZATION)
    return [event.asset_key.to_user_string() for event in events if event.asset_key]


def test_partitioned_assets(shared: Stack) -> None:
    """A partition's run makes that partition of each asset, out of that of its upstream."""
    run = check_like_in_process(shared, "partitioned", tags={"dagster/partition": "tuesday"})
    assert run.is_success
    events = run.events(DagsterEventType.ASSET_MATERIALIZATION)
    assert [event.partition for event in events] == ["tuesday", "tuesday"]
    known = shared.instance.get_materialized_partitions(AssetKey("report"))
    assert known == {"tuesday"}


def test_asset_checks(shared: Stack) -> None:
    """A blocking check that passes lets its downstream run; a failed one of the other kind too."""
    run = check_like_in_process(shared, "checked")
    assert run.is_success
    assert materialized(run) == ["source", "derived"]
    results = {
        event.asset_check_evaluation_data.check_name: event.asset_check_evaluation_data.passed
        for event in run.events(DagsterEventType.ASSET_CHECK_EVALUATION)
    }
    assert results == {"source_is_small": True, "derived_is_negative": False}


def test_blocking_asset_check(shared: Stack) -> None:
    """A blocking check that fails fails the run, and its asset's downstream does not run."""
    run = check_like_in_process(shared, "blocked")
    assert run.status is DagsterRunStatus.FAILURE
    assert materialized(run) == ["wrong"]


def test_multi_asset(shared: Stack) -> None:
    """One step can make several assets."""
    run = check_like_in_process(shared, "multi")
    assert run.is_success
    assert sorted(materialized(run)) == ["after_second", "first", "second"]


def test_asset_selection(shared: Stack) -> None:
    """A subset of a multi-asset makes only what was selected."""
    run = check_like_in_process(shared, "multi", asset_selection=[AssetKey("second")])
    assert run.is_success
    assert materialized(run) == ["second"]


def test_the_same_worker_serves_every_run(shared: Stack, tmp_path: Path) -> None:
    """Runs one after the other share a worker's warm processes."""
    pids = {note.pid for _ in range(2) for note in shared.run("serial").notes("ran")}
    assert len(pids) <= 2
