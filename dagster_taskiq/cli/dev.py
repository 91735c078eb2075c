"""``dagster-taskiq dev``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click

from dagster_taskiq.cli.completing import complete_queue
from dagster_taskiq.cli.options import check_platform, config_yaml_option, say_errors
from dagster_taskiq.dev.run import DevOptions, run_dev

#: Seconds that steps may still take at the end, before they are cancelled.
_DRAIN_SECONDS = 1

#: Options of ``dagster dev`` that are passed on, by our parameters.
_OF_DAGSTER = {
    "python_file": "--python-file",
    "module_name": "--module-name",
    "package_name": "--package-name",
    "workspace": "--workspace",
    "working_directory": "--working-directory",
    "attribute": "--attribute",
    "host": "--host",
    "port": "--port",
}

_FILE = click.Path(exists=True, dir_okay=False)

_LOG_LEVELS = ["critical", "error", "warning", "info", "debug"]


@click.command("dev")
@click.option(
    "--python-file", "-f", type=_FILE, multiple=True, help="Python file with definitions."
)
@click.option("--module-name", "-m", multiple=True, help="Module with definitions.")
@click.option("--package-name", multiple=True, help="Package with definitions.")
@click.option("--workspace", "-w", type=_FILE, multiple=True, help="Workspace file of Dagster.")
@click.option(
    "--working-directory",
    "-d",
    type=click.Path(exists=True, file_okay=False),
    help="Directory in which the code is loaded.",
)
@click.option("--attribute", "-a", help="Name of the definitions in the file or module.")
@click.option("--host", "-h", default="127.0.0.1", show_default=True, help="Of the UI.")
@click.option("--port", "-p", type=click.IntRange(1, 65535), help="Of the UI. 3000, or a free one.")
@click.option(
    "--concurrency",
    "-c",
    type=click.IntRange(min=1),
    help="How many steps, and how many runs, go on at once. The number of cores by default.",
)
@click.option(
    "--queue",
    "-q",
    "queues",
    multiple=True,
    shell_complete=complete_queue,
    help="Queue that the worker listens on. Repeat it, or give several with commas.",
)
@config_yaml_option
@click.option(
    "--reload/--no-reload",
    default=True,
    show_default=True,
    help="Whether the worker runs new code when a Python file below this directory has changed.",
)
@click.option(
    "--log-level",
    type=click.Choice(_LOG_LEVELS, case_sensitive=False),
    default="info",
    show_default=True,
    help="Least severe level of what Dagster's services and the worker log.",
)
@click.argument("dagster_arguments", nargs=-1, type=click.UNPROCESSED)
@say_errors
def dev(
    dagster_arguments: Sequence[str], config_yaml: str | None, log_level: str, **given: Any
) -> None:
    """Run Dagster's UI and daemon, and a worker with all that it needs, until Ctrl-C.

    Further options of "dagster dev" may follow after --. Without DAGSTER_HOME everything is in a
    temporary directory.
    """
    check_platform()
    options = DevOptions(
        config_yaml=config_yaml,
        dagster=[*_dagster_options(given), "--log-level", log_level, *dagster_arguments],
        worker=_worker_options(given, log_level),
        host=given["host"],
        port=given["port"],
    )
    sys.exit(run_dev(options))


def _dagster_options(given: Mapping[str, Any]) -> list[str]:
    found = []
    for name, option in _OF_DAGSTER.items():
        values = given[name] if isinstance(given[name], tuple) else (given[name],)
        for value in values:
            if value is not None:
                found += [option, str(value)]
    return found


def _worker_options(given: Mapping[str, Any], log_level: str) -> list[str]:
    found = ["--name", "dev", "--drain-timeout", str(_DRAIN_SECONDS), "--loglevel", log_level]
    if given["concurrency"] is not None:
        found += ["-c", str(given["concurrency"])]
    for queue in given["queues"]:
        found += ["-q", queue]
    return [*found, "--reload"] if given["reload"] else found
