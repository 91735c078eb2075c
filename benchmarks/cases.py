"""The cases as data: what is run, by whom, how often, and what must come of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.lab import Plan
from benchmarks.measures import (
    GROWTH,
    Measure,
    growth,
    idle,
    latency,
    launched,
    loads,
    memory,
    sleepers,
    wall,
    warm_up_job,
)
from benchmarks.results import PEER, Target

TASKIQ = ("taskiq-rabbitmq", "taskiq-redis", "taskiq-embedded")
CELERY = ("celery-rabbitmq", "celery-redis")


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
        title: with a place for the numbers of the plan.
        jobs: names of the jobs that it runs, likewise; those of ``jobs.py``.
        contenders: who takes part unless the command line says otherwise.
        targets: for the contenders of taskiq.
        headline: the metric that the plot and the first column show.
        has_own_redis: whether a contender on Redis gets a server that nobody else uses.
    """

    name: str
    title: str
    measure: Measure
    jobs: tuple[str, ...]
    contenders: tuple[str, ...]
    plan: Plan
    headline: str
    targets: tuple[Target, ...] = ()
    repeats: int = 5
    has_own_redis: bool = False

    def job_names(self, plan: Plan) -> list[str]:
        """The jobs that workers and runs have to define for a plan."""
        numbers = {
            "steps": plan.steps,
            "large": plan.steps * GROWTH,
            "pause_ms": round((plan.window_seconds + 60) * 1000),
        }
        return [warm_up_job(plan), *(job.format(**numbers) for job in self.jobs)]

    def sized(self, steps: int | None, slots: int | None, limit_seconds: float | None) -> Plan:
        """The plan with what the command line says."""
        return replace(
            self.plan,
            steps=steps or self.plan.steps,
            slots=slots or self.plan.slots,
            limit_seconds=limit_seconds or self.plan.limit_seconds,
        )


_CASES: Sequence[Case] = (
    Case(
        "chain",
        "chain of {steps} no-op steps, {slots} slots",
        wall("chain_{steps}"),
        ("chain_{steps}",),
        (*TASKIQ, *CELERY, "multiprocess", "in-process"),
        Plan(steps=50, slots=2, limit_seconds=300),
        "seconds",
        (
            Target("seconds", "at least", 20, against=PEER),
            Target("seconds", "at most", 1.0, against="in-process"),
        ),
    ),
    Case(
        "parallel",
        "{steps} parallel no-op steps, {slots} slots",
        wall("parallel_{steps}"),
        ("parallel_{steps}",),
        (*TASKIQ, *CELERY, "multiprocess", "in-process"),
        Plan(steps=200, slots=2, limit_seconds=600),
        "seconds",
        (
            Target("seconds", "at least", 8, against=PEER),
            Target("seconds", "at most", 0.5, against="in-process"),
        ),
    ),
    Case(
        "wide",
        "{steps} parallel no-op steps, {slots} slots",
        wall("parallel_{steps}"),
        ("parallel_{steps}",),
        # one process a step takes multiprocess the better part of an hour
        (*TASKIQ, *CELERY, "in-process"),
        Plan(steps=1000, slots=2, limit_seconds=1200),
        "seconds",
        (
            Target("seconds", "at least", 12, against=PEER),
            Target("seconds", "at most", 0.45, against="in-process"),
        ),
        repeats=3,
    ),
    Case(
        "launchers",
        "{runs} runs at once of {steps} steps each through the launchers, {slots} slots for steps",
        launched("parallel_{steps}"),
        ("parallel_{steps}",),
        (*TASKIQ, *CELERY, "celery-redis-whole-runs"),
        Plan(steps=20, slots=2, runs=10, limit_seconds=300),
        "seconds",
        (
            Target("seconds", "at least", 5, against=PEER),
            Target("seconds", "at least", 5, against="celery-redis-whole-runs"),
        ),
        repeats=3,
    ),
    Case(
        "latency",
        "from a step's success to the next step's start, chain of {steps}, {slots} slots",
        latency,
        ("chain_{steps}",),
        (*TASKIQ, *CELERY),
        Plan(steps=100, slots=2, limit_seconds=300),
        "p50_ms",
        (Target("p50_ms", "at most", 10),),
        repeats=3,
    ),
    Case(
        "sleepers",
        "{steps} steps that sleep 0.5 s, {slots} slots",
        sleepers(0.5),
        ("sleep_{steps}_500",),
        TASKIQ,
        Plan(steps=640, slots=64, limit_seconds=300),
        "percent_of_ideal",
        (Target("percent_of_ideal", "at least", 85),),
        repeats=3,
    ),
    Case(
        "growth",
        "cost of a step in a plan of ten times {steps} steps over that in one of {steps}",
        growth,
        ("parallel_{steps}", "parallel_{large}"),
        TASKIQ,
        Plan(steps=500, slots=2, limit_seconds=1800),
        "growth",
        (Target("growth", "at most", 1.3),),
        repeats=1,
    ),
    Case(
        "loads",
        "loads of a 300-asset code location by a child that executes two of its jobs in turn",
        loads,
        (),
        (*TASKIQ, *CELERY),
        Plan(steps=5, slots=1, limit_seconds=300),
        "loads",
        (Target("loads", "at most", 1),),
        repeats=1,
    ),
    Case(
        "idle",
        "what waits: a worker with {slots} slots, a run whose only step sleeps",
        idle,
        ("sleep_1_{pause_ms}",),
        (*TASKIQ, *CELERY),
        Plan(steps=1, slots=8),
        "worker_cpu_percent",
        (
            Target("worker_cpu_percent", "at most", 1),
            Target("run_cpu_percent", "at most", 1),
        ),
        repeats=3,
        has_own_redis=True,
    ),
    Case(
        "memory",
        "PSS of a worker with {slots} warm slots, and of a run with {steps} steps",
        memory,
        ("parallel_{steps}",),
        (*TASKIQ, *CELERY),
        Plan(steps=1000, slots=8, limit_seconds=1200),
        "worker_mib",
        (
            Target("worker_mib", "at most", 1.0, against=PEER),
            Target("run_mib", "at most", 1.0, against=PEER),
        ),
        repeats=1,
    ),
)

CASES: Mapping[str, Case] = {case.name: case for case in _CASES}
