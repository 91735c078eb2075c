"""``python -m benchmarks``; see README.md."""

from __future__ import annotations

import pstats
import shutil
import sys
from pathlib import Path

import click

from benchmarks.cases import CASES
from benchmarks.contenders import CONTENDERS
from benchmarks.lab import Plan, open_lab
from benchmarks.machine import describe_machine
from benchmarks.namespace import open_namespace
from benchmarks.pages import PLOT_FILE, RESULTS_FILE, fill, tables_of_pages
from benchmarks.processes import interrupt_on_signals
from benchmarks.report import number, print_report, write_plot
from benchmarks.results import Results, Sample
from benchmarks.session import take_samples

_POSITIVE = click.IntRange(min=1)
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.group(invoke_without_command=True)
@click.option("--case", "-c", "cases", multiple=True, type=click.Choice(list(CASES)))
@click.option("--contender", "-x", "contenders", multiple=True, type=click.Choice(list(CONTENDERS)))
@click.option("--repeat", "-r", type=_POSITIVE, help="Repeats. Default: the case's own.")
@click.option("--steps", type=_POSITIVE, help="Steps. Default: the case's own.")
@click.option("--slots", type=_POSITIVE, help="Slots. Default: the case's own.")
@click.option("--runs", type=_POSITIVE, help="Launched runs. Default: the case's own.")
@click.option("--limit", type=float, help="Seconds that a run may take. Default: the case's own.")
@click.option(
    "--output",
    "-o",
    type=_FILE,
    default=Path("benchmark-results.json"),
    show_default=True,
    help="File for the results.",
)
@click.option("--keep", is_flag=True, help="Keep the logs of what fails or does not end.")
@click.pass_context
def main(
    context: click.Context,
    cases: tuple[str, ...],
    contenders: tuple[str, ...],
    repeat: int | None,
    steps: int | None,
    slots: int | None,
    runs: int | None,
    limit: float | None,
    output: Path,
    keep: bool,
) -> None:
    """Measure dagster-taskiq beside dagster-celery and Dagster's own executors."""
    interrupt_on_signals()
    if context.invoked_subcommand is not None:
        return
    results = Results(machine=describe_machine())
    is_interrupted = False
    try:
        with open_namespace() as space:
            for case in [CASES[name] for name in cases or CASES]:
                plan = case.sized(steps, slots, runs, limit)
                chosen = list(dict.fromkeys(contenders or case.contenders))
                repeats = repeat or case.repeats
                for sample in take_samples(results, case, plan, chosen, repeats, space, keep):
                    click.echo(_line(sample))
                    results.save(output)
    except KeyboardInterrupt:
        is_interrupted = True
        click.echo("Interrupted; this is what there is so far.", err=True)
    print_report(results)
    if is_interrupted:
        sys.exit(130)


def _line(sample: Sample) -> str:
    said = ", ".join(f"{name} {number(value)}" for name, value in sample.metrics.items())
    return f"{sample.case} {sample.repeat + 1}: {sample.contender}: {sample.problem or said}"


@main.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--plot", type=_FILE, help="Write a plot there: .png or .svg.")
def report(files: tuple[Path, ...], plot: Path | None) -> None:
    """Print the report of result files; of a case in several, the last one counts."""
    results = Results.load(*files)
    print_report(results)
    if plot:
        write_plot(results, plot)


@main.command()
def figures() -> None:
    """Make all tables and plots of the pages again, from the files of results and figures."""
    write_plot(Results.load(RESULTS_FILE), PLOT_FILE)
    for page, tables in tables_of_pages().items():
        page.write_text(fill(page.read_text("utf8"), tables), encoding="utf8")


@main.command()
@click.option("--case", "-c", type=click.Choice(["chain", "parallel"]), default="chain")
@click.option("--steps", type=_POSITIVE, default=50, show_default=True)
@click.option("--lines", type=_POSITIVE, default=40, show_default=True)
@click.option("--output", "-o", type=_FILE, help="File for pstats.")
def profile(case: str, steps: int, lines: int, output: Path | None) -> None:
    """Profile a worker's and a run's work on steps, in one process without servers between."""
    job = f"{case}_{steps}"
    with open_namespace() as space, open_lab(CONTENDERS["taskiq-embedded"], space, [job]) as lab:
        file = lab.directory / "profile"
        # the run's own process executes the steps, by the code that a worker's child runs
        eager = {"config_source": {"task_always_eager": True}}
        run = lab.run(job, Plan(steps=steps, slots=1), profile=file, execution=eager)
        click.echo(
            f"{run.seconds:.2f} s, {1000 * run.seconds / steps:.1f} ms a step, under the profiler"
        )
        stats = pstats.Stats(str(file))
        for order in ("cumulative", "tottime"):
            stats.sort_stats(order).print_stats(lines)
        if output:
            shutil.copyfile(file, output)


if __name__ == "__main__":
    main()
