"""The short form of ``dagster_taskiq_tests/soak``: mixed jobs on workers while faults strike."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from dagster_taskiq_tests.soak.report import table
from dagster_taskiq_tests.soak.soak import soak

#: Repeats a soak that has failed: its table says with which seed.
SEED_VARIABLE = "DAGSTER_TASKIQ_TEST_SOAK_SEED"


@pytest.mark.timeout(600)
def test_a_short_soak(tmp_path: Path) -> None:
    """Every run ends, no attempt is executed twice, and nothing is left over."""
    seed = int(os.getenv(SEED_VARIABLE) or random.randrange(10**6))
    values = soak("redis", 12, seed, tmp_path, fault_seconds=2.0)
    assert values["good"], table(values)
