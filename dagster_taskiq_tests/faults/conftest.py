"""The fixtures of the acceptance tests, whose harness these tests use."""

from __future__ import annotations

from dagster_taskiq_tests.acceptance.conftest import (
    nothing_left_running_by_a_module,
    nothing_left_running_by_a_test,
    pytest_runtest_makereport,
    stack,
)

__all__ = [
    "nothing_left_running_by_a_module",
    "nothing_left_running_by_a_test",
    "pytest_runtest_makereport",
    "stack",
]
