"""The cases as data: what is run, by whom, how often, and what must come of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from benchmarks.contenders import Family
from benchmarks.lab import Plan
from benchmarks.measures import (
    HEAVY,
    SLEEP_SECONDS,
    Measure,
    connections,
    growth,
    heavy_launch,
    heavy_memory,
    heavy_start,
    idle,
    latency,
    launched,
    loads,
    memory,
    runs_per_minute,
    sleepers,
    wall,
)
from benchmarks.results import COLD, FORMER, PEER, Target

TASKIQ = ("taskiq-rabbitmq", "taskiq-redis", "taskiq-embedded")
CELERY = ("celery-rabbitmq", "celery-redis")
ALL = (*TASKIQ, *CELERY, "multiprocess", "in-process")
WARM_AND_COLD = (*TASKIQ, *(f"{name}-{COLD}" for name in TASKIQ), *CELERY)


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
        title: with a place for the numbers of the plan.
        jobs: names of the jobs that it runs, likewise; those of ``jobs.py``. ``measure`` gets them.
        targets: for the contenders of taskiq.
        contenders: who takes part unless the command line says otherwise.
        headline: the metric that the plot and the first column show.
        has_own_redis: whether a contender on Redis gets a server that nobody else uses.
        executor: of the jobs, where it is not each contender's own.
    """

    name: str
    title: str
    measure: Measure
    jobs: tuple[str, ...]
    plan: Plan
    targets: tuple[Target, ...]
    contenders: tuple[str, ...] = (*TASKIQ, *CELERY)
    headline: str = "seconds"
    repeats: int = 3
    has_own_redis: bool = False
    executor: Family | None = None

    def job_names(self, plan: Plan) -> list[str]:
        """The jobs for a plan."""
        numbers = {
            "steps": plan.steps,
            "large": plan.steps * plan.growth,
            "sleep_ms": round(SLEEP_SECONDS * 1000),
            "window_ms": round(plan.window_seconds * 1000),
            "pause_ms": round((plan.window_seconds + 60) * 1000),
        }
        return [job.format(**numbers) for job in self.jobs]

    def sized(
        self,
        steps: int | None,
        slots: int | None,
        runs: int | None,
        limit_seconds: float | None,
    ) -> Plan:
        """The plan with what the command line says."""
        return replace(
            self.plan,
            steps=steps or self.plan.steps,
            slots=slots or self.plan.slots,
            runs=runs or self.plan.runs,
            limit_seconds=limit_seconds or self.plan.limit_seconds,
        )


def _wall(job: str, plan: Plan, times: float, share: float) -> dict[str, Any]:
    """A case of wall time: so many times as fast as dagster-celery, in a share of in-process's."""
    times_as_fast = Target("seconds", "at least", times, against=PEER)
    at_most = Target("seconds", "at most", share, against="in-process")
    return {"measure": wall, "jobs": (job,), "plan": plan, "targets": (times_as_fast, at_most)}


_CASES: Sequence[Case] = (
    Case(
        "chain",
        "chain of {steps} no-op steps, {slots} slots",
        **_wall("chain_{steps}", Plan(steps=50, slots=2, limit_seconds=300), 20, 1.0),
        contenders=ALL,
        repeats=5,
    ),
    Case(
        "parallel",
        "{steps} parallel no-op steps, {slots} slots",
        **_wall("parallel_{steps}", Plan(steps=200, slots=2, limit_seconds=600), 8, 0.5),
        contenders=ALL,
        repeats=5,
    ),
    Case(
        "wide",
        "{steps} parallel no-op steps, {slots} slots",
        **_wall("parallel_{steps}", Plan(steps=1000, slots=2, limit_seconds=1200), 12, 0.45),
        # one process a step takes multiprocess the better part of an hour
        contenders=(*TASKIQ, *CELERY, "in-process"),
    ),
    Case(
        "launchers",
        "{runs} runs at once of {steps} steps each through the launchers, {slots} slots for steps",
        launched,
        ("parallel_{steps}",),
        Plan(steps=20, slots=2, runs=10, limit_seconds=300),
        (
            Target("seconds", "at least", 5, against=PEER),
            Target("seconds", "at least", 5, against="celery-redis-whole-runs"),
        ),
        (*TASKIQ, *CELERY, "celery-redis-whole-runs"),
    ),
    Case(
        "latency",
        "from a step's success to the next step's start, chain of {steps}, {slots} slots",
        latency,
        ("chain_{steps}",),
        Plan(steps=100, slots=2, limit_seconds=300),
        (Target("p50_ms", "at most", 10), Target("p50_ms", "at most", 0.8, against=FORMER)),
        headline="p50_ms",
    ),
    Case(
        "sleepers",
        "{steps} steps that sleep 0.5 s, {slots} slots",
        sleepers,
        ("sleep_{steps}_{sleep_ms}",),
        Plan(steps=640, slots=64, limit_seconds=300),
        (
            Target("percent_of_ideal", "at least", 85),
            Target("worker_cpu_s", "at most", 0.6, against=FORMER),
        ),
        TASKIQ,
        headline="percent_of_ideal",
    ),
    Case(
        "growth",
        "cost of a step in a plan of ten times {steps} steps over that in one of {steps}",
        growth,
        ("parallel_{steps}", "parallel_{large}"),
        Plan(steps=500, slots=2, limit_seconds=1800, growth=10),
        (
            Target("growth", "at most", 1.3),
            Target("step_cpu_ms", "at most", 0.8, against=FORMER),
        ),
        TASKIQ,
        headline="growth",
        repeats=1,
    ),
    Case(
        "loads",
        "loads of a 300-asset code location by a child that executes two of its jobs in turn",
        loads,
        (),
        Plan(steps=5, slots=1, limit_seconds=300),
        (Target("loads", "at most", 1),),
        headline="loads",
        repeats=1,
    ),
    Case(
        "idle",
        "what waits: a worker with {slots} slots, a run whose only step sleeps",
        idle,
        ("sleep_1_{pause_ms}",),
        Plan(steps=1, slots=8),
        (Target("worker_cpu_percent", "at most", 1), Target("run_cpu_percent", "at most", 1)),
        headline="worker_cpu_percent",
        has_own_redis=True,
    ),
    Case(
        "memory",
        "PSS of a worker with {slots} warm slots, and of a run with {steps} steps",
        memory,
        ("parallel_{steps}",),
        Plan(steps=1000, slots=8, limit_seconds=1200),
        (
            Target("worker_mib", "at most", 1.0, against=PEER),
            Target("run_mib", "at most", 1.0, against=PEER),
        ),
        headline="worker_mib",
        repeats=1,
    ),
    Case(
        "connections",
        "connections of a worker to PostgreSQL, {steps} steps that sleep a minute, {slots} slots",
        connections,
        ("sleep_{steps}_{window_ms}",),
        Plan(steps=16, slots=8, window_seconds=60),
        (Target("connections_a_slot", "at most", 0.2),),
        TASKIQ,
        headline="connections_a_slot",
        repeats=1,
    ),
    Case(
        "long-chain",
        "cost of a step in a chain of {growth} times {steps} steps over that in one of {steps}",
        growth,
        ("chain_{steps}", "chain_{large}"),
        Plan(steps=500, slots=2, limit_seconds=1800, growth=8),
        (Target("growth", "at most", 1.15),),
        TASKIQ,
        headline="growth",
        repeats=1,
    ),
    Case(
        "heavy-launch",
        "from launch to RUN_START, {runs} tiny runs of a heavy code location in turn",
        heavy_launch,
        (),
        Plan(steps=1, slots=1, runs=10, limit_seconds=300),
        (
            Target("next_s", "at most", 0.5, against=PEER),
            Target("first_s", "at most", 0.7, against=PEER),
            Target("restarted_s", "at most", 0.5, against=PEER),
            Target("run_cpu_s", "at most", 0.5, against=PEER),
            Target("run_cpu_s", "at most", 0.1, against=COLD),
        ),
        WARM_AND_COLD,
        headline="next_s",
        executor="in-process",
    ),
    Case(
        "heavy-first",
        "the same on workers that have imported the heavy code location when they started",
        partial(heavy_launch, includes=HEAVY),
        (),
        Plan(steps=1, slots=1, runs=3, limit_seconds=300),
        (Target("first_s", "at most", 0.7, against=PEER),),
        headline="first_s",
        executor="in-process",
    ),
    Case(
        "runs-per-minute",
        "{runs} tiny runs at once of a heavy code location, {slots} slots for runs",
        runs_per_minute,
        (),
        Plan(steps=1, slots=4, runs=60, limit_seconds=600),
        (Target("seconds", "at least", 2.5, against=PEER),),
        headline="runs_per_minute",
        executor="in-process",
    ),
    Case(
        "heavy-start",
        "start of a worker that imports heavy code, {slots} slots for steps and {slots} for runs",
        heavy_start,
        (),
        Plan(steps=1, slots=4),
        (Target("cpu_s", "at most", 0.3, against=COLD),),
        WARM_AND_COLD,
        headline="cpu_s",
    ),
    Case(
        "heavy-memory",
        "PSS of a worker with {slots} slots that have all executed a step of a heavy code location",
        heavy_memory,
        (),
        Plan(steps=1, slots=8, limit_seconds=600),
        (
            Target("worker_mib", "at most", 0.4, against=COLD),
            Target("worker_mib", "at most", 0.4, against=PEER),
        ),
        WARM_AND_COLD,
        headline="worker_mib",
    ),
)

CASES: Mapping[str, Case] = {case.name: case for case in _CASES}
