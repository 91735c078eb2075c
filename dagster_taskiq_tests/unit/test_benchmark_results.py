"""The arithmetic of the benchmarks' report, which needs no server and no Celery."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.pages import fill, tables_of_pages
from benchmarks.results import PEER, Results, Sample, Status, Target, Verdict

FASTER = Target("seconds", "at least", 20, against=PEER)
SHARE = Target("seconds", "at most", 0.5, against="in-process")


def samples(**seconds: list[float]) -> list[Sample]:
    """Of one case, by contender, in the order of the repeats."""
    return [
        Sample("chain", contender, repeat, {"seconds": value})
        for contender, values in seconds.items()
        for repeat, value in enumerate(values)
    ]


def stopped(contender: str, limit_seconds: float | None = None) -> Sample:
    return Sample("chain", contender, 0, problem="a reason", limit_seconds=limit_seconds)


def judged(found: list[Sample], target: Target) -> Verdict:
    return Results(found).judge("chain", "own", "other", target)


def test_a_ratio_is_of_values_of_the_same_repeat() -> None:
    """A machine that is slow in one repeat slows both: 40/1, 200/10 and 40/2, not 40/2."""
    verdict = judged(samples(own=[1, 10, 2], other=[40, 200, 40]), FASTER)
    assert verdict == Verdict(Status.MET, 20, factor=1)


def test_a_repeat_that_one_of_them_lacks_does_not_count() -> None:
    """The ratios are 30 and 50, whatever the third repeat of one of them was."""
    verdict = judged(samples(own=[1, 1, 0.001], other=[30, 50]), FASTER)
    assert verdict.value == 40


@pytest.mark.parametrize(
    ("target", "own", "other", "status", "factor"),
    [
        (FASTER, 1, 20, Status.MET, 1),
        (FASTER, 1, 40, Status.MET, 0.5),
        (FASTER, 1, 10, Status.MISSED, 2),
        (SHARE, 1, 2, Status.MET, 1),
        (SHARE, 1, 1, Status.MISSED, 2),
        (SHARE, 1, 4, Status.MET, 0.5),
        (Target("seconds", "at most", 10), 12.5, None, Status.MISSED, 1.25),
        (Target("seconds", "at most", 10), 10, None, Status.MET, 1),
        (Target("seconds", "at least", 85), 85, None, Status.MET, 1),
        (Target("seconds", "at least", 85), 42.5, None, Status.MISSED, 2),
    ],
)
def test_a_target_is_met_or_missed_by_a_factor(
    target: Target, own: float, other: float | None, status: Status, factor: float
) -> None:
    """At most a share, at least so many times, or a bound on the metric itself."""
    name = "in-process" if target is SHARE else "other"
    others = samples(**{name: [other]}) if other is not None else []
    verdict = judged([*samples(own=[own]), *others], target)
    assert (verdict.status, verdict.factor) == (status, pytest.approx(factor))


def test_a_time_limit_bounds_the_ratio() -> None:
    """Who has not ended within 60 s took at least that: enough for a target or unknown."""
    met = judged([*samples(own=[3]), stopped("other", limit_seconds=60)], FASTER)
    assert (met.status, met.value, met.is_bound) == (Status.MET, 20, True)
    unknown = judged([*samples(own=[6]), stopped("other", limit_seconds=60)], FASTER)
    assert (unknown.status, unknown.value) == (Status.UNKNOWN, 10)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ([stopped("own"), *samples(other=[3])], "own: a reason"),
        ([*samples(own=[3]), stopped("other")], "other: a reason"),
        (samples(own=[3]), "other was not measured"),
    ],
)
def test_nothing_is_concluded_without_values(found: list[Sample], reason: str) -> None:
    """A contender that failed is neither fast nor slow; a target is not met for want of it."""
    verdict = judged(found, FASTER)
    assert (verdict.status, verdict.value, verdict.reason) == (Status.UNKNOWN, None, reason)


def test_a_limit_says_nothing_of_metrics_that_are_no_time() -> None:
    """A run that did not end within 60 s does not have 60 MiB."""
    target = Target("run_mib", "at least", 1, against=PEER)
    own = Sample("chain", "own", 0, {"run_mib": 30})
    assert judged([own, stopped("other", limit_seconds=60)], target).status is Status.UNKNOWN


def test_medians_are_of_the_repeats_with_values() -> None:
    """A problem in one repeat leaves the others' figures as they are."""
    results = Results([*samples(own=[3, 1, 2]), stopped("own")])
    assert results.median("chain", "own", "seconds") == 2
    assert results.median("chain", "other", "seconds") is None


def test_of_a_case_in_several_files_the_last_one_counts(tmp_path: Path) -> None:
    """Other cases are added; samples come back as they were written."""
    wide = Sample("wide", "own", 0, {"seconds": 3})
    old = Results([*samples(own=[9]), wide], {"cores": 1}, {"chain": {"steps": 1}, "wide": {}})
    new = Results([*samples(own=[1.5]), stopped("other", 60)], {"cores": 2}, {"chain": {}})
    for name, results in (("old", old), ("new", new)):
        results.save(tmp_path / name)
    found = Results.load(tmp_path / "old", tmp_path / "new")
    assert found.samples == [*new.samples, wide]
    assert (found.machine, found.plans) == ({"cores": 2}, {"chain": {}, "wide": {}})


def test_a_table_replaces_the_one_between_its_marks() -> None:
    """A table that there are no figures for stays as it is."""
    page = "a\n<!-- one -->\nold\n<!-- / -->\nb\n<!-- two -->\nkept\n<!-- / -->\n"
    filled = fill(page, {"one": "| new |"})
    assert filled == page.replace("old", "| new |")
    assert fill(filled, {"one": "| new |"}) == filled


@pytest.mark.parametrize("page", tables_of_pages(), ids=lambda it: it.name)
def test_a_page_has_the_tables_of_its_figures(page: Path) -> None:
    """``python -m benchmarks figures``."""
    tables, text = tables_of_pages()[page], page.read_text("utf8")
    assert {name for name in tables if f"<!-- {name} -->" not in text} == set()
    assert fill(text, tables) == text
