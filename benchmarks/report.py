"""Results as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.cases import CASES, Case
from benchmarks.contenders import CONTENDERS
from benchmarks.results import Results, Status, Verdict

_STYLES = {Status.MET: "green", Status.MISSED: "red", Status.UNKNOWN: "yellow"}

#: Is in every sample of a contender with workers, and has a table of its own.
WORKER_START = "worker_start_seconds"


def print_report(
    results: Results,
    machine: Mapping[str, Any],
    plans: Mapping[str, Any],
    markdown: bool = False,
) -> None:
    """Print everything.

    Args:
        plans: by the case's name, the numbers that were used.
        markdown: tables for a README, not for the eye.
    """
    # a line of a Markdown table must not be broken
    console = Console(width=1000, no_color=True) if markdown else Console()
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    console.print(
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"{machine['system']}, Python {machine['python']}; {versions}; load at the beginning "
        f"{machine['load_average']:.1f}"
    )
    measured = [case for case in CASES.values() if case.name in plans]
    tables = [_case_table(case, results, plans[case.name]) for case in measured]
    for table in (*tables, _starts_table(results), _targets_table(measured, results)):
        if markdown:
            console.print(f"\n{table.title}\n")
            table.title, table.box = None, box.MARKDOWN
        console.print(table)


def _contenders(case: Case, results: Results) -> list[str]:
    return [name for name in CONTENDERS if results.of(case.name, name)]


def _case_table(case: Case, results: Results, plan: Mapping[str, Any]) -> Table:
    names = _contenders(case, results)
    found = {metric for name in names for s in results.of(case.name, name) for metric in s.metrics}
    metrics = [case.headline, *sorted(found - {case.headline, WORKER_START})]
    title = f"{case.name}: {case.title.format(**plan)}"
    table = Table("contender", *metrics, "repeats", "", title=title, title_justify="left")
    for name in names:
        cells = [_cell(results, case.name, name, metric) for metric in metrics]
        stopped = results.problem(case.name, name)
        count = sum(not sample.problem for sample in results.of(case.name, name))
        table.add_row(name, *cells, str(count), escape((stopped and stopped.problem) or ""))
    return table


def _cell(results: Results, case: str, contender: str, metric: str) -> str:
    """The median, and the range where there is one."""
    median, spread = (
        results.median(case, contender, metric),
        results.spread(case, contender, metric),
    )
    if median is None or spread is None:
        return "-"
    if spread[0] == spread[1]:
        return number(median)
    return f"{number(median)} ({number(spread[0])}..{number(spread[1])})"


def _starts_table(results: Results) -> Table:
    table = Table("contender", "seconds until the worker is ready", title="worker start")
    all_as_one = Results(
        type(sample)("start", sample.contender, index, sample.metrics)
        for index, sample in enumerate(results.samples)
    )
    for name in CONTENDERS:
        cell = _cell(all_as_one, "start", name, WORKER_START)
        if cell != "-":
            table.add_row(name, cell)
    return table


def verdicts(case: Case, results: Results) -> Iterator[Verdict]:
    """What each target of a case came to, for each contender that it is for."""
    for name in _contenders(case, results):
        contender = CONTENDERS[name]
        if contender.family == "taskiq":
            for target in case.targets:
                yield results.judge(case.name, name, contender.peer, target)


def _targets_table(cases: list[Case], results: Results) -> Table:
    table = Table("case", "contender", "target", "reached", "", title="targets")
    for case in cases:
        for verdict in verdicts(case, results):
            style = _STYLES[verdict.status]
            table.add_row(
                case.name,
                verdict.contender,
                str(verdict.target),
                _reached(verdict),
                f"[{style}]{escape(_said(verdict))}[/{style}]",
            )
    return table


def _reached(verdict: Verdict) -> str:
    if verdict.value is None:
        return "-"
    return f"{'at least ' if verdict.is_bound else ''}{number(verdict.value)}"


def _said(verdict: Verdict) -> str:
    if verdict.status is Status.MISSED and verdict.factor is not None:
        return f"missed by a factor of {number(verdict.factor)}"
    return f"{verdict.status.value}{': ' if verdict.reason else ''}{verdict.reason}"


def number(value: float) -> str:
    """With three significant digits."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:#.3g}" if value else "0"
