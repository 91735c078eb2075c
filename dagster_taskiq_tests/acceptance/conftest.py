"""Stacks as fixtures, and their logs in the report of a test that failed."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from dagster_taskiq_tests.acceptance.harness import (
    Stack,
    check_nothing_is_left,
    open_logs,
    open_stack,
    open_stacks,
)


@pytest.fixture(scope="module", autouse=True)
def nothing_left_running_by_a_module() -> Iterator[None]:
    """Fail a module's last test if its stacks have left a process."""
    yield
    check_nothing_is_left()


@pytest.fixture(autouse=True)
def nothing_left_running_by_a_test() -> Iterator[None]:
    """End the runs that a test leaves in a stack of its module."""
    yield
    for stack in open_stacks:
        stack.end_runs()


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """A stack of the test's own, on Redis, without a worker."""
    with open_stack("redis", tmp_path) as stack:
        yield stack


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The module's stack, on Redis, with a worker of two slots on the default queue."""
    with open_stack("redis", tmp_path_factory.mktemp("stack")) as stack:
        stack.worker().await_ready()
        yield stack


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what workers and runs have written, when a test failed."""
    report = yield
    if report.failed:
        for path in open_logs:
            text = path.read_text(errors="replace")
            report.sections.append((path.name, text[-8000:]))
    return report
