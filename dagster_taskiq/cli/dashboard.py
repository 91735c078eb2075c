"""``dashboard``: the web page of what waits and runs."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

import click

from dagster_taskiq.cli.options import config_yaml_option, read_settings, say_errors
from dagster_taskiq.cli.queues import queue_option
from dagster_taskiq.dashboard.access import Access, check_login
from dagster_taskiq.dashboard.face import Address, Face
from dagster_taskiq.errors import ConfigError, DagsterTaskiqError

#: Where the login comes from: not from an option, which the list of processes would show.
TOKEN_VARIABLE = "DAGSTER_TASKIQ_DASHBOARD_TOKEN"  # noqa: S105 - its name
BASIC_VARIABLE = "DAGSTER_TASKIQ_DASHBOARD_BASIC_AUTH"
DAGSTER_URL_VARIABLE = "DAGSTER_TASKIQ_DAGSTER_URL"

_DEFAULT_PORT = 3030

#: What the extra brings.
_EXTRA = ("jinja2", "markupsafe", "starlette", "uvicorn")


@click.command("dashboard")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option(
    "--port",
    "-p",
    type=click.IntRange(0, 65535),
    default=_DEFAULT_PORT,
    show_default=True,
    help="Port to listen at; with 0 any that is free.",
)
@click.option("--path-prefix", "-l", default="", help="Of all paths, behind a proxy: /taskiq.")
@click.option(
    "--allow-host",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="A name by which browsers ask for the page, behind a proxy or in a network; may be "
    "repeated. IP addresses, localhost and the name of this host need none.",
)
@click.option(
    "--allow-actions",
    is_flag=True,
    help="Let who sees the page also steer: pause, reload and drain workers, pause queues, cancel "
    "steps.",
)
@click.option(
    "--dagster-url",
    envvar=DAGSTER_URL_VARIABLE,
    show_envvar=True,
    default="",
    help="Of Dagster's UI, for links to runs: http://dagster.example.com.",
)
@queue_option
@config_yaml_option
@say_errors
def dashboard(
    host: str,
    port: int,
    path_prefix: str,
    hosts: tuple[str, ...],
    allow_actions: bool,
    dagster_url: str,
    queues: tuple[str, ...],
    config_yaml: str | None,
) -> None:
    """Show servers, workers, queues, runs and steps on a web page, until Ctrl-C.

    Everybody who reaches it sees it, unless there is a login: DAGSTER_TASKIQ_DASHBOARD_TOKEN has a
    token, DAGSTER_TASKIQ_DASHBOARD_BASIC_AUTH has user:password. docs/dashboard.md says more.
    """
    settings = read_settings(config_yaml)
    token, basic = os.getenv(TOKEN_VARIABLE) or None, os.getenv(BASIC_VARIABLE) or None
    check_login(token, basic, TOKEN_VARIABLE, BASIC_VARIABLE)
    access, address = Access(token, basic, hosts), Address(host, port)
    face = Face(
        _prefix(path_prefix),
        _url(dagster_url),
        may_act=allow_actions,
        may_log_out=token is not None,
    )
    if access.is_open and not address.is_loopback:
        what = "sees everything" + (" and can stop workers and steps" if allow_actions else "")
        click.echo(
            f"Warning: everybody who reaches {host} {what}: set {TOKEN_VARIABLE} or "
            f"{BASIC_VARIABLE}.",
            err=True,
        )
    try:
        # here, as the extra may be missing, and no other command needs it
        from dagster_taskiq.dashboard.serving import serve  # noqa: PLC0415
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in _EXTRA:
            raise
        raise DagsterTaskiqError(
            f"The page needs {package}: pip install 'dagster-taskiq[dashboard]'"
        ) from None
    serve(settings, queues, address, face, access, lambda url: click.echo(f"The page is at {url}"))


def _prefix(text: str) -> str:
    parts = [part for part in text.split("/") if part]
    if any(
        not part.replace("-", "").replace("_", "").replace(".", "").isalnum() or part in (".", "..")
        for part in parts
    ):
        raise ConfigError(f"--path-prefix {text!r} is no path such as /taskiq.")
    return "".join(f"/{part}" for part in parts)


def _url(text: str) -> str:
    try:
        parts = urlsplit(text)
    except ValueError:
        parts = urlsplit("")
    if text and (parts.scheme not in ("http", "https") or not parts.netloc):
        raise ConfigError(
            f"--dagster-url or {DAGSTER_URL_VARIABLE} is no address such as "
            "http://dagster.example.com:3000."
        )
    return text.rstrip("/")
