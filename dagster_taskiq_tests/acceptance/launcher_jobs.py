"""The jobs of whole runs on workers; their ops write to the same trace as those of ``jobs``."""

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from typing import cast

from dagster import (
    DynamicOut,
    DynamicOutput,
    EventLogEntry,
    Failure,
    HookContext,
    In,
    JobDefinition,
    Nothing,
    OpExecutionContext,
    Out,
    Output,
    RetryPolicy,
    failure_hook,
    in_process_executor,
    job,
    multiprocess_executor,
    op,
)
from dagster._core.storage.event_log import SqliteEventLogStorage

from dagster_taskiq import taskiq_executor
from dagster_taskiq_tests.acceptance.ops import (
    add_one,
    await_gate,
    cleans_up,
    gated,
    note,
    one,
    ran,
    stubborn,
)
from dagster_taskiq_tests.faults import FAULT_VARIABLE

# --- on workers ---------------------------------------------------------------------------------


#: Steps that stay on the default queue, wherever their run is.
_HERE = {"dagster-taskiq/queue": "dagster"}


@job(executor_def=taskiq_executor)
def single() -> None:
    ran()


@op(ins={"start": In(Nothing)})
def after(context: OpExecutionContext) -> None:
    note(context, "ran")


@job(executor_def=taskiq_executor)
def gated_then_more() -> None:
    after.tag(_HERE)(gated.tag(_HERE)())


@job(executor_def=taskiq_executor)
def to_cancel() -> None:
    for number in range(4):
        cleans_up.alias(f"c{number}").tag(_HERE)()


# --- in the run's own process -------------------------------------------------------------------


@job(executor_def=in_process_executor)
def in_process() -> None:
    add_one(one())


@job(executor_def=multiprocess_executor)
def multiprocess() -> None:
    add_one(one())


@job(executor_def=in_process_executor)
def in_process_single() -> None:
    ran()


def loads_slowly() -> JobDefinition:
    """A job whose code a worker does not live to load if it has that fault built in."""
    if os.environ.get(FAULT_VARIABLE) == "loading":
        time.sleep(600)
    return in_process_single


def kills_its_process() -> JobDefinition:
    """A job whose code a worker's process does not survive."""
    if multiprocessing.parent_process() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return in_process_single


@job(executor_def=in_process_executor)
def in_process_gated() -> None:
    gated()


@job(executor_def=in_process_executor)
def in_process_to_cancel() -> None:
    cleans_up()


@job(executor_def=in_process_executor)
def in_process_stubborn() -> None:
    stubborn()


@op
def fail_at_once() -> None:
    raise Failure("on purpose")


@job(executor_def=in_process_executor)
def fails() -> None:
    fail_at_once()


# --- resumed ------------------------------------------------------------------------------------


@op(config_schema={"events": int})
def first(context: OpExecutionContext) -> int:
    note(context, "ran")
    if count := context.op_config["events"]:
        _log_at_once(context, count)
    return 1


def _log_at_once(context: OpExecutionContext, count: int) -> None:
    """Make the run's log longer by so many events, in one transaction.

    One by one, 1,100 of them take a minute on a machine with other things to do.
    """
    storage = cast("SqliteEventLogStorage", context.instance.event_log_storage)
    entry = EventLogEntry(
        error_info=None,
        level=logging.INFO,
        user_message="one of many",
        run_id=context.run_id,
        timestamp=time.time(),
        step_key=None,
    )
    with storage.run_connection(context.run_id) as connection:
        connection.execute(storage.prepare_insert_event_batch([entry] * count))


@op(out=DynamicOut(int))
def spread(context: OpExecutionContext, x: int) -> Iterator[DynamicOutput[int]]:
    note(context, "ran")
    for number in range(4):
        yield DynamicOutput(number + x, mapping_key=f"n{number}")


@op
def hold(context: OpExecutionContext, x: int) -> int:
    """Has a gate of its own for each key."""
    note(context, "ran", key=context.get_mapping_key())
    await_gate(context, str(context.get_mapping_key()))
    note(context, "held", key=context.get_mapping_key())
    return x


@op
def double(context: OpExecutionContext, x: int) -> int:
    note(context, "ran", key=context.get_mapping_key())
    return 2 * x


@op
def total(context: OpExecutionContext, xs: list[int]) -> int:
    note(context, "ran")
    return sum(xs)


@op(out={"taken": Out(int, is_required=False), "left": Out(int, is_required=False)})
def choose(context: OpExecutionContext) -> Iterator[Output[int]]:
    note(context, "ran")
    yield Output(1, "taken")


@op(retry_policy=RetryPolicy(max_retries=2, delay=3))
def flaky(context: OpExecutionContext) -> int:
    note(context, "ran")
    if context.retry_number < 1:
        raise ValueError("its first attempt")
    return context.retry_number


@job(executor_def=taskiq_executor)
def resumable() -> None:
    taken, left = choose()
    double.alias("after_taken")(taken)
    double.alias("after_after_left")(double.alias("after_left")(left))
    double.alias("after_flaky")(flaky())
    total(spread(first()).map(hold).map(double).collect())


#: Each step of ``resumable`` with each of its attempts, which has to come exactly once.
RESUMABLE_ATTEMPTS = {
    (step, 1)
    for step in (
        "choose",
        "after_taken",
        "flaky",
        "after_flaky",
        "first",
        "spread",
        "total",
        *(f"{name}[n{number}]" for name in ("hold", "double") for number in range(4)),
    )
} | {("flaky", 2)}

POOL = "launched_one_at_a_time"


@failure_hook
def say_failed(context: HookContext) -> None:
    context.log.info("the hook of %s ran", context.step_key)


@op
def fail_when_told(context: OpExecutionContext) -> None:
    note(context, "started")
    await_gate(context)
    raise Failure("on purpose, later")


@job(executor_def=taskiq_executor, hooks={say_failed})
def fails_twice() -> None:
    """Once before and once after its run's process is killed."""
    after(fail_at_once())
    after.alias("after_later")(fail_when_told())


@op(pool=POOL)
def pooled(context: OpExecutionContext) -> None:
    note(context, "ran")


@op(pool=POOL, ins={"start": In(Nothing)})
def pooled_after(context: OpExecutionContext) -> None:
    note(context, "pooled after")


@op(pool=POOL)
def pooled_gated(context: OpExecutionContext) -> None:
    note(context, "pooled started")
    await_gate(context)
    note(context, "pooled ended")


@op(ins={"start": In(Nothing)})
def gated_after(context: OpExecutionContext) -> None:
    note(context, "started")
    await_gate(context)


@job(executor_def=taskiq_executor)
def pool_twice() -> None:
    pooled_after(gated_after(pooled()))


@job(executor_def=taskiq_executor)
def pool_held() -> None:
    after(pooled_gated())


@job(executor_def=taskiq_executor)
def pool_in_turn() -> None:
    pooled_after(pooled_gated())
