"""Writes the table of the doctor's checks into its document: ``python -m`` this module."""

from __future__ import annotations

from pathlib import Path

import dagster_taskiq
from dagster_taskiq.doctor import table_of_checks

DOCUMENT = Path(dagster_taskiq.__file__).parent.parent / "docs" / "doctor.md"


def write() -> None:
    """Put the table of the code in place of the one that is there."""
    text = DOCUMENT.read_text(encoding="utf8")
    start = text.index("| check |")
    end = text.index("\n\n", start) + 1
    DOCUMENT.write_text(text[:start] + table_of_checks() + text[end:], encoding="utf8")


if __name__ == "__main__":
    write()
