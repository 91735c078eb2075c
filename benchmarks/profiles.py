"""Where the time of a step goes: a run and what a child does for it, under cProfile.

``task_always_eager`` runs the steps in the run's own process, through the code that a worker's
child runs; the servers and the waiting are left out.
"""

from __future__ import annotations

import pstats
import shutil
from pathlib import Path

import click

from benchmarks.contenders import CONTENDERS, Namespace
from benchmarks.lab import Plan, open_lab, seconds_of


def profile_steps(space: Namespace, job: str, steps: int, lines: int, output: Path | None) -> None:
    """Print what takes the most time.

    Args:
        job: a chain or a parallel one.
        lines: how many functions to print.
        output: where to put the whole profile, for ``python -m pstats`` or a viewer.
    """
    with open_lab(CONTENDERS["taskiq-embedded"], space, [job]) as lab:
        file = lab.directory / "profile"
        eager = {"config_source": {"task_always_eager": True}}
        record = lab.run(job, Plan(steps=steps, slots=1), profile=file, execution=eager)
        seconds = seconds_of(record)
        click.echo(f"{seconds:.2f} s, {1000 * seconds / steps:.1f} ms a step, under the profiler")
        stats = pstats.Stats(str(file))
        for order in ("cumulative", "tottime"):
            stats.sort_stats(order).print_stats(lines)
        if output:
            shutil.copyfile(file, output)
