"""``python -m benchmarks figures``: which page shows which of the tables made from files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from benchmarks.report import speed_table, targets_table
from benchmarks.results import Results
from benchmarks.scale.tables import render

_ROOT = Path(__file__).parents[1]

RESULTS_FILE = _ROOT / "benchmarks/results.json"
PLOT_FILE = _ROOT / "docs/benchmarks.svg"
SCALING_FILE = _ROOT / "docs/scaling.json"


def tables_of_pages() -> dict[Path, dict[str, str]]:
    """By page and name; a page says by comments where they are, see ``fill``."""
    results = Results.load(RESULTS_FILE)
    return {
        _ROOT / "README.md": {"speed": speed_table(results).markdown()},
        _ROOT / "benchmarks/README.md": {"targets": targets_table(results).markdown("---")},
        _ROOT / "docs/scaling.md": render(json.loads(SCALING_FILE.read_text("utf8"))),
    }


def fill(page: str, tables: Mapping[str, str]) -> str:
    """A page with its tables replaced: what stands between ``<!-- NAME -->`` and ``<!-- / -->``."""

    def replaced(match: re.Match[str]) -> str:
        table = tables.get(match["name"])
        return match[0] if table is None else f"{match['head']}\n{table}\n{match['tail']}"

    pattern = r"(?P<head><!-- (?P<name>[\w -]+) -->)\n.*?(?P<tail><!-- / -->)"
    return re.sub(pattern, replaced, page, flags=re.DOTALL)
