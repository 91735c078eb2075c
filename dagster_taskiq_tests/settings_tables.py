"""The README's tables of settings: ``python -m dagster_taskiq_tests.settings_tables`` writes them.

They are made of the fields of ``Settings`` and ``ConfigSource``, as is everything else that knows
which settings there are. A test compares the README with them.
"""

from __future__ import annotations

from pathlib import Path

import dagster_taskiq
from dagster_taskiq.config.config_source import ConfigSource
from dagster_taskiq.config.setting import Setting, settings_of
from dagster_taskiq.config.settings import Settings

README = Path(dagster_taskiq.__file__).parent.parent / "README.md"

#: By the name that stands in the README's comments around each table.
TABLES: dict[str, type] = {"settings": Settings, "config_source": ConfigSource}


def written(text: str) -> str:
    """The text of a README with its tables made anew.

    Raises:
        ValueError: the comments around a table are missing.
    """
    for name, owner in TABLES.items():
        text = with_table(text, name, _table(owner))
    return text


def with_table(text: str, name: str, table: str) -> str:
    """A text with a table put between the comments that name it.

    Raises:
        ValueError: the comments are missing.
    """
    before, start, rest = text.partition(f"<!-- table of {name}, generated -->\n")
    _, end, after = rest.partition("<!-- end of table -->\n")
    if not start or not end:
        raise ValueError(f"The table of {name} has no place in the text.")
    return f"{before}{start}\n{table}\n{end}{after}"


def _table(owner: type) -> str:
    rows = ["| setting | default | meaning |", "| --- | --- | --- |"]
    return "\n".join([*rows, *map(_row, settings_of(owner))]) + "\n"


def _row(row: Setting) -> str:
    return f"| `{row.name}` | {row.default_text} | {row.text} |"


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf8")), encoding="utf8")
