"""One run of the program: which samples are taken, in which order; the file of the results."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.contenders import CONTENDERS, Namespace
from benchmarks.lab import Plan, open_lab
from benchmarks.namespace import with_own_redis
from benchmarks.processes import DidNotEndError, FailedError
from benchmarks.report import WORKER_START
from benchmarks.results import Results, Sample


@dataclass
class Session:
    """What was measured so far.

    Attributes:
        plans: by the case's name.
    """

    machine: Mapping[str, Any]
    plans: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)

    @property
    def results(self) -> Results:
        """For the report."""
        return Results(self.samples)

    def save(self, path: Path) -> None:
        """Write all of it; done after each sample, since the next one may be interrupted."""
        document = {
            "machine": self.machine,
            "plans": self.plans,
            "samples": [sample.to_json() for sample in self.samples],
        }
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf8")

    @classmethod
    def load(cls, path: Path) -> Session:
        """Read what ``save`` wrote."""
        document = json.loads(path.read_text(encoding="utf8"))
        samples = [Sample(**sample) for sample in document["samples"]]
        return cls(document["machine"], document["plans"], samples)


def take_samples(
    session: Session,
    case: Case,
    plan: Plan,
    contenders: Sequence[str],
    repeats: int,
    space: Namespace,
    keep: bool,
) -> Iterator[Sample]:
    """Take a case's samples, the contenders in turn; yields each after adding it to the session.

    A contender that has a problem is left out of the repeats that follow. Each repeat begins with
    another contender, so that none always follows the same one.
    """
    session.plans[case.name] = asdict(plan)
    out: set[str] = set()
    for repeat in range(repeats):
        first = repeat % len(contenders)
        for name in (*contenders[first:], *contenders[:first]):
            if name in out:
                continue
            sample = _take_sample(case, plan, name, repeat, space, keep)
            if sample.problem:
                out.add(name)
            session.samples.append(sample)
            yield sample


def _take_sample(
    case: Case, plan: Plan, name: str, repeat: int, space: Namespace, keep: bool
) -> Sample:
    contender = CONTENDERS[name]
    if not space.offers(contender.broker):
        return Sample(case.name, name, repeat, problem="its server is not there")
    try:
        with ExitStack() as resources:
            if case.has_own_redis and contender.broker != "embedded":
                space = resources.enter_context(with_own_redis(space))
            lab = resources.enter_context(open_lab(contender, space, case.job_names(plan), keep))
            metrics = case.measure(lab, plan)
            if lab.worker_start_seconds is not None:
                metrics[WORKER_START] = lab.worker_start_seconds
    except DidNotEndError as error:
        limit = error.limit_seconds
        return Sample(case.name, name, repeat, problem=str(error), limit_seconds=limit)
    except FailedError as error:
        return Sample(case.name, name, repeat, problem=str(error))
    except Exception as error:  # a defect of ours or a server's: the other contenders go on
        traceback.print_exc()
        return Sample(case.name, name, repeat, problem=f"{type(error).__name__}: {error}")
    return Sample(case.name, name, repeat, metrics)
