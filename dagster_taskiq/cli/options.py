"""What commands share: the settings file, the platform, and how an error is said."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import click

from dagster_taskiq.config.settings import Settings, check_config
from dagster_taskiq.config.settings_file import load_yaml
from dagster_taskiq.errors import DagsterTaskiqError
from dagster_taskiq.messages.plain_text import plain_reason

F = TypeVar("F", bound=Callable[..., Any])

config_yaml_option = click.option(
    "--config-yaml",
    "-y",
    type=click.Path(exists=True, dir_okay=False),
    help="YAML file with the settings, as in the config of a run: execution: config: broker: ...",
)

#: How long a command waits until a worker has obeyed, unless told. One whose backend is PostgreSQL
#: looks for orders every 5 s where there are a thousand.
ANSWER_SECONDS = 10.0

timeout_option = click.option(
    "--timeout",
    "-t",
    type=click.FloatRange(min=0, min_open=True),
    default=ANSWER_SECONDS,
    show_default=True,
    help="Seconds to wait for the answer.",
)
reason_option = click.option(
    "--reason", default="", help="For people: listings and the logs of runs show it."
)


def say_errors(command: F) -> F:
    """Turn errors of ours into one line and an exit code; anything else keeps its traceback."""

    @wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                return command(*args, **kwargs)
            except DagsterTaskiqError as error:
                # servers, workers and runs may have written a part of it
                raise click.ClickException(plain_reason(str(error))) from error

    return wrapper  # type: ignore[return-value]


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(f"Warning: {message}", err=True)


def check_platform() -> None:
    """Warn on a platform that is not meant for production."""
    if platform.system() == "Darwin":
        click.echo("Warning: macOS is for development; use Linux in production.", err=True)
    elif platform.system() != "Linux":
        click.echo(f"Warning: nobody has tried this on {platform.system()}; use Linux.", err=True)


def read_settings(config_yaml: str | None) -> Settings:
    """The settings of the file of ``-y``, or those of the environment alone.

    Raises:
        ConfigError: they cannot be used.
    """
    config = load_yaml(config_yaml) if config_yaml else check_config({}, "settings")
    return Settings.from_config(config)
