"""``python -m benchmarks``; see README.md."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from benchmarks.cases import CASES
from benchmarks.contenders import CONTENDERS
from benchmarks.machine import describe_machine
from benchmarks.namespace import open_namespace
from benchmarks.plot import write_plots
from benchmarks.profiles import profile_steps
from benchmarks.report import number, print_report
from benchmarks.results import Sample
from benchmarks.session import Session, take_samples

_POSITIVE = click.IntRange(min=1)


@click.group(invoke_without_command=True)
@click.option("--case", "-c", "cases", multiple=True, type=click.Choice(list(CASES)))
@click.option("--contender", "-x", "contenders", multiple=True, type=click.Choice(list(CONTENDERS)))
@click.option("--repeat", "-r", type=_POSITIVE, help="Repeats. Default: the case's own.")
@click.option("--steps", type=_POSITIVE, help="Steps. Default: the case's own.")
@click.option("--slots", type=_POSITIVE, help="Slots. Default: the case's own.")
@click.option("--limit", type=float, help="Seconds that a run may take. Default: the case's own.")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    default=Path("benchmark-results"),
    show_default=True,
    help="Files for the results, without suffix: .json, .png, .svg.",
)
@click.option("--keep", is_flag=True, help="Keep the logs of what fails or does not end.")
@click.pass_context
def main(context: click.Context, /, **options: Any) -> None:
    """Measure dagster-taskiq beside dagster-celery and Dagster's own executors."""
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, _interrupt)
    if context.invoked_subcommand is None:
        _measure(**options)


def _measure(
    cases: tuple[str, ...],
    contenders: tuple[str, ...],
    repeat: int | None,
    steps: int | None,
    slots: int | None,
    limit: float | None,
    output: Path,
    keep: bool,
) -> None:
    session = Session(describe_machine())
    file = output.with_suffix(".json")
    try:
        with open_namespace() as space:
            for case in [CASES[name] for name in cases or CASES]:
                plan = case.sized(steps, slots, limit)
                chosen = list(dict.fromkeys(contenders or case.contenders))
                repeats = repeat or case.repeats
                for sample in take_samples(session, case, plan, chosen, repeats, space, keep):
                    click.echo(_line(sample))
                    session.save(file)
    except KeyboardInterrupt:
        click.echo("Interrupted; this is what there is so far.", err=True)
        _conclude(session, output)
        sys.exit(130)
    _conclude(session, output)


def _conclude(session: Session, output: Path) -> None:
    print_report(session.results, session.machine, session.plans)
    for file in write_plots(session.results, session.plans, output):
        click.echo(f"Wrote {file}")


def _line(sample: Sample) -> str:
    said = ", ".join(f"{name} {number(value)}" for name, value in sample.metrics.items())
    return f"{sample.case} {sample.repeat + 1}: {sample.contender}: {sample.problem or said}"


def _interrupt(*_: object) -> NoReturn:
    """End the program; a second signal must not keep it from clearing up."""
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, signal.SIG_IGN)
    raise KeyboardInterrupt


@main.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Write the plots there.")
@click.option("--markdown", is_flag=True, help="Print tables for a README.")
def report(files: tuple[Path, ...], output: Path | None, markdown: bool) -> None:
    """Print the report of result files; of a case in several, the last one counts."""
    session = Session.load(files[-1])
    for earlier in [Session.load(file) for file in reversed(files[:-1])]:
        missing = earlier.plans.keys() - session.plans.keys()
        session.samples += [sample for sample in earlier.samples if sample.case in missing]
        session.plans |= {name: earlier.plans[name] for name in missing}
    print_report(session.results, session.machine, session.plans, markdown)
    if output:
        write_plots(session.results, session.plans, output)


@main.command()
@click.option("--case", "-c", type=click.Choice(["chain", "parallel"]), default="chain")
@click.option("--steps", type=_POSITIVE, default=50, show_default=True)
@click.option("--lines", type=_POSITIVE, default=40, show_default=True)
@click.option("--output", "-o", type=click.Path(path_type=Path), help="File for pstats.")
def profile(case: str, steps: int, lines: int, output: Path | None) -> None:
    """Profile a worker's and a run's work on steps, in one process without servers between."""
    with open_namespace() as space:
        profile_steps(space, f"{case}_{steps}", steps, lines, output)


if __name__ == "__main__":
    main()
