"""What is measured: each function takes one sample of one contender."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

import psutil
import redis
from dagster import DagsterEventType

from benchmarks.lab import Lab, Launch, Plan, Run
from benchmarks.processes import Looks, cpu_seconds, pss_mib, tree

Metrics = dict[str, float]
#: Measures a contender; its last arguments are the jobs of the case.
Measure = Callable[..., Metrics]

#: How long to let a worker come to rest before its idleness is measured.
SETTLE_SECONDS = 3.0

#: Between two looks at the memory of a run: each takes some milliseconds.
_MEMORY_LOOK_SECONDS = 0.5
_CONNECTIONS_LOOK_SECONDS = 0.5

#: How long each step of ``sleepers`` sleeps.
SLEEP_SECONDS = 0.5

#: The heavy code location, and a job of it that has one asset.
HEAVY = "benchmarks.heavy"
TINY_JOB = "job_0"


def warm_up_job(plan: Plan) -> str:
    """A job that keeps each slot busy for half a second, so that each child loads the code."""
    return f"sleep_{plan.slots}_500"


def warm_worker(lab: Lab, plan: Plan, run_slots: int = 0, module: str = "benchmarks.jobs") -> None:
    """Start the workers, and have each slot execute a step of a code location."""
    if lab.contender.has_worker:
        lab.start_workers(plan.slots, run_slots)
        # a launcher's contender may have runs that are not for workers of steps
        if lab.contender.job_executor == lab.contender.family:
            lab.run(warm_up_job(plan), plan, module=module)


def wall(lab: Lab, plan: Plan, job: str) -> Metrics:
    """The wall time of one run."""
    warm_worker(lab, plan)
    return {"seconds": lab.run(job, plan).seconds}


def _run_beside_workers(lab: Lab, plan: Plan, job: str) -> tuple[Run, float]:
    """A run, and the CPU time of the workers meanwhile in seconds."""
    used = lab.worker_cpu_seconds()
    run = lab.run(job, plan)
    return run, lab.worker_cpu_seconds() - used


def launched(lab: Lab, plan: Plan, job: str) -> Metrics:
    """The wall time of runs that are launched at once, each of them to a run slot."""
    warm_worker(lab, plan, run_slots=plan.runs)
    return {"seconds": _burst_seconds(lab.launch(job, plan))}


def _burst_seconds(launches: Sequence[Launch]) -> float:
    """From the first launch to the end of the last run."""
    return max(it.ended for it in launches) - min(it.launched for it in launches)


def latency(lab: Lab, plan: Plan, job: str) -> Metrics:
    """From a step's success to the start of the step that waits for it, in a chain."""
    warm_worker(lab, plan)
    run_id = lab.run(job, plan).record.dagster_run.run_id
    kinds = (DagsterEventType.STEP_START, DagsterEventType.STEP_SUCCESS)
    gaps, succeeded = [], None
    for entry in lab.events(run_id, *kinds):
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
    warm_worker(lab, plan)
    run, worker_cpu = _run_beside_workers(lab, plan, job)
    ideal = -(-plan.steps // plan.slots) * SLEEP_SECONDS
    percent = 100 * ideal / run.seconds
    return {"seconds": run.seconds, "percent_of_ideal": percent, "worker_cpu_s": worker_cpu}


def growth(lab: Lab, plan: Plan, small_job: str, large_job: str) -> Metrics:
    """The cost of a step in a larger plan over that in the plan itself.

    CPU time of a step is what more steps take, so that the beginning of a run is not in it.
    """
    warm_worker(lab, plan)
    more_steps = plan.steps * (plan.growth - 1)
    small, small_worker_cpu = _run_beside_workers(lab, plan, small_job)
    large, large_worker_cpu = _run_beside_workers(lab, plan, large_job)
    small_ms = 1000 * small.seconds / plan.steps
    large_ms = 1000 * large.seconds / (plan.steps * plan.growth)
    run_cpu = large.cpu_seconds - small.cpu_seconds
    worker_cpu = large_worker_cpu - small_worker_cpu
    return {
        "small_step_ms": small_ms,
        "large_step_ms": large_ms,
        "growth": large_ms / small_ms,
        "step_cpu_ms": 1000 * (run_cpu + worker_cpu) / more_steps,
        "run_step_cpu_ms": 1000 * run_cpu / more_steps,
    }


def loads(lab: Lab, plan: Plan) -> Metrics:
    """How often one child of the worker builds the code location for two jobs in turn."""
    lab.start_workers(plan.slots)
    drivers: set[int] = set()
    seconds = [
        lab.run(job, plan, module="benchmarks.assets", watch=[drivers.add]).seconds
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
    looks = Looks(lambda pid: pss_mib([psutil.Process(pid)]), _MEMORY_LOOK_SECONDS)
    lab.run(job, plan, watch=[looks])
    metrics["run_mib"] = looks.most
    if lab.contender.has_worker:
        metrics["worker_after_mib"] = pss_mib(lab.worker_processes())
    return metrics


def connections(lab: Lab, plan: Plan, job: str) -> Metrics:
    """Connections to PostgreSQL that workers have while steps sleep, a slot."""
    warm_worker(lab, plan)
    looks = Looks(lambda _: lab.worker_connections(), _CONNECTIONS_LOOK_SECONDS)
    lab.run(job, plan, watch=[looks])
    return {"connections_a_slot": looks.mean / plan.slots, "most_connections": looks.most}


# --- a heavy code location ---


def heavy_launch(lab: Lab, plan: Plan, *, includes: str | None = None) -> Metrics:
    """From a launch to RUN_START, for the first run, for those after it, and after a restart.

    And the CPU time of those after the first.
    """
    lab.start_workers(0, plan.slots, includes)
    lab.wait_for_rest()
    (first,) = lab.launch(TINY_JOB, replace(plan, runs=1), module=HEAVY)
    lab.wait_for_rest()
    used = lab.worker_cpu_seconds()
    following = lab.launch(TINY_JOB, plan, module=HEAVY, in_turn=True)
    lab.wait_for_rest()
    used = lab.worker_cpu_seconds() - used
    lab.stop_workers()
    lab.start_workers(0, plan.slots, includes)
    lab.wait_for_rest()
    (restarted,) = lab.launch(TINY_JOB, replace(plan, runs=1), module=HEAVY)
    return {
        "first_s": first.began - first.launched,
        "restarted_s": restarted.began - restarted.launched,
        "next_s": statistics.median(it.began - it.launched for it in following),
        "next_end_s": statistics.median(it.ended - it.launched for it in following),
        "run_cpu_s": used / plan.runs,
    }


def runs_per_minute(lab: Lab, plan: Plan) -> Metrics:
    """A burst of tiny runs, once each slot has executed a run."""
    lab.start_workers(0, plan.slots)
    lab.launch(warm_up_job(plan), replace(plan, runs=plan.slots), module=HEAVY)
    lab.wait_for_rest()
    seconds = _burst_seconds(lab.launch(TINY_JOB, plan, module=HEAVY))
    return {"seconds": seconds, "runs_per_minute": 60 * plan.runs / seconds}


def heavy_start(lab: Lab, plan: Plan) -> Metrics:
    """What workers cost that import the code when they start, with as many run slots as others."""
    began = time.monotonic()
    lab.start_workers(plan.slots, plan.slots, HEAVY)
    seconds = lab.wait_for_rest() - began
    mib = pss_mib(lab.worker_processes())
    return {"cpu_s": lab.worker_cpu_seconds(), "seconds": seconds, "idle_mib": mib}


def heavy_memory(lab: Lab, plan: Plan) -> Metrics:
    """Memory of a worker whose slots have all executed a step."""
    warm_worker(lab, plan, module=HEAVY)
    lab.wait_for_rest()
    return {"worker_mib": pss_mib(lab.worker_processes())}
