"""The jobs under test; what their ops see and do goes into the stack's trace: see ``ops``."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from dagster import (
    Backoff,
    DynamicOut,
    DynamicOutput,
    Failure,
    HookContext,
    In,
    Jitter,
    Nothing,
    OpExecutionContext,
    Out,
    Output,
    RetryPolicy,
    RetryRequested,
    failure_hook,
    graph,
    job,
    mem_io_manager,
    op,
    resource,
    success_hook,
)

from dagster_taskiq import taskiq_executor
from dagster_taskiq_tests.acceptance.ops import (
    DIRECTORY_VARIABLE,
    GATE_SECONDS,
    add_one,
    await_gate,
    cleans_up,
    gated,
    note,
    one,
    ran,
    stubborn,
)

# --- shapes -------------------------------------------------------------------------------------


@op
def total(xs: list[int]) -> int:
    return sum(xs)


@op
def plus(a: int, b: int) -> int:
    return a + b


@job(executor_def=taskiq_executor)
def simple() -> None:
    one()


@job(executor_def=taskiq_executor)
def serial() -> None:
    x = one()
    for number in range(4):
        x = add_one.alias(f"add_{number}")(x)


@job(executor_def=taskiq_executor)
def diamond() -> None:
    x = one()
    plus(add_one.alias("left")(x), add_one.alias("right")(x))


@job(executor_def=taskiq_executor)
def parallel() -> None:
    x = one()
    total([add_one.alias(f"p{number}")(x) for number in range(20)])


@graph
def add_two(x: int) -> int:
    return add_one.alias("second")(add_one.alias("first")(x))


@graph
def add_four(x: int) -> int:
    return add_two.alias("outer_second")(add_two.alias("outer_first")(x))


@job(executor_def=taskiq_executor)
def composite() -> None:
    add_four(one())


@op(out={"taken": Out(int, is_required=False), "left": Out(int, is_required=False)})
def choose() -> Iterator[Output[int]]:
    yield Output(1, "taken")


@job(executor_def=taskiq_executor)
def optional_outputs() -> None:
    taken, left = choose()
    add_one.alias("after_taken")(taken)
    add_one.alias("after_after_left")(add_one.alias("after_left")(left))


@job(executor_def=taskiq_executor)
def fan_in_with_skip() -> None:
    taken, left = choose()
    total([add_one.alias("after_taken")(taken), add_one.alias("after_left")(left)])


@op(out=DynamicOut(int), config_schema={"count": int})
def spread(context: OpExecutionContext) -> Iterator[DynamicOutput[int]]:
    for number in range(context.op_config["count"]):
        yield DynamicOutput(number, mapping_key=f"n{number}")


@job(executor_def=taskiq_executor)
def dynamic() -> None:
    mapped = spread().map(add_one).map(add_one.alias("again"))
    total(mapped.collect())


@job(executor_def=taskiq_executor)
def empty() -> None:
    """Has no steps."""


@job(executor_def=taskiq_executor, resource_defs={"io_manager": mem_io_manager})
def in_memory() -> None:
    one()


@op(config_schema={"greeting": str})
def greet(context: OpExecutionContext) -> str:
    tags = {key: value for key, value in context.run.tags.items() if key.startswith("team")}
    return f"{context.op_config['greeting']} {tags}"


@job(executor_def=taskiq_executor, tags={"team/name": "data"})
def configured() -> None:
    greet()


@op
def flaky_once(context: OpExecutionContext, x: int) -> int:
    """Fails until the gate is open."""
    if not (Path(os.environ[DIRECTORY_VARIABLE]) / "repaired").exists():
        raise Failure("broken until it is repaired")
    return x + 1


@job(executor_def=taskiq_executor)
def repairable() -> None:
    add_one.alias("after")(flaky_once(add_one.alias("before")(one())))


# --- resources and hooks ------------------------------------------------------------------------


@resource(config_schema={"fails": bool})
def traced(context: Any) -> Iterator[str]:
    _note_resource("opened")
    if context.resource_config["fails"]:
        raise Failure("the resource is broken")
    try:
        yield "a resource"
    finally:
        _note_resource("closed")


def _note_resource(kind: str) -> None:
    directory = os.environ[DIRECTORY_VARIABLE]
    with (Path(directory) / "resource-trace").open("a", buffering=1) as trace:
        trace.write(json.dumps({"kind": kind, "pid": os.getpid()}) + "\n")


@op(required_resource_keys={"traced"})
def use_resource(context: OpExecutionContext) -> str:
    note(context, "ran")
    return str(context.resources.traced)


@op(required_resource_keys={"traced"})
def fail_with_resource(context: OpExecutionContext) -> None:
    raise Failure("on purpose")


@job(executor_def=taskiq_executor, resource_defs={"traced": traced})
def with_resource() -> None:
    use_resource()
    fail_with_resource()


@success_hook
def on_success(context: HookContext) -> None:
    note(context, "success hook")


@failure_hook
def on_failure(context: HookContext) -> None:
    note(context, "failure hook")


@op
def fail() -> None:
    raise Failure("on purpose", metadata={"reason": "for the test"})


@on_failure
@on_success
@job(executor_def=taskiq_executor)
def with_hooks() -> None:
    one()
    fail()


# --- retries ------------------------------------------------------------------------------------


@op(config_schema={"failures": int})
def fails_at_first(context: OpExecutionContext) -> int:
    """Raises in its first attempts; returns the number of the one that succeeded."""
    note(context, "attempt")
    if context.retry_number < context.op_config["failures"]:
        raise ValueError(f"attempt {context.retry_number + 1}")
    return context.retry_number + 1


@job(executor_def=taskiq_executor, op_retry_policy=RetryPolicy(max_retries=2))
def retried() -> None:
    add_one(fails_at_first())


_DELAY_SECONDS = 0.4


@job(executor_def=taskiq_executor)
def retried_with_delays() -> None:
    policy = RetryPolicy(max_retries=2, delay=_DELAY_SECONDS)
    backoff = RetryPolicy(max_retries=2, delay=_DELAY_SECONDS, backoff=Backoff.EXPONENTIAL)
    jitter = RetryPolicy(max_retries=2, delay=_DELAY_SECONDS, jitter=Jitter.PLUS_MINUS)
    fails_at_first.alias("constant").with_retry_policy(policy)()
    fails_at_first.alias("backoff").with_retry_policy(backoff)()
    fails_at_first.alias("jitter").with_retry_policy(jitter)()


@op(config_schema={"failures": int, "seconds_to_wait": float})
def asks_for_retry(context: OpExecutionContext) -> int:
    note(context, "attempt")
    if context.retry_number < context.op_config["failures"]:
        raise RetryRequested(max_retries=2, seconds_to_wait=context.op_config["seconds_to_wait"])
    return context.retry_number + 1


@job(executor_def=taskiq_executor)
def requested() -> None:
    asks_for_retry()


@op(retry_policy=RetryPolicy(max_retries=3))
def never_again(context: OpExecutionContext) -> None:
    note(context, "attempt")
    raise Failure("for good", allow_retries=False)


@job(executor_def=taskiq_executor)
def not_retried() -> None:
    never_again()


# --- queues, priority and limits ----------------------------------------------------------------


@op
def tells_what_it_can_read(context: OpExecutionContext) -> None:
    """Its environment, as Python and as the kernel has it, and what its ancestors are called."""
    texts = [f"{key}={value}" for key, value in os.environ.items()]
    process: psutil.Process | None = psutil.Process()
    texts.append(Path("/proc/self/environ").read_text(errors="replace"))
    while process is not None and process.pid > 1:
        texts.append(" ".join(process.cmdline()))
        process = process.parent()
    note(context, "can read", texts=texts)


@job(executor_def=taskiq_executor)
def telling() -> None:
    tells_what_it_can_read()


@job(executor_def=taskiq_executor)
def one_gated() -> None:
    gated()


@op
def overlapping(context: OpExecutionContext) -> None:
    note(context, "started")
    time.sleep(0.15)
    note(context, "ended")


@job(executor_def=taskiq_executor)
def blocker() -> None:
    gated()


@job(executor_def=taskiq_executor)
def routed() -> None:
    ran.alias("untagged")()
    ran.alias("ours").tag({"dagster-taskiq/queue": "ours"})()
    ran.alias("theirs").tag({"dagster-celery/queue": "theirs"})()
    ran.alias("both").tag({"dagster-taskiq/queue": "ours", "dagster-celery/queue": "theirs"})()


#: Names of the steps of ``prioritized`` and their tags, in the order in which they are defined.
PRIORITY_TAGS: dict[str, dict[str, str]] = {
    "low_1": {"dagster-taskiq/priority": "1"},
    "default_1": {},
    "high_1": {"dagster-taskiq/priority": "9"},
    "celery_high": {"dagster-celery/priority": "8"},
    "low_2": {"dagster-taskiq/priority": "1"},
    "ours_wins": {"dagster-taskiq/priority": "2", "dagster-celery/priority": "9"},
    "default_2": {"dagster/priority": "100"},
    "high_2": {"dagster-taskiq/priority": "9"},
    "clamped_low": {"dagster-taskiq/priority": "-7"},
    "clamped_high": {"dagster-taskiq/priority": "99"},
}


@job(executor_def=taskiq_executor)
def prioritized() -> None:
    for name, tags in PRIORITY_TAGS.items():
        ran.alias(name).tag(tags)()


@job(executor_def=taskiq_executor)
def bad_priority() -> None:
    ran.alias("bad").tag({"dagster-taskiq/priority": "very"})()


@job(executor_def=taskiq_executor)
def overlaps() -> None:
    for number in range(4):
        overlapping.alias(f"overlapping_{number}")()


@job(executor_def=taskiq_executor)
def two_kinds() -> None:
    """Steps are sent in the order of their names."""
    for number in range(2):
        gated.alias(f"small_{number}").tag({"db": "small"})()
    gated.alias("unlimited")()


POOL = "one_at_a_time"


@op(pool=POOL)
def pooled(context: OpExecutionContext) -> None:
    note(context, "started")
    time.sleep(0.1)
    note(context, "ended")


@op(pool=POOL)
def pooled_failure() -> None:
    raise Failure("on purpose")


@op(pool=POOL)
def pooled_gated(context: OpExecutionContext) -> None:
    note(context, "started")
    await_gate(context)


@op(pool=POOL)
def pooled_exit(context: OpExecutionContext) -> None:
    os._exit(3)


@job(executor_def=taskiq_executor)
def pools() -> None:
    for number in range(3):
        pooled.alias(f"pooled_{number}")()


@job(executor_def=taskiq_executor)
def pool_failures() -> None:
    pooled_failure()
    pooled_exit()


@job(executor_def=taskiq_executor)
def pool_gated() -> None:
    pooled_gated()


# --- ways to end badly --------------------------------------------------------------------------


@job(executor_def=taskiq_executor)
def one_to_cancel() -> None:
    cleans_up()


@job(executor_def=taskiq_executor)
def many_to_cancel() -> None:
    for number in range(6):
        cleans_up.alias(f"c{number}")()


@job(executor_def=taskiq_executor)
def stubborn_job() -> None:
    stubborn()


@op
def with_grandchild(context: OpExecutionContext) -> None:
    """Its first attempt hangs with a process that it has started; a second one ends at once."""
    if context.retry_number:
        note(context, "again")
        return
    child = subprocess.Popen(["sleep", str(GATE_SECONDS)])
    note(context, "started", child=child.pid)
    time.sleep(GATE_SECONDS)


@op(ins={"start": In(Nothing)})
def one_after() -> int:
    return 1


@job(executor_def=taskiq_executor)
def hangs() -> None:
    with_grandchild()


@job(executor_def=taskiq_executor, op_retry_policy=RetryPolicy(max_retries=1))
def hangs_once() -> None:
    add_one(one_after(with_grandchild()))


@op
def exits() -> None:
    os._exit(3)


@op
def segfaults() -> None:
    ctypes.string_at(0)


@op
def kills_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@job(executor_def=taskiq_executor)
def deaths() -> None:
    exits()
    segfaults()
    kills_itself()
    add_one(one())


@op
def exits_at_first(context: OpExecutionContext) -> int:
    note(context, "attempt")
    if context.retry_number == 0:
        os._exit(4)
    return 1


@job(executor_def=taskiq_executor, op_retry_policy=RetryPolicy(max_retries=1))
def dies_once() -> None:
    add_one(exits_at_first())


# --- children -----------------------------------------------------------------------------------


_KEPT: list[bytes] = []


@op
def keeps_memory(context: OpExecutionContext, x: int) -> int:
    note(context, "ran")
    _KEPT.append(b"x" * (150 << 20))
    return x + 1


@job(executor_def=taskiq_executor)
def growing() -> None:
    x = one()
    for number in range(3):
        x = keeps_memory.alias(f"grow_{number}")(x)


# --- logs ---------------------------------------------------------------------------------------


@op
def talks(context: OpExecutionContext) -> None:
    print("a line on stdout")  # noqa: T201
    print("a line on stderr", file=sys.stderr)  # noqa: T201
    subprocess.run(["echo", "a line of a subprocess"], check=True)
    context.log.warning("a line of the op's log")


@op
def talks_and_waits(context: OpExecutionContext) -> None:
    os.write(1, b"a line while it runs\n")
    await_gate(context)
    os.write(1, b"the last words")
    os.kill(os.getpid(), signal.SIGKILL)


@job(executor_def=taskiq_executor)
def talks_to_the_end() -> None:
    talks_and_waits()


@job(executor_def=taskiq_executor)
def talkative() -> None:
    talks()
