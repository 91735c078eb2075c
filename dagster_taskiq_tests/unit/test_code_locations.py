"""A child executes the code of one location; which slot a task gets, and what that costs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from dagster._core.code_pointer import (
    AutoloadDefsModuleCodePointer,
    CodePointer,
    PackageCodePointer,
)
from dagster._core.definitions.reconstruct import ReconstructableJob, ReconstructableRepository

from dagster_taskiq.execution.code_locations import EXECUTABLE_KEY, code_location
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
