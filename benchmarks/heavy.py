"""A heavy code location: 300 assets, 20 jobs, seconds of work at import and hundreds of MB.

The weight stands for what large libraries and manifests cost at import: small objects, as modules
are made of, which a collection of garbage walks through, and computation.
"""

from __future__ import annotations

import hashlib
import os
import time
from typing import Any

from dagster import AssetKey, Definitions, define_asset_job, definitions

from benchmarks.assets import ASSET_COUNT, make_asset
from benchmarks.jobs import defined_jobs, executor

#: A factor for time and memory of the import, 1 by default, so that a test can make it light.
WEIGHT_VARIABLE = "DAGSTER_TASKIQ_BENCHMARK_WEIGHT"

#: CPU time of the import in seconds, and the memory that it keeps in bytes, at a weight of 1.
#: CPU time in place of an amount of work: the same share of a run on a fast and a slow machine.
CPU_SECONDS = 3.0
MEMORY_BYTES = 295_000_000
#: What one of ``_records`` takes, measured with Python 3.11.
_RECORD_BYTES = 411

#: Each job has one asset, so that a run of it is as small as a run can be.
JOB_COUNT = 20


def _records(count: int) -> list[dict[str, Any]]:
    return [{"name": f"record {i}", "values": [i, i + 1], "parent": None} for i in range(count)]


def _weigh(weight: float) -> list[dict[str, Any]]:
    """Spend the time of the import; what it returns is the memory."""
    end = time.thread_time() + weight * CPU_SECONDS
    kept = _records(round(weight * MEMORY_BYTES / _RECORD_BYTES))
    digest = b""
    while time.thread_time() < end:
        for _ in range(1000):
            digest = hashlib.sha256(digest).digest()
    return kept


#: Kept as long as the module is.
KEPT = _weigh(float(os.environ.get(WEIGHT_VARIABLE, "1")))


@definitions
def defs() -> Definitions:
    """The assets and their jobs, and the jobs that the environment names."""
    stride = ASSET_COUNT // JOB_COUNT
    return Definitions(
        assets=[make_asset(index) for index in range(ASSET_COUNT)],
        jobs=[
            *(
                define_asset_job(f"job_{index}", [AssetKey(f"asset_{index * stride}")])
                for index in range(JOB_COUNT)
            ),
            *defined_jobs(),
        ],
        executor=executor(),
    )
