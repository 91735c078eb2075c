"""A code location of many assets, which notes each time that somebody builds its definitions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dagster import AssetKey, AssetsDefinition, Definitions, asset, define_asset_job, definitions

from benchmarks.jobs import executor

#: The file that gets a line with the process's id for each build of the definitions.
LOADS_VARIABLE = "DAGSTER_TASKIQ_BENCHMARK_LOADS"

ASSET_COUNT = 300

#: How many assets each of the jobs has, from either end.
JOB_ASSETS = 5


def make_asset(index: int) -> AssetsDefinition:
    """One that needs the one before it, ten in a row."""
    upstream = [AssetKey(f"asset_{index - 1}")] if index % 10 else []

    @asset(name=f"asset_{index}", deps=upstream)
    def made() -> Any:
        return index

    return made


def _note() -> None:
    if path := os.environ.get(LOADS_VARIABLE):
        with Path(path).open("a", encoding="utf8") as file:
            file.write(f"{os.getpid()}\n")


@definitions
def defs() -> Definitions:
    """Built anew for each load of the code location, as in projects that Dagster scaffolds."""
    _note()
    ends = {"head": range(JOB_ASSETS), "tail": range(ASSET_COUNT - JOB_ASSETS, ASSET_COUNT)}
    return Definitions(
        assets=[make_asset(index) for index in range(ASSET_COUNT)],
        jobs=[
            define_asset_job(name, [AssetKey(f"asset_{index}") for index in ends[name]])
            for name in ends
        ],
        executor=executor(),
    )
