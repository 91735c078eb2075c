"""The process of a run, or the one that launches many: ``python -m benchmarks.driver``.

It is told what to do by a JSON object as its argument, and writes the runs' ids, and when it
began to launch them, as JSON to the file that this names.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, cast

from dagster import DagsterInstance, execute_job
from dagster._core.definitions.reconstruct import ReconstructableJob, ReconstructableRepository


def main(order: dict[str, Any]) -> None:
    """Execute a job in this process, or launch runs of it."""
    repository = ReconstructableRepository.for_module(order["module"], "defs")
    job = repository.get_reconstructable_job(order["job"])
    with DagsterInstance.get() as instance:
        if order["launches"]:
            done = _launch(instance, job, order["run_config"], order["launches"])
        else:
            with execute_job(job, instance, order["run_config"]) as result:
                done = {"run_ids": [result.run_id]}
    Path(order["result"]).write_text(json.dumps(done), encoding="utf8")


def _launch(
    instance: DagsterInstance, job: ReconstructableJob, run_config: dict[str, Any], count: int
) -> dict[str, Any]:
    """Create all of them first: what is measured begins with the first launch."""
    ids = [
        instance.create_run_for_job(
            job.get_definition(), run_config=run_config, job_code_origin=job.get_python_origin()
        ).run_id
        for _ in range(count)
    ]
    began = time.time()
    for run_id in ids:
        instance.launch_run(run_id, cast("Any", None))  # these launchers ask for no workspace
    return {"run_ids": ids, "began": began}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
