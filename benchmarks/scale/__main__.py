"""``python -m benchmarks.scale``; what the figures mean is in docs/scaling.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from benchmarks.machine import describe_machine
from benchmarks.namespace import given_redis, own_redis
from benchmarks.processes import interrupt_on_signals
from benchmarks.report import number
from benchmarks.scale.crowd import CROWDS, WORKING_SHARE, Crowd
from benchmarks.scale.measuring import measure
from benchmarks.scale.replay import find_knee
from benchmarks.scale.simulation import simulate
from benchmarks.scale.tables import CONTENDERS, render

_PARTS = ("measure", "simulate", "knee")
_FILE = click.Path(path_type=Path, dir_okay=False)
_REDIS = click.option("--redis", "url", help="URL of a Redis to use; default: one of its own.")


@click.group()
def main() -> None:
    """What a large deployment costs: measured, simulated, computed."""
    interrupt_on_signals()


@main.command("simulate")
@click.option("--workers", default=1000, show_default=True)
@click.option("--slots", default=8, show_default=True, help="Of each worker.")
@click.option(
    "--busy", "busy_share", default=1.0, show_default=True, help="Share of the slots; 0 is no run."
)
@click.option("--lease", "lease_seconds", default=30.0, show_default=True, help="Seconds.")
@click.option("--step", "step_seconds", type=float, help="Seconds; default: a step never ends.")
@click.option("--runs", default=20, show_default=True)
@click.option("--waiting", default=0, show_default=True, help="Steps of a run without a slot.")
@click.option("--seconds", default=60.0, show_default=True, help="To watch the server.")
@click.option("--processes", default=2, show_default=True, help="For the workers.")
@_REDIS
@click.option("--json", "file", type=_FILE, help="File for the figures.")
def _simulate(url: str | None, file: Path | None, **crowd: Any) -> None:
    """Put the lease and control traffic of a crowd of workers on a Redis."""
    runs = crowd["runs"] if crowd["busy_share"] else 0
    with given_redis(url) if url else own_redis() as options:
        figures = simulate(Crowd(**{**crowd, "runs": runs}), options)
    for name, value in figures.items():
        click.echo(f"{name:32}{number(value) if isinstance(value, (int, float)) else value}")
    if file:
        _save(file, figures)


@main.command("knee")
@click.option("--workers", default=1000, show_default=True)
@click.option("--slots", default=8, show_default=True, help="Of each worker.")
@click.option("--lease", default=30.0, show_default=True, help="To begin with, in seconds.")
@click.option("--seconds", default=8.0, show_default=True, help="Of each level.")
@_REDIS
def _knee(workers: int, slots: int, lease: float, seconds: float, url: str | None) -> None:
    """Renew leases more and more often until the server cannot follow."""
    levels = []
    with given_redis(url) if url else own_redis() as options:
        for level in find_knee(options, workers, slots, lease, seconds):
            levels.append(level)
            click.echo(f"lease {level['lease_seconds']:.2f} s", err=True)
    click.echo(render({"machine": describe_machine(), "knee": levels})["knee"])


@main.command("refresh")
@click.argument("file", type=_FILE)
@click.option("--only", "parts", multiple=True, type=click.Choice(_PARTS), help="Default: all.")
@click.option("--crowd", "crowds", multiple=True, type=click.Choice(list(CROWDS)))
@click.option("--workers", default=1000, show_default=True, help="Of the simulations.")
@click.option("--seconds", default=60.0, show_default=True, help="Of each simulation.")
def _refresh(
    file: Path, parts: tuple[str, ...], crowds: tuple[str, ...], workers: int, seconds: float
) -> None:
    """Take the figures of docs/scaling.md anew and keep them in a file: some ten minutes.

    ``python -m benchmarks figures`` puts them into the page.
    """
    document: dict[str, Any] = json.loads(file.read_text("utf8")) if file.exists() else {}
    document["machine"] = describe_machine()
    names = {"measure": tuple(CONTENDERS), "simulate": crowds or tuple(CROWDS), "knee": ("levels",)}
    for part in parts or _PARTS:
        for name in names[part]:
            if part == "measure":
                document.setdefault("measured", {})[name] = measure(name)
            elif part == "simulate":
                count = max(1, round(workers * (WORKING_SHARE if name == "working" else 1.0)))
                crowd = replace(CROWDS[name], workers=count, seconds=seconds)
                with own_redis() as options:
                    document.setdefault("simulated", {})[name] = simulate(crowd, options)
            else:
                with own_redis() as options:
                    document["knee"] = list(find_knee(options, workers))
            _save(file, document)
    for name, table in render(document).items():
        click.echo(f"\n{name}\n\n{table}")


def _save(file: Path, document: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
