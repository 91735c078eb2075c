"""The process of a run, or the one that launches many: ``python -m benchmarks.driver``.

It is told what to do by a JSON object as its argument, and writes the runs' ids, and when it
began to launch each or what executing one took, as JSON to the file that this names.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, cast

from dagster import DagsterInstance, execute_job
from dagster._core.definitions.reconstruct import ReconstructableJob, ReconstructableRepository

#: Between two looks whether a run has ended before the next one is launched.
LOOK_SECONDS = 0.1


def main(order: dict[str, Any]) -> None:
    """Execute a job in this process, or launch runs of it."""
    repository = ReconstructableRepository.for_module(order["module"], "defs")
    job = repository.get_reconstructable_job(order["job"])
    with DagsterInstance.get() as instance:
        if order["launches"]:
            done = _launch(instance, job, order)
        else:
            job.get_definition()  # loads the code, which is kept
            before = _cpu_seconds()
            with execute_job(job, instance, order["run_config"]) as result:
                cpu_seconds = _cpu_seconds() - before
                done = {"run_ids": [result.run_id], "cpu_seconds": cpu_seconds}
    Path(order["result"]).write_text(json.dumps(done), encoding="utf8")


def _cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def _launch(
    instance: DagsterInstance, job: ReconstructableJob, order: dict[str, Any]
) -> dict[str, Any]:
    """Create all of them first: what is measured begins with the first launch."""
    origin = job.get_python_origin()
    ids = [
        instance.create_run_for_job(
            job.get_definition(), run_config=order["run_config"], job_code_origin=origin
        ).run_id
        for _ in range(order["launches"])
    ]
    began = []
    for run_id in ids:
        began.append(time.time())
        instance.launch_run(run_id, cast("Any", None))  # these launchers ask for no workspace
        while order["in_turn"] and not _is_finished(instance, run_id):
            time.sleep(LOOK_SECONDS)
    return {"run_ids": ids, "began": began}


def _is_finished(instance: DagsterInstance, run_id: str) -> bool:
    run = instance.get_run_by_id(run_id)
    return run is not None and run.is_finished


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
