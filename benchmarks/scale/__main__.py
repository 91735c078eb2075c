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
from benchmarks.scale.crowd import Crowd
from benchmarks.scale.measuring import measure
from benchmarks.scale.replay import find_knee
from benchmarks.scale.simulation import simulate
from benchmarks.scale.tables import render

_CONTENDERS = ("taskiq-redis", "taskiq-rabbitmq")
_PARTS = ("measure", "simulate", "knee")
_FILE = click.Path(path_type=Path, dir_okay=False)

#: The crowds of the page, by name.
_HELD = Crowd(step_seconds=None)
CROWDS: Mapping[str, Crowd] = {
    "idle": replace(_HELD, busy_share=0.0, runs=0),
    "busy": _HELD,
    "listing": replace(_HELD, waiting=5),
    "working": Crowd(waiting=5),
}

#: Of the workers, since each step costs the simulation more than all else does.
_WORKING_SHARE = 0.25


@click.group()
def main() -> None:
    """What a large deployment costs: measured, simulated, computed."""
    interrupt_on_signals()


@main.command("simulate")
@click.option("--workers", default=1000, show_default=True)
@click.option("--slots", default=8, show_default=True, help="Of each worker.")
@click.option("--busy", default=1.0, show_default=True, help="Share of the slots; 0 is no run.")
@click.option("--lease", default=30.0, show_default=True, help="Seconds.")
@click.option("--step", type=float, help="Seconds that a step takes; default: it never ends.")
@click.option("--runs", default=20, show_default=True)
@click.option("--waiting", default=0, show_default=True, help="Steps of a run without a slot.")
@click.option("--seconds", default=60.0, show_default=True, help="To watch the server.")
@click.option("--processes", default=2, show_default=True, help="For the workers.")
@click.option("--redis", "url", help="URL of a Redis to use; default: one of its own.")
@click.option("--json", "file", type=_FILE, help="File for the figures.")
def _simulate(
    workers: int,
    slots: int,
    busy: float,
    lease: float,
    step: float | None,
    runs: int,
    waiting: int,
    seconds: float,
    processes: int,
    url: str | None,
    file: Path | None,
) -> None:
    """Put the lease and control traffic of a crowd of workers on a Redis."""
    crowd = Crowd(
        workers, slots, busy, runs if busy else 0, waiting, lease, step, seconds, processes
    )
    with given_redis(url) if url else own_redis() as options:
        figures = simulate(crowd, options)
    for name, value in figures.items():
        click.echo(f"{name:32}{number(value) if isinstance(value, (int, float)) else value}")
    if file:
        file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf8")


@main.command("knee")
@click.option("--workers", default=1000, show_default=True)
@click.option("--slots", default=8, show_default=True, help="Of each worker.")
@click.option("--lease", default=30.0, show_default=True, help="To begin with, in seconds.")
@click.option("--seconds", default=8.0, show_default=True, help="Of each level.")
@click.option("--redis", "url", help="URL of a Redis to use; default: one of its own.")
def _knee(workers: int, slots: int, lease: float, seconds: float, url: str | None) -> None:
    """Renew leases more and more often until the server cannot follow."""
    sizes = {"workers": workers, "slots": slots}
    levels = []
    with given_redis(url) if url else own_redis() as options:
        for level in find_knee(options, **sizes, first_lease_seconds=lease, level_seconds=seconds):
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
    for part in parts or _PARTS:
        if part == "measure":
            for name in _CONTENDERS:
                document.setdefault("measured", {})[name] = measure(name)
                _save(file, document)
        elif part == "knee":
            with own_redis() as options:
                document["knee"] = list(find_knee(options, workers=workers))
        else:
            for name in crowds or CROWDS:
                with own_redis() as options:
                    share = _WORKING_SHARE if name == "working" else 1.0
                    count = max(1, round(workers * share))
                    crowd = replace(CROWDS[name], workers=count, seconds=seconds)
                    document.setdefault("simulated", {})[name] = simulate(crowd, options)
                _save(file, document)
        _save(file, document)
    for name, table in render(document).items():
        click.echo(f"\n{name}\n\n{table}")


def _save(file: Path, document: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
