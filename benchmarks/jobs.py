"""The jobs of the benchmarks, as a code location: workers and runs import this module.

A variable of the environment names the jobs to define, so that a worker loads only what a case
needs, and all contenders the same. A name says what the job is:

===================  ==========================================================
name                 job
===================  ==========================================================
``chain_50``         50 steps, each takes the number of the one before
``parallel_200``     200 steps that need nothing
``sleep_640_500``    640 steps that sleep 500 ms
===================  ==========================================================
"""

from __future__ import annotations

import importlib
import os
import sys
import time

from dagster import Definitions, ExecutorDefinition, JobDefinition, job, op

# Dagster walks a chain by recursion, and Python's own limit would end it at some thousand steps
sys.setrecursionlimit(50_000)

#: Names of the jobs to define, with spaces between.
JOBS_VARIABLE = "DAGSTER_TASKIQ_BENCHMARK_JOBS"
#: Whose executor they get.
EXECUTOR_VARIABLE = "DAGSTER_TASKIQ_BENCHMARK_EXECUTOR"
#: By family, its module, which is imported only for its contenders, and the name there.
_EXECUTORS = {
    "taskiq": ("dagster_taskiq", "taskiq_executor"),
    "celery": ("dagster_celery", "celery_executor"),
    "multiprocess": ("dagster", "multiprocess_executor"),
    "in-process": ("dagster", "in_process_executor"),
}


@op
def first() -> int:
    """Nothing but a number."""
    return 0


@op
def following(number: int) -> int:
    """The next number."""
    return number + 1


def executor() -> ExecutorDefinition:
    """The one that the environment names."""
    module, name = _EXECUTORS[os.environ.get(EXECUTOR_VARIABLE, "in-process")]
    found: ExecutorDefinition = getattr(importlib.import_module(module), name)
    return found


def define(name: str) -> JobDefinition:
    """The job of that name."""
    kind, *numbers = name.split("_")
    steps = int(numbers[0])

    @op
    def pause() -> None:
        time.sleep(int(numbers[1]) / 1000)

    @job(name=name, executor_def=executor())
    def defined() -> None:
        if kind == "chain":
            value = first.alias("step_0")()
            for index in range(1, steps):
                value = following.alias(f"step_{index}")(value)
            return
        step = {"parallel": first, "sleep": pause}[kind]
        for index in range(steps):
            step.alias(f"step_{index}")()

    return defined


def defined_jobs() -> list[JobDefinition]:
    """Those that the environment names."""
    return [define(name) for name in os.environ.get(JOBS_VARIABLE, "").split()]


defs = Definitions(jobs=defined_jobs())
