"""The arithmetic of results: samples, medians, ratios, targets. Nothing here measures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

#: Stands in a target for the contender's own peer of dagster-celery.
PEER = "peer"
#: Stand there for the contender itself without warm code, and for its former version.
COLD = "cold"
FORMER = "former"
_OTHERS = {PEER: "dagster-celery", COLD: "the cold contender", FORMER: "the former version"}


@dataclass(frozen=True)
class Sample:
    """What came of one measurement.

    Attributes:
        repeat: samples of the same number were taken one after the other.
        metrics: by name; empty where there was a problem.
        problem: why there are none.
        limit_seconds: that it has not kept, where that was the problem.
    """

    case: str
    contender: str
    repeat: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    problem: str | None = None
    limit_seconds: float | None = None


@dataclass(frozen=True)
class Target:
    """What a case must reach.

    Attributes:
        metric: that it is about.
        bound: on which side of the value to be.
        value: of the metric, or of its ratio to another contender's: with ``at least`` it says
            how many times as much the other one has, with ``at most`` the share of the other's.
        against: the other contender, ``PEER``, ``COLD``, ``FORMER``, or None for none.
    """

    metric: str
    bound: Literal["at least", "at most"]
    value: float
    against: str | None = None

    def __str__(self) -> str:
        number = f"{self.value:g}"
        if self.against is None:
            return f"{self.metric} {self.bound} {number}"
        other = _OTHERS.get(self.against, self.against)
        if self.bound == "at least":
            return f"{other} takes at least {number} times as many {self.metric}"
        return f"{self.metric} at most {number} of {other}'s"

    def other(self, contender: str, peer: str | None) -> str | None:
        """Whom it compares a contender with, which has that peer."""
        if self.against in {COLD, FORMER}:
            return f"{contender}-{self.against}"
        return peer if self.against == PEER else self.against


class Status(Enum):
    """What a target came to."""

    MET = "met"
    MISSED = "missed"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Verdict:
    """What a target came to, and why.

    Attributes:
        value: what was reached: a ratio, or the metric itself. None where nothing is known.
        is_bound: the other one has not ended, so the ratio is at least this.
        factor: how far off: 1.25 means a quarter more, or less, than allowed; 1 or less is met.
    """

    status: Status
    value: float | None = None
    is_bound: bool = False
    factor: float | None = None
    reason: str = ""


@dataclass
class Results:
    """Samples, looked at by case and contender.

    Attributes:
        machine: what the figures are of, see ``machine.py``.
        plans: by the case's name, the numbers that were used.
    """

    samples: list[Sample] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    plans: dict[str, dict[str, Any]] = field(default_factory=dict)

    # --- files ---

    def save(self, path: Path) -> None:
        """Write all of it; done after each sample, since the next one may be interrupted."""
        samples = [asdict(sample) for sample in self.samples]
        document = {"machine": self.machine, "plans": self.plans, "samples": samples}
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf8")

    @classmethod
    def load(cls, *paths: Path) -> Results:
        """Read what ``save`` wrote; of a case in several files the last one counts."""
        found = cls()
        for path in paths:
            document = json.loads(path.read_text(encoding="utf8"))
            samples = [Sample(**sample) for sample in document["samples"]]
            earlier = [it for it in found.samples if it.case not in document["plans"]]
            plans = {**found.plans, **document["plans"]}
            found = cls([*samples, *earlier], document["machine"], plans)
        return found

    # --- one contender ---

    def of(self, case: str, contender: str) -> list[Sample]:
        """The samples of one contender in one case."""
        return [s for s in self.samples if (s.case, s.contender) == (case, contender)]

    def values(self, case: str, contender: str, metric: str) -> dict[int, float]:
        """The metric by the number of the repeat."""
        found = self.of(case, contender)
        return {s.repeat: s.metrics[metric] for s in found if metric in s.metrics}

    def median(self, case: str, contender: str, metric: str) -> float | None:
        """The median over the repeats; None if there is no value."""
        values = self.values(case, contender, metric).values()
        return statistics.median(values) if values else None

    def problem(self, case: str, contender: str) -> Sample | None:
        """The sample that says why there are no (more) values, if there is one."""
        return next((s for s in self.of(case, contender) if s.problem), None)

    # --- targets ---

    def ratio(self, case: str, metric: str, upper: str, lower: str) -> float | None:
        """The median of the ratios within the repeats that both contenders have.

        Samples of one repeat were taken close to each other, so what else the machine did fell
        on both.
        """
        over, under = self.values(case, upper, metric), self.values(case, lower, metric)
        ratios = [over[repeat] / under[repeat] for repeat in over.keys() & under.keys()]
        return statistics.median(ratios) if ratios else None

    def judge(self, case: str, contender: str, peer: str | None, target: Target) -> Verdict:
        """What a target came to for a contender."""
        other = target.other(contender, peer)
        is_bound = False
        if other is None:
            value = self.median(case, contender, target.metric)
        elif target.bound == "at least":
            value = self.ratio(case, target.metric, other, contender)
            if value is None:
                value, is_bound = self._least_ratio(case, contender, other, target), True
        else:
            value = self.ratio(case, target.metric, contender, other)
        if value is None:
            return Verdict(Status.UNKNOWN, reason=self._why(case, contender, other))
        factor = _factor(value, target)
        if factor <= 1:
            return Verdict(Status.MET, value, is_bound, factor)
        if is_bound:
            reason = f"{other} did not end, more is not known"
            return Verdict(Status.UNKNOWN, value, is_bound, reason=reason)
        return Verdict(Status.MISSED, value, is_bound, factor)

    def _least_ratio(self, case: str, contender: str, other: str, target: Target) -> float | None:
        """How much longer the other one took at least, which has not kept its time limit."""
        own, stopped = self.median(case, contender, target.metric), self.problem(case, other)
        if own is None or stopped is None or stopped.limit_seconds is None:
            return None
        return stopped.limit_seconds / own if target.metric == "seconds" else None

    def _why(self, case: str, *contenders: str | None) -> str:
        for name in filter(None, contenders):
            if not self.of(case, name):
                return f"{name} was not measured"
            if stopped := self.problem(case, name):
                return f"{name}: {stopped.problem}"
        return "no repeat has both"


def _factor(value: float, target: Target) -> float:
    if target.bound == "at most":
        return value / target.value
    return target.value / value if value > 0 else float("inf")
