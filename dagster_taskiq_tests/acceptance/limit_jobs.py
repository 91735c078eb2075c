"""Jobs whose steps run into their time limits, and one that loads a worker."""

import subprocess
import time
from collections.abc import Iterator

from dagster import DynamicOut, DynamicOutput, OpExecutionContext, RetryPolicy, job, op

from dagster_taskiq import SoftTimeLimitError, taskiq_executor
from dagster_taskiq_tests.acceptance.ops import GATE_SECONDS, note

#: All long enough for a loaded machine to load the code and come to what the step is about.
SOFT = {"dagster-taskiq/soft_timeout_seconds": "5"}
HARD = {"dagster-taskiq/timeout_seconds": "10"}


@op
def sleeps(context: OpExecutionContext) -> None:
    note(context, "started")
    try:
        time.sleep(GATE_SECONDS)
    finally:
        note(context, "cleaned")


@op
def sleeps_at_first(context: OpExecutionContext) -> None:
    note(context, "started")
    if context.retry_number == 0:
        time.sleep(GATE_SECONDS)


@op
def catches(context: OpExecutionContext) -> float:
    """Makes do with what it has when its time is over."""
    try:
        time.sleep(GATE_SECONDS)
    except SoftTimeLimitError as error:
        return error.seconds
    return 0.0


@op
def ignores(context: OpExecutionContext) -> None:
    """Does not let itself be stopped, and has a process of its own."""
    child = subprocess.Popen(["sleep", str(GATE_SECONDS)])
    note(context, "started", child=child.pid)
    while context.retry_number == 0:
        try:
            time.sleep(GATE_SECONDS)
        except Exception as error:
            note(context, "ignored", error=str(error))
    child.kill()


@op
def quick(context: OpExecutionContext) -> None:
    note(context, "started")


@job(executor_def=taskiq_executor)
def soft() -> None:
    sleeps.tag(SOFT)()


@job(executor_def=taskiq_executor, op_retry_policy=RetryPolicy(max_retries=1))
def soft_retried() -> None:
    sleeps_at_first.tag(SOFT)()


@job(executor_def=taskiq_executor)
def soft_caught() -> None:
    catches.tag(SOFT)()


@job(executor_def=taskiq_executor)
def hard() -> None:
    ignores.tag({**SOFT, **HARD})()
    quick()


@job(executor_def=taskiq_executor, op_retry_policy=RetryPolicy(max_retries=1))
def hard_retried() -> None:
    ignores.tag(HARD)()


@op
def longer(context: OpExecutionContext) -> None:
    time.sleep(1.5)
    note(context, "longer")


@job(executor_def=taskiq_executor)
def by_default() -> None:
    """One step under the worker's limit, one that its tag frees of it."""
    sleeps()
    longer.tag({"dagster-taskiq/soft_timeout_seconds": "0"})()


@job(executor_def=taskiq_executor)
def bad_limit() -> None:
    quick.tag({"dagster-taskiq/timeout_seconds": "soon"})()


@op(out=DynamicOut(int), config_schema={"count": int})
def spread(context: OpExecutionContext) -> Iterator[DynamicOutput[int]]:
    for number in range(context.op_config["count"]):
        yield DynamicOutput(number, str(number))


@op
def short(context: OpExecutionContext, number: int) -> None:
    note(context, "started", number=number)
    time.sleep(0.05)
    note(context, "ended", number=number)


@job(executor_def=taskiq_executor)
def load() -> None:
    spread().map(short)
