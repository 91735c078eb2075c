"""The code location of the user's path: its jobs have all their settings from the environment."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

from dagster import (
    DailyPartitionsDefinition,
    Definitions,
    Failure,
    In,
    Nothing,
    OpExecutionContext,
    RunRequest,
    ScheduleDefinition,
    SensorEvaluationContext,
    job,
    op,
    sensor,
)

from dagster_taskiq import taskiq_executor
from dagster_taskiq_tests.acceptance.ops import (
    DIRECTORY_VARIABLE,
    GATE_SECONDS,
    cleans_up,
    note,
    one,
    ran,
)

#: The start of the stack's names on its servers; broker and backend have the variables that the
#: product reads.
PREFIX_VARIABLE = "DAGSTER_TASKIQ_TEST_PREFIX"

#: Files in the stack's directory that ask the sensor for a run, by their key.
REQUEST_SUFFIX = ".request"

#: How many runs Dagster's run queue lets run at once.
RUN_LIMIT = 4

#: What people launch overtakes the runs of a backfill.
_FIRST = {"dagster/priority": "10"}

PARTITIONS = DailyPartitionsDefinition(start_date="2026-01-01", end_date="2026-02-01")


@op
def finish(context: OpExecutionContext, x: int) -> int:
    note(context, "ran")
    context.log.info("finished with %s", x)
    return x


@op(ins={"start": In(Nothing)})
def never(context: OpExecutionContext) -> None:
    note(context, "never")


@job(tags=_FIRST)
def chain() -> None:
    """The job that people launch."""
    finish(one())


@job(tags=_FIRST)
def long() -> None:
    """Runs until it is terminated."""
    never(cleans_up())


@op
def partition(context: OpExecutionContext) -> None:
    """Waits until the limit of runs has been reached once, so that a test can tell."""
    note(context, "partition", key=context.partition_key)
    trace = Path(os.environ[DIRECTORY_VARIABLE]) / "trace"
    deadline = time.monotonic() + GATE_SECONDS
    while trace.read_text().count('"kind": "partition"') < RUN_LIMIT:
        if time.monotonic() > deadline:
            raise Failure(f"{RUN_LIMIT} partitions have never been there at once")
        time.sleep(0.1)


@job(partitions_def=PARTITIONS)
def daily() -> None:
    partition()


@job(tags=_FIRST)
def ticked() -> None:
    ran()


@sensor(job=ticked, minimum_interval_seconds=1)
def on_request(context: SensorEvaluationContext) -> Iterator[RunRequest]:
    """Asks for one run for each request."""
    for path in Path(os.environ[DIRECTORY_VARIABLE]).glob(f"*{REQUEST_SUFFIX}"):
        yield RunRequest(run_key=path.name)


every_minute = ScheduleDefinition(name="every_minute", job=ticked, cron_schedule="* * * * *")

defs = Definitions(
    jobs=[chain, long, daily, ticked],
    schedules=[every_minute],
    sensors=[on_request],
    executor=taskiq_executor.configured(
        {"config_source": {"key_prefix": {"env": PREFIX_VARIABLE}}, "lease_seconds": 3.0}
    ),
)
