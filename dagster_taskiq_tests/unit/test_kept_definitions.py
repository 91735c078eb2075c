"""What a child process keeps between the steps of several runs and jobs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

LOCATION = """
from pathlib import Path
from dagster import Definitions, job, op

with Path("loads").open("a") as file:
    file.write("x")

@op(config_schema={"number": int})
def one(): ...

@job
def first(): one()

@job
def second(): one()

defs = Definitions(jobs=[first, second])
"""

SCRIPT = """
import json
from dagster._core.definitions.reconstruct import ReconstructableRepository
from dagster._core.system_config.objects import ResolvedRunConfig
from dagster_taskiq._dagster.patches import keep_definitions

keep_definitions()
repository = ReconstructableRepository.for_module("location", "defs", working_directory=".")
found = []
for _ in range(3):
    for name in ("first", "second"):
        # anew each time, as from a message
        job = ReconstructableRepository.for_module("location", "defs", working_directory=".")
        found.append(job.get_reconstructable_job(name).get_definition())
configs = [{"ops": {"one": {"config": {"number": number}}}} for number in (1, 2)]
numbers = [
    ResolvedRunConfig.build(found[0], config).ops["one"].config["number"]
    for config in [*configs, *configs]
]
same = ResolvedRunConfig.build(found[0], configs[0])
print(json.dumps({
    "names": [job.name for job in found],
    "objects": len({id(job) for job in found}),
    "numbers": numbers,
    "is known": same is ResolvedRunConfig.build(found[0], run_config=configs[0]),
}))
"""


def test_two_jobs_in_turn(tmp_path: Path) -> None:
    """Their location is loaded once, and each config is its own."""
    (tmp_path / "location.py").write_text(LOCATION)
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(
        command, cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True, timeout=60
    )
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "names": ["first", "second"] * 3,
        "objects": 2,
        "numbers": [1, 2, 1, 2],
        "is known": True,
    }
    # a working directory makes Dagster execute the module's file without the import cache
    assert (tmp_path / "loads").read_text() == "x"
