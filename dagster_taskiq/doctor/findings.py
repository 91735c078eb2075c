"""What a check brings."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Level(str, Enum):
    """How a check ends."""

    OK = "ok"
    #: It cannot be made, or is about nothing here; the summary says why.
    SKIP = "skip"
    #: It may be meant so, or will cost something one day.
    WARN = "WARN"
    #: Steps or runs fail by it, wait for ever, or may be lost.
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """What one check has found.

    Attributes:
        summary: what is so, in a line.
        advice: what to do, in sentences; empty where there is nothing to do.
    """

    level: Level
    summary: str
    advice: str = ""


def ok(summary: str) -> Finding:
    """All is as it must be."""
    return Finding(Level.OK, summary)


def skip(why: str) -> Finding:
    """The check was not made."""
    return Finding(Level.SKIP, why)


def warn(summary: str, advice: str) -> Finding:
    """Something may be wrong."""
    return Finding(Level.WARN, summary, advice)


def fail(summary: str, advice: str) -> Finding:
    """Something is wrong."""
    return Finding(Level.FAIL, summary, advice)
