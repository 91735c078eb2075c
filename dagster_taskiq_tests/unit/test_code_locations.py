"""A child executes the code of one location; which slot a task gets, and what that costs."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from dagster import DagsterInstance, DagsterRun, job
from dagster._core.code_pointer import (
    AutoloadDefsModuleCodePointer,
    CodePointer,
    PackageCodePointer,
)
from dagster._core.definitions.metadata.metadata_value import (
    CodeLocationReconstructionMetadataValue,
)
from dagster._core.definitions.reconstruct import ReconstructableJob, ReconstructableRepository
from dagster._core.definitions.repository_definition import RepositoryLoadData

from dagster_taskiq.execution import run_payloads
from dagster_taskiq.execution.code_locations import EXECUTABLE_KEY, code_location
from dagster_taskiq.execution.run_payloads import payload_of, payloads_of
from dagster_taskiq.worker.slot_pool import SlotPool


def location_of(pointer: CodePointer, job: str = "one") -> str:
    """Of a step of a job."""
    executable = ReconstructableJob(ReconstructableRepository(pointer), job).to_dict()
    return code_location({EXECUTABLE_KEY: executable})


def test_the_jobs_of_a_file_or_module_are_one_location() -> None:
    """Whatever names they are found by there."""
    for pointers in (
        [CodePointer.from_python_file("/code/a.py", name, "/code") for name in ("one", "two")],
        [CodePointer.from_module("a", name, "/code") for name in ("one", "two")],
        [PackageCodePointer("a", name, "/code") for name in ("one", "two")],
    ):
        assert len({location_of(it, job) for it in pointers for job in ("one", "two")}) == 1


def test_other_files_modules_and_directories_are_other_locations() -> None:
    """Each may find another module under the same name."""
    pointers = [
        CodePointer.from_python_file("/code/a.py", "defs", "/code"),
        CodePointer.from_python_file("/code/b.py", "defs", "/code"),
        CodePointer.from_python_file("/code/a.py", "defs", "/other"),
        CodePointer.from_python_file("/code/a.py", "defs", None),
        CodePointer.from_module("a", "defs", "/code"),
        CodePointer.from_module("a", "defs", "/other"),
        AutoloadDefsModuleCodePointer(module="a", working_directory="/code"),
    ]
    assert len({location_of(it) for it in pointers} - {""}) == len(pointers)


@pytest.mark.parametrize(
    "payload",
    [{}, {EXECUTABLE_KEY: None}, {EXECUTABLE_KEY: []}, {EXECUTABLE_KEY: {"repository": "x"}}],
)
def test_what_names_no_code_has_no_location(payload: dict[str, Any]) -> None:
    """That is nobody's error here: the child says what is wrong with its task."""
    assert code_location(payload) == ""


# --- definitions that were made of what an API has said ---


@job
def it() -> None: ...


POINTER = CodePointer.from_module(__name__, "it", None)


@pytest.fixture
def instance(monkeypatch: pytest.MonkeyPatch) -> Iterator[DagsterInstance]:
    monkeypatch.setattr(run_payloads, "is_own_instance", lambda _: True)
    with DagsterInstance.ephemeral() as instance:
        yield instance


def load_data(state: str) -> RepositoryLoadData:
    """What Dagster's code server has asked for."""
    value = CodeLocationReconstructionMetadataValue(state)
    return RepositoryLoadData(reconstruction_metadata={"b": value, "a": value})


def create(instance: DagsterInstance, data: RepositoryLoadData | None) -> DagsterRun:
    origin = ReconstructableJob(ReconstructableRepository(POINTER), "it").get_python_origin()
    return instance.create_run_for_job(it, job_code_origin=origin, repository_load_data=data)


def test_a_run_and_its_steps_have_one_location(instance: DagsterInstance) -> None:
    """Which is another one with what another code server has asked for, or with nothing."""
    locations = set()
    for data in (load_data("1"), load_data("2"), None):
        _, of_run = payload_of(instance, create(instance, data))
        repository = ReconstructableRepository(POINTER, repository_load_data=data)
        executable = ReconstructableJob(repository, "it").to_dict()
        assert code_location({EXECUTABLE_KEY: json.loads(json.dumps(executable))}) == of_run
        locations.add(of_run)
    assert len(locations) == 3


def test_the_plan_of_a_run_is_read_where_it_has_to_be(
    instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for a run without such data, and not again for another one with the same plan."""
    read: list[str] = []
    original = instance.get_execution_plan_snapshot

    def get(plan_id: str) -> Any:
        read.append(plan_id)
        return original(plan_id)

    plain = create(instance, None)
    state = load_data(uuid.uuid4().hex)
    stateful = [create(instance, state) for _ in range(2)]
    monkeypatch.setattr(instance, "get_execution_plan_snapshot", get)
    payload_of(instance, plain)
    assert not read
    first, second = [payload_of(instance, it)[1] for it in stateful]
    assert first == second
    assert len(read) == 1


def test_the_code_of_runs_is_found_by_their_ids(instance: DagsterInstance) -> None:
    """The state of the first one; not of a run that is gone, or that does not say."""
    runs = [create(instance, load_data(it)) for it in ("1", "2")]
    lost = instance.create_run_for_job(it)
    payload, location = payload_of(instance, runs[1])
    asked = ["no such run", lost.run_id, runs[1].run_id, runs[0].run_id]
    assert payloads_of(instance, asked) == {location: payload}
    assert payloads_of(instance, ["no such run"]) == {}


@pytest.mark.parametrize(
    ("idle", "taken"),
    [
        # the longest idle first, the last used last
        (["b", "a", "a", "b"], 2),  # the last used one of the location
        (["b", "", "", "c"], 2),  # else one whose child has executed nothing
        (["b", "c", "b"], 0),  # else the longest idle
    ],
)
def test_the_slot_that_costs_least_is_taken(idle: list[str], taken: int) -> None:
    """So that as many children as possible stay warm for their locations."""
    slots: Any = [SimpleNamespace(location=it) for it in idle]
    pool = SlotPool(slots[::-1], "steps")
    assert pool.take("a") is slots[taken]
    assert pool._idle == [it for it in slots if it is not slots[taken]]
