"""Results as tables, for the eye and for pages, and as a plot."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from benchmarks.cases import CASES, Case
from benchmarks.contenders import CONTENDERS
from benchmarks.machine import sentence_of
from benchmarks.results import FORMER, Results, Status, Verdict

#: Is in every sample of a contender with workers, and has a table of its own.
WORKER_START = "worker_start_seconds"

_COLOURS = {
    "taskiq": "#2a6fdb",
    "celery": "#e08b2d",
    "multiprocess": "#8a8a8a",
    "in-process": "#444444",
}


def number(value: float | None) -> str:
    """With three significant digits."""
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:#.3g}" if value else "0"


# --- tables -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""

    def print(self, console: Console) -> None:
        """For the eye."""
        table = RichTable(*self.head, title=self.title, title_justify="left")
        for row in self.rows:
            table.add_row(*map(escape, row))
        console.print(table)

    def markdown(self, align: str = "--:") -> str:
        """For a page; the first column is a text, the others are aligned as told."""
        lines = [self.head, ["---", *(align for _ in self.head[1:])], *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def print_report(results: Results) -> None:
    """Print everything."""
    console = Console()
    console.print(sentence_of(results.machine))
    for case in _measured(results):
        _case_table(case, results).print(console)
    _starts_table(results).print(console)
    targets_table(results).print(console)


def _measured(results: Results) -> list[Case]:
    return [case for case in CASES.values() if case.name in results.plans]


def _contenders(case: str, results: Results) -> list[str]:
    return [name for name in CONTENDERS if results.of(case, name)]


def _case_table(case: Case, results: Results) -> Table:
    names = _contenders(case.name, results)
    found = {key for name in names for it in results.of(case.name, name) for key in it.metrics}
    metrics = [case.headline, *sorted(found - {case.headline, WORKER_START})]
    rows = []
    for name in names:
        cells = [_cell(results.values(case.name, name, metric).values()) for metric in metrics]
        stopped = results.problem(case.name, name)
        count = sum(not sample.problem for sample in results.of(case.name, name))
        rows.append([name, *cells, str(count), (stopped and stopped.problem) or ""])
    title = f"{case.name}: {case.title.format(**results.plans[case.name])}"
    return Table(["contender", *metrics, "repeats", ""], rows, title)


def _cell(values: Collection[float]) -> str:
    """The median, and the range where there is one."""
    if not values:
        return "-"
    median, least, most = map(number, (statistics.median(values), min(values), max(values)))
    return median if least == most else f"{median} ({least}..{most})"


def _starts(results: Results, contender: str) -> list[float]:
    """Seconds of its worker starts in all cases."""
    own = [it.metrics for it in results.samples if it.contender == contender]
    return [metrics[WORKER_START] for metrics in own if WORKER_START in metrics]


def _starts_table(results: Results) -> Table:
    found = {name: _starts(results, name) for name in CONTENDERS}
    rows = [[name, _cell(seconds)] for name, seconds in found.items() if seconds]
    return Table(["contender", "seconds until the worker is ready"], rows, "worker start")


def targets_table(results: Results) -> Table:
    """What each target came to, for each contender that it is for."""
    rows = []
    for case in _measured(results):
        for name in _contenders(case.name, results):
            contender = CONTENDERS[name]
            for target in case.targets if contender.is_judged else ():
                if target.against == FORMER and not results.of(case.name, f"{name}-{FORMER}"):
                    continue  # there is a former version only where the user has named one
                verdict = results.judge(case.name, name, contender.peer, target)
                rows.append([case.name, name, str(target), _reached(verdict), _said(verdict)])
    return Table(["case", "contender", "target", "reached", ""], rows, "targets")


def _reached(verdict: Verdict) -> str:
    return f"{'at least ' if verdict.is_bound else ''}{number(verdict.value)}"


def _said(verdict: Verdict) -> str:
    """The table of the case has the whole reason."""
    if verdict.status is Status.MISSED and verdict.factor is not None:
        return f"missed by a factor of {number(verdict.factor)}"
    reason = verdict.reason.partition(": ")[0]
    return f"{verdict.status.value}{': ' if reason else ''}{reason}"


#: Of the table of the README: its text, the case, the metric.
_SPEED_ROWS = (
    ("chain of 50 no-op steps, s", "chain", "seconds"),
    ("200 parallel no-op steps on 2 slots, s", "parallel", "seconds"),
    ("1,000 of them, s", "wide", "seconds"),
    ("10 runs at once of 20 steps, through the launchers, s", "launchers", "seconds"),
    ("from a step's success to the next one's start, p50, ms", "latency", "p50_ms"),
    ("640 steps that sleep 0.5 s, on 64 slots, s", "sleepers", "seconds"),
    ("loads of a 300-asset location for two jobs in turn", "loads", "loads"),
    ("memory of a worker with 8 warm slots, MiB (PSS)", "memory", "worker_mib"),
    ("memory of a run with 1,000 steps, MiB (PSS)", "memory", "run_mib"),
    ("from launch to start, heavy location, its first run, s", "heavy-launch", "first_s"),
    ("the runs after it, s", "heavy-launch", "next_s"),
    ("its first run after a restart of the workers, s", "heavy-launch", "restarted_s"),
    ("CPU time of a tiny run of it, s", "heavy-launch", "run_cpu_s"),
    ("tiny runs a minute on 4 run slots", "runs-per-minute", "runs_per_minute"),
    ("start of a worker with 8 slots that imports it, CPU s", "heavy-start", "cpu_s"),
    ("memory of 8 slots after a step of it, MiB (PSS)", "heavy-memory", "worker_mib"),
)
_SPEED_COLUMNS = {
    "taskiq-redis": "Redis",
    "taskiq-rabbitmq": "RabbitMQ and Redis",
    "taskiq-embedded": "embedded",
    "celery-redis": "dagster-celery, Redis",
    "celery-rabbitmq": "dagster-celery, RabbitMQ",
    "multiprocess": "multiprocess_executor",
    "in-process": "in_process_executor",
}

#: Stands in the column of another contender, with an asterisk, where that one has no figure.
_IN_PLACE_OF = {"celery-redis": "celery-redis-whole-runs"}


def speed_table(results: Results) -> Table:
    """The medians of the README."""

    def cell(case: str, name: str, metric: str) -> str:
        value = results.median(case, name, metric)
        other = _IN_PLACE_OF.get(name)
        if value is None and other and (found := results.median(case, other, metric)):
            return f"{number(found)}*"
        return number(value)

    rows = [
        [text, *(cell(case, name, metric) for name in _SPEED_COLUMNS)]
        for text, case, metric in _SPEED_ROWS
        if case in results.plans
    ]
    starts = [_starts(results, name) for name in _SPEED_COLUMNS]
    medians = [number(statistics.median(it)) if it else "-" for it in starts]
    return Table(["", *_SPEED_COLUMNS.values()], [*rows, ["worker start, s", *medians]])


# --- the plot -----------------------------------------------------------------------------------


def write_plot(results: Results, file: Path) -> None:
    """Plot how long the cases take that measure wall time, if there are any."""
    import matplotlib as mpl  # noqa: PLC0415 - not for those who only want tables

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "dagster-taskiq"  # the same figures give the same file
    mpl.rcParams["svg.fonttype"] = "none"  # letters, not their outlines
    from matplotlib import pyplot  # noqa: PLC0415 - after the choice of the backend

    shown = [(case, _medians(results, case)) for case in _measured(results)]
    shown = [(case, medians) for case, medians in shown if medians]
    if not shown:
        return
    height = 0.6 + 2.4 * len(shown)
    figure, all_axes = pyplot.subplots(
        len(shown), 1, figsize=(8, height), squeeze=False, layout="constrained"
    )
    for (case, medians), axes in zip(shown, all_axes[:, 0], strict=True):
        colours = [_COLOURS[CONTENDERS[name].family] for name in medians]
        bars = axes.barh(list(medians), list(medians.values()), color=colours)
        axes.bar_label(bars, [f" {number(value)} s" for value in medians.values()])
        axes.margins(x=0.15)
        axes.invert_yaxis()
        axes.set_title(case.title.format(**results.plans[case.name]), loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[-1, 0].set_xlabel("seconds, the median of the repeats")
    figure.savefig(file, dpi=120, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)


def _medians(results: Results, case: Case) -> dict[str, float]:
    if case.headline != "seconds":
        return {}
    found = {name: results.median(case.name, name, "seconds") for name in CONTENDERS}
    return {name: value for name, value in found.items() if value is not None}
