"""The process of a run: ``python -m dagster_taskiq_tests.acceptance.run_process FILE``.

It executes one of the jobs under test as the file says that ``Order.write`` has written.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dagster import DagsterInstance, ReexecutionOptions, execute_job
from dagster._core.definitions.reconstruct import ReconstructableJob, ReconstructableRepository

_HERE = "dagster_taskiq_tests.acceptance"

#: The jobs of assets, which only their repository knows.
ASSET_JOBS = frozenset({"partitioned", "checked", "blocked", "multi"})


@dataclass(frozen=True)
class Order:
    """What to execute.

    Attributes:
        job: name of one of ``jobs`` or ``asset_jobs``, or ``module:name``.
        arguments: of ``execute_job``.
        retry_of: the id of a run to execute again from its failure.
        module_path: where else to find modules.
    """

    job: str
    arguments: Mapping[str, Any]
    retry_of: str | None
    module_path: str | None

    def write(self, path: Path) -> None:
        """Into a file, for the process."""
        path.write_bytes(pickle.dumps(self))


def main(path: Path) -> None:
    order = pickle.loads(path.read_bytes())
    if order.module_path:
        sys.path.append(order.module_path)  # Dagster takes the first one for the script's
    options = ReexecutionOptions.from_failure if order.retry_of else None
    with DagsterInstance.get() as instance:
        execute_job(
            _reconstructable(order.job),
            instance=instance,
            reexecution_options=options and options(order.retry_of, instance),
            **order.arguments,
        )


def _reconstructable(job: str) -> ReconstructableJob:
    if ":" in job:
        return ReconstructableJob.for_module(*job.split(":"))
    if job in ASSET_JOBS:
        repository = ReconstructableRepository.for_module(f"{_HERE}.asset_jobs", "defs")
        return repository.get_reconstructable_job(job)
    return ReconstructableJob.for_module(f"{_HERE}.jobs", job)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
