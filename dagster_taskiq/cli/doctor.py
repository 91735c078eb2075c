"""``doctor``: what is set in a way that runs fail by, a line each."""

from __future__ import annotations

import sys
from typing import Any

import click

from dagster_taskiq.cli.options import config_yaml_option, read_settings, say_errors
from dagster_taskiq.cli.tables import count_of, echo_json, folded, json_option
from dagster_taskiq.doctor import PROBE_SECONDS, Check, Finding, Level, examine, gather

#: In a terminal.
_STYLES: dict[Level, dict[str, Any]] = {
    Level.OK: {"fg": "green"},
    Level.SKIP: {"dim": True},
    Level.WARN: {"fg": "yellow"},
    Level.FAIL: {"fg": "red", "bold": True},
}


@click.command("doctor")
@click.option("--module", "-m", help="Module whose jobs are looked at, for their IO managers.")
@click.option(
    "--timeout",
    "-t",
    type=click.FloatRange(min=0, min_open=True),
    default=PROBE_SECONDS,
    show_default=True,
    help="Seconds to wait for the task that is sent through each queue.",
)
@json_option
@config_yaml_option
@say_errors
def doctor(module: str | None, timeout: float, as_json: bool, config_yaml: str | None) -> None:
    """Check what people get wrong: settings, servers, workers and Dagster's instance.

    A line a check: ok, skip (it cannot be made, or is about nothing here), WARN or FAIL, and what
    to do. The exit code is 1 where something has failed. It sends a task through each queue, of
    which nothing is executed.

    Give it the settings of the workers (-y), and run it where runs are executed.
    """
    findings = examine(gather(read_settings(config_yaml), module, timeout))
    failed = [check.name for check, finding in findings if finding.level is Level.FAIL]
    if as_json:
        echo_json(
            {
                "checks": [
                    {
                        "check": check.name,
                        "level": finding.level.value,
                        "summary": finding.summary,
                        "advice": finding.advice or None,
                    }
                    for check, finding in findings
                ],
                "is_healthy": not failed,
            }
        )
    else:
        for check, finding in findings:
            _echo(check, finding)
    if failed:
        have = "has" if len(failed) == 1 else "have"
        click.echo(
            f"{count_of(len(failed), 'check')} {have} failed: {', '.join(failed)}.", err=True
        )
        sys.exit(1)


def _echo(check: Check, finding: Finding) -> None:
    word = finding.level.value
    margin = max(len(level.value) for level in Level) + 2
    text = f"{word.ljust(margin)}{check.name}: {finding.summary}"
    lines = folded(text, sys.stdout, hang=margin)
    # folded before it is coloured, since the codes of a colour have no width
    click.echo(click.style(word, **_STYLES[finding.level]) + lines[len(word) :])
    if finding.advice:
        click.echo(folded(finding.advice, sys.stdout, " " * margin, hang=0))
