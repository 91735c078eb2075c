"""``dagster-taskiq demo``."""

from __future__ import annotations

import sys

import click

from dagster_taskiq.cli.options import check_platform, say_errors
from dagster_taskiq.demo.run import run_demo


@click.command("demo")
@say_errors
def demo() -> None:
    """Show a job on two workers. It starts what it needs, and stops it again."""
    check_platform()
    sys.exit(run_demo())
