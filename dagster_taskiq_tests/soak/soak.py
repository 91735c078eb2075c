"""A soak from its beginning to its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dagster_taskiq_tests.acceptance.harness import check_nothing_is_left
from dagster_taskiq_tests.soak.director import FAULT_SECONDS, Director
from dagster_taskiq_tests.soak.evidence import judge, keep_logs, stop_workers
from dagster_taskiq_tests.soak.faults import faults_of
from dagster_taskiq_tests.soak.report import figures
from dagster_taskiq_tests.soak.stack import Kind, open_soak_stack


def soak(
    kind: Kind,
    seconds: float,
    seed: int,
    directory: Path,
    fault_seconds: float = FAULT_SECONDS,
) -> dict[str, Any]:
    """One soak; its figures.

    Args:
        kind: of the broker.
        seconds: that runs are started and faults strike; what was begun is waited for.
        seed: of all that is left to chance.
        directory: an empty one, for logs and trace.
        fault_seconds: between two faults, on average.
    """
    with open_soak_stack(kind, directory) as (stack, other_home, server, database):
        director = Director(kind, stack, other_home, server, database, seed)
        try:
            director.play(seconds, faults_of(director, seconds), fault_seconds)
            verdict = judge(director, director.calm_down())
            keep_logs(director)
            stop_workers(director, verdict)
        finally:
            director.close()
    try:
        check_nothing_is_left()
    except AssertionError as error:
        verdict.left["processes"] += 1
        verdict.others.append(str(error))
    return figures(director, verdict, seed, seconds)
