"""The jobs that things are done to. Each attempt of a step begins with a note ``ran``."""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Iterator

from dagster import (
    DynamicOut,
    DynamicOutput,
    HookContext,
    In,
    Nothing,
    OpExecutionContext,
    RetryPolicy,
    job,
    op,
    success_hook,
)

from dagster_taskiq import taskiq_executor
from dagster_taskiq_tests.acceptance.ops import GATE_SECONDS, await_gate, note

RETRIES_ONCE = RetryPolicy(max_retries=1)

_FIRST = {"dagster-taskiq/priority": "9"}


@op
def quick(context: OpExecutionContext) -> None:
    note(context, "ran")


@op(ins={"start": In(Nothing)})
def quick_after(context: OpExecutionContext) -> None:
    note(context, "ran")


@op(ins={"start": In(Nothing)}, tags=_FIRST)
def held_after(context: OpExecutionContext) -> None:
    note(context, "ran")
    await_gate(context)
    note(context, "ended")


@op(tags=_FIRST)
def held(context: OpExecutionContext) -> None:
    note(context, "ran")
    await_gate(context)
    note(context, "ended")


@job(executor_def=taskiq_executor)
def single() -> None:
    quick()


@job(executor_def=taskiq_executor)
def one_held() -> None:
    quick_after(held())


#: The steps of ``varied``: some done, two running while the gate is closed, some queued, one later.
VARIED_STEPS = ("before", "held_0", "held_1", "queued_0", "queued_1", "queued_2", "last")


@job(executor_def=taskiq_executor)
def varied() -> None:
    before = quick.alias("before")()
    helds = [held_after.alias(f"held_{number}")(before) for number in range(2)]
    queued = [quick_after.alias(f"queued_{number}")(before) for number in range(3)]
    quick_after.alias("last")([*helds, *queued])


MANY_STEPS = (*(f"held_{n}" for n in range(4)), *(f"q_{n}" for n in range(200)))


@job(executor_def=taskiq_executor)
def many() -> None:
    for name in MANY_STEPS:
        (held if name.startswith("held") else quick).alias(name)()


# --- steps that do not end by themselves in their first attempt ---------------------------------


def _begin(context: OpExecutionContext) -> bool:
    """Note the attempt, and in the first one start a process; whether it is the first."""
    if context.retry_number:
        note(context, "ran")
        return False
    child = subprocess.Popen(["sleep", str(GATE_SECONDS)])
    note(context, "ran", child=child.pid)
    return True


@op(tags=_FIRST)
def sleeps(context: OpExecutionContext) -> None:
    if _begin(context):
        time.sleep(GATE_SECONDS)


@op(tags=_FIRST)
def holds_the_gil(context: OpExecutionContext) -> None:
    """One call of C that never returns: no other thread runs, nor a signal handler.

    It waits for a lock that it has itself, as one that calculates would take a core from the tests.
    """
    if _begin(context):
        libc, lock = ctypes.PyDLL(None), ctypes.create_string_buffer(256)
        libc.pthread_mutex_init(lock, None)
        for _ in range(2):
            libc.pthread_mutex_lock(lock)


CROWD_RUNNING = ("sleeps", "holds_the_gil", "unlucky")
CROWD_QUEUED = ("waits_0", "waits_1")


@job(executor_def=taskiq_executor)
def crowd() -> None:
    sleeps.with_retry_policy(RETRIES_ONCE)()
    holds_the_gil.with_retry_policy(RETRIES_ONCE)()
    sleeps.alias("unlucky")()
    for name in CROWD_QUEUED:
        quick.alias(name)()


@job(executor_def=taskiq_executor, op_retry_policy=RETRIES_ONCE)
def sleeper() -> None:
    quick_after(sleeps())


# --- ways to die --------------------------------------------------------------------------------


def _note_death(context: OpExecutionContext) -> None:
    note(context, "ran", wall=time.time())


@op
def exits(context: OpExecutionContext) -> None:
    _note_death(context)
    os._exit(3)


@op
def segfaults(context: OpExecutionContext) -> None:
    _note_death(context)
    ctypes.string_at(0)


@op
def kills_itself(context: OpExecutionContext) -> None:
    _note_death(context)
    os.kill(os.getpid(), signal.SIGKILL)


@op
def exits_at_first(context: OpExecutionContext) -> None:
    _note_death(context)
    if not context.retry_number:
        os._exit(3)


@op
def takes_memory(context: OpExecutionContext) -> None:
    """More than the test's control group may have."""
    _note_death(context)
    kept = [bytearray(os.urandom(1) * (16 << 20)) for _ in range(256)]
    raise AssertionError(f"took {len(kept)} pieces and lives")


@job(executor_def=taskiq_executor)
def deaths_beside_others() -> None:
    held()
    exits()
    segfaults()
    kills_itself()
    exits_at_first.with_retry_policy(RETRIES_ONCE)()


@job(executor_def=taskiq_executor)
def out_of_memory() -> None:
    takes_memory()


@success_hook
def dies_after_success(context: HookContext) -> None:
    """Runs when the log has the step's success and its worker has not."""
    os.kill(os.getpid(), signal.SIGKILL)


@job(executor_def=taskiq_executor)
def dies_at_its_end() -> None:
    quick_after(quick.with_hooks({dies_after_success})())


# --- a queue for each ---------------------------------------------------------------------------

#: The points of ``fatal_worker`` at which a worker dies before its step has begun, or has ended.
DEATH_POINTS = ("taken", "claimed", "acked", "ended")


@job(executor_def=taskiq_executor, op_retry_policy=RETRIES_ONCE)
def one_for_each_death() -> None:
    for point in DEATH_POINTS:
        quick.alias(point).tag({"dagster-taskiq/queue": point})()


# --- forks --------------------------------------------------------------------------------------


def _await_copy(context: OpExecutionContext, pid: int) -> None:
    """Note how a forked copy of this process has ended; one that does not end is waited for."""
    _, status = os.waitpid(pid, 0)
    note(context, "copy", code=os.waitstatus_to_exitcode(status))


@op
def copy_returns(context: OpExecutionContext) -> None:
    note(context, "ran")
    if pid := os.fork():
        _await_copy(context, pid)


@op
def copy_raises(context: OpExecutionContext) -> None:
    note(context, "ran")
    if (pid := os.fork()) == 0:
        raise ValueError("in the copy")
    _await_copy(context, pid)


@op(out=DynamicOut())
def copy_yields(context: OpExecutionContext) -> Iterator[DynamicOutput[int]]:
    note(context, "ran")
    pid = os.fork()
    yield DynamicOutput(pid, mapping_key="one")
    _await_copy(context, pid)


_OF_PARENT: list[int] = []


@op
def forks_a_pool(context: OpExecutionContext) -> None:
    """By Python's default, under which what was read before the fork is there after it."""
    note(context, "ran")
    _OF_PARENT.append(7)
    with multiprocessing.Pool(1) as pool:
        note(context, "pool", seen=pool.apply(_look))


def _look() -> list[int]:
    return _OF_PARENT


@job(executor_def=taskiq_executor)
def forks() -> None:
    for step in (copy_returns, copy_raises, copy_yields, forks_a_pool):
        step()
