"""What is measured: each function takes one sample of one contender."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import psutil
import redis
from dagster import DagsterEventType

from benchmarks.lab import Lab, Plan, seconds_of
from benchmarks.processes import Peak, cpu_seconds, pss_mib, tree

Metrics = dict[str, float]
#: Measures a contender; its last arguments are the jobs of the case.
Measure = Callable[..., Metrics]

#: How long to let a worker come to rest before its idleness is measured.
SETTLE_SECONDS = 3.0

#: Between two looks at the memory of a run: each takes some milliseconds.
_MEMORY_LOOK_SECONDS = 0.5

#: How much larger the large plan of ``growth`` is.
GROWTH = 10

#: How long each step of ``sleepers`` sleeps.
SLEEP_SECONDS = 0.5


def warm_up_job(plan: Plan) -> str:
    """A job that keeps each slot busy for half a second, so that each child loads the code."""
    return f"sleep_{plan.slots}_500"


def warm_worker(lab: Lab, plan: Plan, run_slots: int = 0) -> None:
    """Start the workers, and have each slot execute a step."""
    if lab.contender.has_worker:
        lab.start_workers(plan.slots, run_slots)
        # a launcher's contender may have runs that are not for workers of steps
        if lab.contender.job_executor == lab.contender.family:
            lab.run(warm_up_job(plan), plan)


def wall(lab: Lab, plan: Plan, job: str) -> Metrics:
    """The wall time of one run."""
    warm_worker(lab, plan)
    return {"seconds": seconds_of(lab.run(job, plan))}


def launched(lab: Lab, plan: Plan, job: str) -> Metrics:
    """The wall time of runs that are launched at once, each of them to a run slot."""
    warm_worker(lab, plan, run_slots=plan.runs)
    return {"seconds": lab.launch(job, plan)}


def latency(lab: Lab, plan: Plan, job: str) -> Metrics:
    """From a step's success to the start of the step that waits for it, in a chain."""
    warm_worker(lab, plan)
    record = lab.run(job, plan)
    kinds = (DagsterEventType.STEP_START, DagsterEventType.STEP_SUCCESS)
    gaps, succeeded = [], None
    for entry in lab.events(record.dagster_run.run_id, *kinds):
        if entry.dagster_event_type is DagsterEventType.STEP_SUCCESS:
            succeeded = entry.timestamp
        elif succeeded is not None:
            gaps.append((entry.timestamp - succeeded) * 1000)
    return {
        "p50_ms": statistics.median(gaps),
        "p99_ms": statistics.quantiles(gaps, n=100, method="inclusive")[98],
    }


def sleepers(lab: Lab, plan: Plan, job: str) -> Metrics:
    """The share of the ideal: all slots asleep all the time."""
    seconds = wall(lab, plan, job)["seconds"]
    ideal = -(-plan.steps // plan.slots) * SLEEP_SECONDS
    return {"seconds": seconds, "percent_of_ideal": 100 * ideal / seconds}


def growth(lab: Lab, plan: Plan, small_job: str, large_job: str) -> Metrics:
    """The cost of a step in a plan ten times as large, over that in the plan itself."""
    warm_worker(lab, plan)
    small = seconds_of(lab.run(small_job, plan)) / plan.steps
    large = seconds_of(lab.run(large_job, plan)) / (plan.steps * GROWTH)
    return {"small_step_ms": small * 1000, "large_step_ms": large * 1000, "growth": large / small}


def loads(lab: Lab, plan: Plan) -> Metrics:
    """How often one child of the worker builds the code location for two jobs in turn."""
    lab.start_workers(plan.slots)
    drivers: set[int] = set()
    seconds = [
        seconds_of(lab.run(job, plan, module="benchmarks.assets", watch=[drivers.add]))
        for job in ("head", "tail", "head", "tail")
    ]
    pids = [int(line) for line in lab.loads_file.read_text().split()]
    counts = Counter(pid for pid in pids if pid not in drivers)
    return {"loads": max(counts.values()), "seconds": sum(seconds[2:])}


def idle(lab: Lab, plan: Plan, waiting_job: str) -> Metrics:
    """What a worker and a run cost that wait, of a core and in commands to Redis."""
    warm_worker(lab, plan)
    time.sleep(SETTLE_SECONDS)
    metrics = _watch(lab, plan, "worker", lab.worker_processes)
    run = lab.start_run(waiting_job, plan)
    time.sleep(SETTLE_SECONDS)
    both = _watch(lab, plan, "run", lambda: tree(run))
    if "worker_commands_per_s" in metrics:
        # the server has counted those of the worker too
        both["run_commands_per_s"] -= metrics["worker_commands_per_s"]
    return {**metrics, **both}


def _watch(
    lab: Lab, plan: Plan, name: str, processes: Callable[[], Sequence[psutil.Process]]
) -> Metrics:
    with lab.redis() or nullcontext() as client:
        began, used, commands = time.monotonic(), cpu_seconds(processes()), _commands(client)
        time.sleep(plan.window_seconds)
        # the first look was a command of ours
        commands = max(0.0, _commands(client) - commands - 1) / plan.window_seconds
        used = cpu_seconds(processes()) - used
        metrics = {f"{name}_cpu_percent": 100 * used / (time.monotonic() - began)}
    return {**metrics, f"{name}_commands_per_s": commands} if client else metrics


def _commands(client: redis.Redis | None) -> float:
    """Commands that a Redis has got; 0 where there is none."""
    stats = cast("Mapping[str, Any]", client.info("commandstats")) if client else {}
    return float(sum(it["calls"] for it in stats.values()))


def memory(lab: Lab, plan: Plan, job: str) -> Metrics:
    """Memory of a worker whose slots are warm, and the most that a run's process has."""
    warm_worker(lab, plan)
    metrics = {}
    if lab.contender.has_worker:
        metrics["worker_mib"] = pss_mib(lab.worker_processes())
    peak = Peak(lambda pid: pss_mib([psutil.Process(pid)]), _MEMORY_LOOK_SECONDS)
    lab.run(job, plan, watch=[peak])
    metrics["run_mib"] = peak.value
    if lab.contender.has_worker:
        metrics["worker_after_mib"] = pss_mib(lab.worker_processes())
    return metrics
