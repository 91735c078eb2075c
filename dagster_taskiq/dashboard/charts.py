"""Small charts: where each bar and line is, for the template that draws them as SVG.

A chart is ``WIDTH`` by ``HEIGHT`` units, which the page stretches, and shows the last hour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dagster_taskiq.dashboard.memory import MEMORY_SECONDS, SAMPLE_SECONDS

WIDTH, HEIGHT = 360, 72

#: Between two samples that are farther apart nobody has looked, and the line is broken.
_GAP_SECONDS = 3 * SAMPLE_SECONDS

#: How many bars a chart has: one a minute.
BARS = 60


@dataclass(frozen=True)
class Bar:
    """A rectangle; ``title`` is what a pointer on it says."""

    x: float
    y: float
    width: float
    height: float
    tone: str
    title: str


@dataclass(frozen=True)
class Line:
    """A line, with its gaps, and the area below it.

    Attributes:
        path, area: as of the attribute ``d`` of an SVG path.
    """

    path: str
    area: str
    tone: str


@dataclass(frozen=True)
class Legend:
    """The name of a line or a kind of bar, and its present value or its sum."""

    name: str
    value: str
    tone: str


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        top: what the upper edge stands for.
        note: what is to be known to read it.
    """

    title: str
    top: str
    legends: Sequence[Legend]
    bars: Sequence[Bar] = ()
    lines: Sequence[Line] = ()
    note: str = ""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not self.bars and not self.lines


def nice_top(highest: float) -> float:
    """The next round number from a value on, for the upper edge."""
    size = 1.0
    while size < 1e12:
        for step in (1, 2, 3, 4, 5, 6, 8):
            if highest <= step * size:
                return step * size
        size *= 10
    return highest


#: Round times, in seconds.
_ROUND_SECONDS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 18000, 36000)


def nice_seconds(highest: float) -> float:
    """The same for a time."""
    return next((it for it in _ROUND_SECONDS if highest <= it), None) or nice_top(highest)


def stacked_bars(
    columns: Sequence[Sequence[int]], tones: Sequence[str], titles: Sequence[str], top: float
) -> list[Bar]:
    """Bars, one a column, the first number of each at the bottom."""
    width = WIDTH / max(1, len(columns))
    bars = []
    for number, (column, title) in enumerate(zip(columns, titles, strict=True)):
        y = float(HEIGHT)
        for count, tone in zip(column, tones, strict=True):
            if count:
                # one of many hundreds is to be seen too
                height = max(1.5, count / top * (HEIGHT - 2))
                y -= height
                x = number * width + width * 0.12
                bars.append(
                    Bar(
                        round(x, 2),
                        round(y, 2),
                        round(width * 0.76, 2),
                        round(height, 2),
                        tone,
                        title,
                    )
                )
    return bars


def line(
    points: Sequence[tuple[float, float]],
    now: float,
    top: float,
    tone: str,
    gap_seconds: float = _GAP_SECONDS,
) -> Line:
    """A line through moments and values.

    Args:
        points: seconds since the epoch, and the value; the oldest first.
        gap_seconds: two points that are farther apart are not joined.
    """
    strokes: list[list[tuple[float, float]]] = []
    last_at = float("-inf")
    for at, value in points:
        x = WIDTH * (1 - (now - at) / MEMORY_SECONDS)
        y = HEIGHT - 1 - value / top * (HEIGHT - 3)
        if at - last_at > gap_seconds:
            strokes.append([])
        strokes[-1].append((x, y))
        last_at = at
    path = " ".join(_path(stroke) for stroke in strokes)
    area = " ".join(
        f"{_path(stroke)} L{stroke[-1][0]:.1f} {HEIGHT} L{stroke[0][0]:.1f} {HEIGHT} Z"
        for stroke in strokes
        if len(stroke) > 1
    )
    return Line(path, area, tone)


def _path(stroke: Sequence[tuple[float, float]]) -> str:
    if len(stroke) == 1:  # a dot, which a line of no length is with round ends
        stroke = [*stroke, stroke[0]]
    return "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in stroke)


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which a share of them is, of at least one."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
