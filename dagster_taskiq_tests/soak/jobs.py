"""The jobs of the soak. Each op notes its start, its life and its end in the trace.

What an op does is drawn from the seed, the run's number, the step and the attempt, so that a run
of the same seed does the same again, whatever happens around it.
"""

import ctypes
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any

from dagster import (
    DynamicOut,
    DynamicOutput,
    Failure,
    OpExecutionContext,
    RetryPolicy,
    job,
    op,
)

from dagster_taskiq import taskiq_executor
from dagster_taskiq_tests.acceptance.ops import note as add_note

#: Tags of a run: what its ops are drawn from.
SEED_TAG = "soak/seed"
NUMBER_TAG = "soak/number"

#: The pool that some steps share, and how many of them run at once.
POOL = "soak_pool"
POOL_SLOTS = 2

#: How often a working op notes that it lives.
TICK_SECONDS = 0.2

_WIDTH = 8
_RETRIES = RetryPolicy(max_retries=4, delay=0.2)


def note(context: OpExecutionContext, kind: str, **more: Any) -> None:
    """Append a line to the trace, with the time by which Dagster's log goes."""
    add_note(context, kind, step=_step(context), time=time.time(), **more)


def _step(context: OpExecutionContext) -> str:
    return context.get_step_execution_context().step.key


def draw(context: OpExecutionContext) -> random.Random:
    """The attempt's own source of chance."""
    tags = context.run_tags
    words = (tags[SEED_TAG], tags[NUMBER_TAG], _step(context), str(context.retry_number))
    return random.Random("/".join(words))


def work(context: OpExecutionContext, seconds: float) -> None:
    """Be busy for so long, and say so."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        time.sleep(min(left, TICK_SECONDS))
        note(context, "tick")


@op
def begin(context: OpExecutionContext) -> int:
    """The first step of a job."""
    note(context, "start")
    note(context, "end")
    return 1


@op(retry_policy=_RETRIES)
def quick(context: OpExecutionContext, x: int) -> int:
    """Takes next to no time."""
    note(context, "start")
    work(context, draw(context).uniform(0, 0.3))
    note(context, "end")
    return x


@op(retry_policy=_RETRIES)
def slow(context: OpExecutionContext, x: int) -> int:
    """Takes seconds; now and then it holds the GIL for one of them."""
    note(context, "start")
    chance = draw(context)
    work(context, chance.uniform(1, 6))
    if chance.random() < 0.3:
        ctypes.PyDLL(None).usleep(900_000)
    note(context, "end")
    return x


@op(retry_policy=_RETRIES)
def flaky(context: OpExecutionContext, x: int) -> int:
    """Fails now and then."""
    note(context, "start")
    chance = draw(context)
    work(context, chance.uniform(0, 0.5))
    if context.retry_number < 2 and chance.random() < 0.4:
        raise Failure("flaky on purpose")
    note(context, "end")
    return x


@op(retry_policy=_RETRIES)
def crashing(context: OpExecutionContext, x: int) -> int:
    """Takes its process with it now and then."""
    note(context, "start")
    chance = draw(context)
    work(context, chance.uniform(0, 1))
    if context.retry_number < 2 and chance.random() < 0.5:
        note(context, "crash")
        {
            0: lambda: os._exit(3),
            1: lambda: os.kill(os.getpid(), signal.SIGKILL),
            2: lambda: ctypes.string_at(0),  # type: ignore[no-untyped-call]
        }[chance.randrange(3)]()
    note(context, "end")
    return x


@op(retry_policy=_RETRIES)
def spawning(context: OpExecutionContext, x: int) -> int:
    """Has a child process of its own while it works."""
    note(context, "start")
    child = subprocess.Popen(["sleep", "1000"])
    try:
        note(context, "child", child=child.pid)
        work(context, draw(context).uniform(0.5, 3))
    finally:
        child.kill()
        child.wait()
    note(context, "end")
    return x


@op(retry_policy=_RETRIES)
def forking(context: OpExecutionContext, x: int) -> int:
    """Forks, and its copy ends by an exception, which leads it back to where it was called."""
    note(context, "start")
    copy = os.fork()
    if copy == 0:
        raise ValueError("in the copy")
    work(context, draw(context).uniform(0.2, 1.5))
    os.waitpid(copy, 0)
    note(context, "end")
    return x


@op
def failing(context: OpExecutionContext, x: int) -> int:
    """Fails for good."""
    note(context, "start")
    raise Failure(f"failing on purpose, after {x}")


@op(retry_policy=_RETRIES, pool=POOL)
def pooled(context: OpExecutionContext, x: int) -> int:
    """Holds a slot of the pool."""
    note(context, "start")
    work(context, draw(context).uniform(0.2, 1.5))
    note(context, "end")
    return x


@op(retry_policy=_RETRIES, out=DynamicOut(int))
def spread(context: OpExecutionContext, x: int) -> Iterator[DynamicOutput[int]]:
    """Makes steps that nobody knew of before."""
    note(context, "start")
    for number in range(_WIDTH):
        yield DynamicOutput(x, mapping_key=f"n{number}")
    note(context, "end")


@op(retry_policy=_RETRIES)
def total(context: OpExecutionContext, xs: list[int]) -> int:
    """Every value has come, once."""
    note(context, "start")
    if sum(xs) != _WIDTH:
        note(context, "wrong", values=xs)
        raise Failure(f"{_WIDTH} values were to come, and {xs} came", allow_retries=False)
    note(context, "end")
    return sum(xs)


@job(executor_def=taskiq_executor)
def fan_out() -> None:
    """Eight steps at once, some of which fail."""
    x = begin()
    kinds = (quick, flaky, slow, flaky, spawning, quick, crashing, flaky)
    total([kind.alias(f"{kind.name}_{n}")(x) for n, kind in enumerate(kinds)])


@job(executor_def=taskiq_executor)
def chain() -> None:
    """One step after the other."""
    x = begin()
    for number, kind in enumerate((quick, slow, flaky, quick, crashing, quick)):
        x = kind.alias(f"{kind.name}_{number}")(x)


@job(executor_def=taskiq_executor)
def dynamic() -> None:
    """As many steps as another one says."""
    total(spread(begin()).map(flaky).map(quick).collect())


@job(executor_def=taskiq_executor)
def pools() -> None:
    """More steps of a pool than it has slots."""
    x = begin()
    total([pooled.alias(f"pooled_{number}")(x) for number in range(_WIDTH)])


@job(executor_def=taskiq_executor)
def crashes() -> None:
    """Steps that take their process with them, and steps with processes of their own."""
    x = begin()
    kinds = (crashing, spawning) * (_WIDTH // 2)
    total([kind.alias(f"{kind.name}_{n}")(x) for n, kind in enumerate(kinds)])


@job(executor_def=taskiq_executor)
def patient() -> None:
    """Steps that take long, one of them after the others."""
    x = begin()
    slow.alias("last")(total([slow.alias(f"slow_{number}")(x) for number in range(_WIDTH)]))


@job(executor_def=taskiq_executor)
def forks() -> None:
    """Steps that fork, between others that have the same slots."""
    x = begin()
    kinds = (forking, quick) * (_WIDTH // 2)
    total([kind.alias(f"{kind.name}_{n}")(x) for n, kind in enumerate(kinds)])


@job(executor_def=taskiq_executor)
def half_bad() -> None:
    """A step fails for good while others go on for longer: the run fails, resumed or not."""
    x = begin()
    quick.alias("never")(failing(x))
    for number in range(_WIDTH // 2):
        slow.alias(f"slow_{number}")(x)


#: Names of the jobs to choose from.
JOBS = ("fan_out", "chain", "dynamic", "pools", "crashes", "patient", "forks", "half_bad")
