"""How listings look: the same in a terminal and in a pipe, but for colours."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TextIO

import click

from dagster_taskiq.messages.plain_text import plain_reason

#: Stands for what the server or the worker does not tell.
DASH = "-"

#: Characters of an id that a table shows, as Dagster's UI does.
ID_CHARACTERS = 8

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Write JSON; docs/command-line.md describes it."
)


def echo_json(shape: Mapping[str, Any]) -> None:
    """Write one line of JSON in a pipe, and lines for people in a terminal."""
    is_for_people = sys.stdout.isatty()
    click.echo(json.dumps(shape, indent=2 if is_for_people else None))


def echo_table(
    rows: Sequence[Sequence[str]],
    *,
    red: Collection[int] = (),
    below: Mapping[int, str] | None = None,
    indent: str = "",
) -> None:
    """Write rows in columns, each as wide as its longest text: nothing is ever cut.

    Args:
        rows: usually the first one has the names of the columns.
        red: numbers of the rows that are marked in a terminal.
        below: texts that stand below rows, by the numbers of these.
    """
    plain, widths = _measured(rows)
    for number, row in enumerate(plain):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        line = indent + "  ".join(cells).rstrip()
        click.echo(in_red(line) if number in red else line)
        if text := (below or {}).get(number):
            echo_sentence(text, indent=f"{indent}  ")


def fits(rows: Sequence[Sequence[str]]) -> bool:
    """Whether each row of a table has room in a line: in a pipe always."""
    _, widths = _measured(rows)
    width = sum(widths) + 2 * (len(widths) - 1)
    return not is_terminal(sys.stdout) or width <= shutil.get_terminal_size().columns


def is_terminal(stream: TextIO) -> bool:
    """Whether people read there, in lines of some width."""
    return stream.isatty()


def _measured(rows: Sequence[Sequence[str]]) -> tuple[list[list[str]], list[int]]:
    """The cells as they are shown, and how wide the columns are."""
    plain = [[plain_line(cell) for cell in row] for row in rows]
    return plain, [max(len(cell) for cell in column) for column in zip(*plain, strict=True)]


def echo_sentence(
    text: str, *, indent: str = "", is_red: bool = False, is_aside: bool = False
) -> None:
    """Write a text, which is broken between words in a terminal and nowhere in a pipe.

    Args:
        is_red: whether it is marked in a terminal.
        is_aside: whether it goes to standard error.
    """
    line = folded(text, sys.stderr if is_aside else sys.stdout, indent)
    click.echo(in_red(line) if is_red else line, err=is_aside)


def folded(text: str, stream: TextIO, indent: str = "", hang: int = 2) -> str:
    """A text in lines of a terminal's width, broken between words; in one line for a pipe.

    Args:
        indent: of the first line.
        hang: how much further in the others begin, in characters.
    """
    line = plain_line(text)
    if not is_terminal(stream):
        return indent + line
    return textwrap.fill(
        line,
        shutil.get_terminal_size().columns,
        initial_indent=indent,
        subsequent_indent=indent + " " * hang,
        break_long_words=False,
        break_on_hyphens=False,
    )


def plain_line(text: str) -> str:
    """A text that somebody else may have written, in one line."""
    return plain_reason(text).replace("\n", " ").replace("\t", " ")


def in_red(line: str) -> str:
    """A line that is red in a terminal."""
    return click.style(line, fg="red")


def time_since(at: float | None) -> str:
    """How long ago a moment was, in its largest unit; clocks of other hosts may be ahead.

    Args:
        at: seconds since the epoch; None where nobody knows.
    """
    return DASH if at is None else seconds_in_words(time.time() - at)


def seconds_in_words(seconds: float) -> str:
    """Such as ``12 s``, ``3 min``, ``5 h`` or ``2 d``, rounded down."""
    whole = max(0, int(seconds))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if whole >= 2 * size:
            return f"{whole // size} {unit}"
    return f"{whole} s"


def size_in_words(size_bytes: int) -> str:
    """Such as ``512 MiB`` or ``1.5 GiB``."""
    mebibytes = size_bytes / 2**20
    return f"{mebibytes:.0f} MiB" if mebibytes < 1000 else f"{mebibytes / 1024:.1f} GiB"


def short_id(text: str) -> str:
    """The beginning of an id, which commands take for the whole."""
    return text[:ID_CHARACTERS]


def count_of(count: int, word: str) -> str:
    """Such as ``1 node`` or ``2 nodes``."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def echo_fields(fields: Mapping[str, str | tuple[str, ...]]) -> None:
    """Write what is known of one thing, a line each.

    Args:
        fields: by its name the value, or several, of which each has a line of its own.
    """
    width = max(map(len, fields))
    for name, value in fields.items():
        values = (value,) if isinstance(value, str) else value
        for number, line in enumerate(values or (DASH,)):
            click.echo(f"{('' if number else name).ljust(width)}  {plain_line(line)}")
