"""How times, counts and states are said on the page."""

from __future__ import annotations

from datetime import datetime, timezone

#: Stands for what a server or a worker does not tell.
DASH = "\N{EN DASH}"

#: Characters of an id that are shown, as in Dagster's UI.
ID_CHARACTERS = 8

_UNITS = ((86400, "d"), (3600, "h"), (60, "min"))


def duration(seconds: float | None) -> str:
    """Such as ``12 s``, ``3 min 5 s``, ``5 h 2 min`` or ``2 d 4 h``; clocks may differ."""
    if seconds is None:
        return DASH
    whole = max(0, int(seconds))
    for number, (size, unit) in enumerate(_UNITS):
        if whole >= size:
            smaller, name = _UNITS[number + 1] if number + 1 < len(_UNITS) else (1, "s")
            rest = whole % size // smaller
            return f"{whole // size} {unit}" + (f" {rest} {name}" if rest else "")
    return f"{whole} s"


def short_duration(seconds: float | None) -> str:
    """Of something that may have taken less than a second: such as ``40 ms`` or ``1.5 s``."""
    if seconds is None:
        return DASH
    if seconds < 1:
        return f"{max(1, round(1000 * seconds))} ms"
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)


def ago(at: float | None, now: float) -> str:
    """How long ago a moment was, in its largest unit alone.

    Args:
        at, now: seconds since the epoch.
    """
    if at is None:
        return DASH
    seconds = max(0, int(now - at))
    for size, unit in _UNITS:
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"


def moment(at: float | None) -> str:
    """In UTC, for whoever wants it exactly; empty for none."""
    try:
        return "" if at is None else f"{datetime.fromtimestamp(at, timezone.utc):%F %T} UTC"
    except (OverflowError, ValueError, OSError):  # some clock says the year 40000
        return ""


def count_of(count: int, word: str) -> str:
    """Such as ``1 worker`` or ``1,200 workers``."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def size(count: int) -> str:
    """Such as ``512 MiB`` or ``1.5 GiB``, of bytes."""
    mebibytes = count / 2**20
    return f"{mebibytes:.0f} MiB" if mebibytes < 1000 else f"{mebibytes / 1024:.1f} GiB"


def short_id(text: str) -> str:
    """The beginning of an id."""
    return text[:ID_CHARACTERS]
