"""Which samples are taken, in which order."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace

from benchmarks.cases import Case
from benchmarks.contenders import CONTENDERS, FORMER_VARIABLE, Namespace, former_package
from benchmarks.lab import Plan, open_lab
from benchmarks.measures import warm_up_job
from benchmarks.namespace import own_redis
from benchmarks.processes import FailedError
from benchmarks.report import WORKER_START
from benchmarks.results import Results, Sample


def take_samples(
    results: Results,
    case: Case,
    plan: Plan,
    contenders: Sequence[str],
    repeats: int,
    space: Namespace,
    keep: bool,
) -> Iterator[Sample]:
    """Take a case's samples, the contenders in turn; yields each after adding it to the results.

    A contender that has a problem is left out of the repeats that follow. Each repeat begins with
    another contender, so that none always follows the same one.
    """
    results.plans[case.name] = asdict(plan)
    out: set[str] = set()
    for repeat in range(repeats):
        first = repeat % len(contenders)
        for name in (*contenders[first:], *contenders[:first]):
            if name in out:
                continue
            sample = _take_sample(case, plan, name, repeat, space, keep)
            if sample.problem:
                out.add(name)
            results.samples.append(sample)
            yield sample


def _take_sample(
    case: Case, plan: Plan, name: str, repeat: int, space: Namespace, keep: bool
) -> Sample:
    contender = CONTENDERS[name]
    contender = replace(contender, executor=case.executor or contender.executor)
    sample = Sample(case.name, name, repeat)
    if not space.offers(contender.broker):
        return replace(sample, problem="its server is not there")
    if contender.variant == "former" and former_package() is None:
        return replace(sample, problem=f"{FORMER_VARIABLE} names no package")
    jobs = case.job_names(plan)
    defined = [warm_up_job(plan), *jobs]
    try:
        with ExitStack() as resources:
            if case.has_own_redis and contender.broker != "embedded":
                space = replace(space, redis=resources.enter_context(own_redis()))
            lab = resources.enter_context(open_lab(contender, space, defined, keep))
            metrics = case.measure(lab, plan, *jobs)
            if lab.worker_start_seconds is not None:
                metrics[WORKER_START] = lab.worker_start_seconds
    except FailedError as error:
        return replace(sample, problem=str(error), limit_seconds=error.limit_seconds)
    except Exception as error:  # a defect of ours or a server's: the other contenders go on
        traceback.print_exc()
        return replace(sample, problem=f"{type(error).__name__}: {error}")
    return replace(sample, metrics=metrics)
