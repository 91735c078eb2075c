"""The tables of docs/metrics.md: ``python -m dagster_taskiq_tests.metric_tables`` writes them.

They are made of ``monitoring.definitions``, as the metrics themselves are. A test compares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import dagster_taskiq
from dagster_taskiq.monitoring.definitions import (
    EXPORTER_METRICS,
    WORKER_METRICS,
    Definition,
)
from dagster_taskiq_tests.settings_tables import with_table

PAGE = Path(dagster_taskiq.__file__).parent.parent / "docs" / "metrics.md"

#: By the name that stands in the page's comments around each table.
TABLES: Mapping[str, Sequence[Definition]] = {
    "a worker's metrics": WORKER_METRICS,
    "the exporter's metrics": EXPORTER_METRICS,
}


def written(text: str) -> str:
    """The text of the page with its tables made anew.

    Raises:
        ValueError: the comments around a table are missing.
    """
    for name, metrics in TABLES.items():
        rows = ["| metric | type | labels | meaning |", "| --- | --- | --- | --- |"]
        rows += map(_row, metrics)
        text = with_table(text, name, "\n".join(rows) + "\n")
    return text


def _row(metric: Definition) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.name}` | {metric.type.value} | {labels} | {metric.text} |"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf8")), encoding="utf8")
