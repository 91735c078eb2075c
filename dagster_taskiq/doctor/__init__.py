"""What people get wrong, found before a run is lost by it: one line a check.

The evidence is gathered once (``gathering``); each check is a small function of it that returns a
finding, in the table of ``checks``. Nothing is changed on a server, but for the probes, which leave
an ended run of 100 bytes in the backend for an hour.
"""

from __future__ import annotations

from dagster_taskiq.doctor.checks import CHECKS, Check, examine, table_of_checks
from dagster_taskiq.doctor.findings import Finding, Level
from dagster_taskiq.doctor.gathering import gather
from dagster_taskiq.doctor.probe import PROBE_SECONDS

__all__ = [
    "CHECKS",
    "PROBE_SECONDS",
    "Check",
    "Finding",
    "Level",
    "examine",
    "gather",
    "table_of_checks",
]
