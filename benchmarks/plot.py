"""The plot for the README: how long each contender takes, case by case."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks.cases import CASES
from benchmarks.contenders import CONTENDERS
from benchmarks.report import number
from benchmarks.results import Results

_COLOURS = {
    "taskiq": "#2a6fdb",
    "celery": "#e08b2d",
    "multiprocess": "#8a8a8a",
    "in-process": "#444444",
}


def write_plots(results: Results, plans: Mapping[str, Any], path: Path) -> list[Path]:
    """Write a PNG and an SVG of the cases that measure wall time.

    Args:
        path: without a suffix.

    Returns:
        the files; none if there is nothing to show.
    """
    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "dagster-taskiq"  # the same figures give the same file
    from matplotlib import pyplot  # noqa: PLC0415 - after the choice of the backend

    cases = [case for case in CASES.values() if case.name in plans and case.headline == "seconds"]
    shown = {case.name: _medians(results, case.name) for case in cases}
    cases = [case for case in cases if shown[case.name]]
    if not cases:
        return []
    figure, all_axes = pyplot.subplots(
        len(cases), 1, figsize=(8, 0.6 + 2.4 * len(cases)), squeeze=False, layout="constrained"
    )
    for case, axes in zip(cases, all_axes[:, 0], strict=True):
        medians = shown[case.name]
        names = list(medians)
        colours = [_COLOURS[CONTENDERS[name].family] for name in names]
        bars = axes.barh(names, list(medians.values()), color=colours)
        axes.bar_label(bars, [f" {number(value)} s" for value in medians.values()])
        axes.margins(x=0.15)
        axes.invert_yaxis()
        axes.set_title(case.title.format(**plans[case.name]), loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[-1, 0].set_xlabel("seconds, the median of the repeats")
    files = [path.with_suffix(".png"), path.with_suffix(".svg")]
    for file in files:
        figure.savefig(file, dpi=120, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)
    return files


def _medians(results: Results, case: str) -> dict[str, float]:
    found = {name: results.median(case, name, "seconds") for name in CONTENDERS}
    return {name: value for name, value in found.items() if value is not None}
