"""The order of events of ``dagster-taskiq dev``."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from dagster import DagsterInstance

from dagster_taskiq._dagster.names import read_env_file
from dagster_taskiq.config.server_urls import WITH_THE_INSTANCE
from dagster_taskiq.config.setting import settings_of
from dagster_taskiq.config.settings import Settings
from dagster_taskiq.config.settings_file import load_yaml, read_block
from dagster_taskiq.connections import find_servers
from dagster_taskiq.defaults import BACKEND_URL_VARIABLE, BROKER_URL_VARIABLE
from dagster_taskiq.dev.checks import check_port, check_webserver
from dagster_taskiq.dev.home import DevHome, dev_home
from dagster_taskiq.dev.logs import Logs
from dagster_taskiq.errors import ConfigError
from dagster_taskiq.stack.homes import SERVER_STOP_SECONDS, dagster_home
from dagster_taskiq.stack.processes import Processes, exit_code_in_words
from dagster_taskiq.stack.signals import Interrupted, Interrupts

#: Names of the processes, in the logs.
DAGSTER, WORKER = "dagster", "worker"

#: What Dagster says of its own command in each start, at length.
_UNSAID = "ignore:Function `dev_command` is superseded"

#: Pause between two looks at the processes.
LOOK_SECONDS = 0.1

#: How long to wait for the end of an embedded server that others may use.
SHARED_SERVER_STOP_SECONDS = 2.0


@dataclass(frozen=True)
class DevOptions:
    """What ``dev`` starts.

    Attributes:
        config_yaml: file of the worker's and the launcher's settings; None for those of the
            user's own launcher, or of the environment.
        dagster: arguments of ``dagster dev``.
        worker: arguments of ``dagster-taskiq worker start``, but for ``-y``.
        host, port: of the UI; without a port the web server looks for one.
    """

    config_yaml: str | None = None
    dagster: Sequence[str] = ()
    worker: Sequence[str] = ()
    host: str = "127.0.0.1"
    port: int | None = None


def run_dev(options: DevOptions) -> int:
    """Run until a signal, or until a process ends, and stop everything that was started.

    Returns:
        the exit code: 0 after a signal, 1 after the end of a process.

    Raises:
        ConfigError: something that was given cannot be used.
        EmbeddedServerError: there is no server to start, or it does not start.
    """
    check_webserver()
    if options.port is not None:
        check_port(options.host, options.port)
    logs = Logs((DAGSTER, WORKER, "dev"))
    with Interrupts() as interrupts:
        try:
            ended = _run(options, interrupts, logs)
        except Interrupted:
            logs.say("Stopped; nothing that was started is left.")
            return 0
    logs.say(f"Ended, since {ended}.")
    return 1


def _run(options: DevOptions, interrupts: Interrupts, logs: Logs) -> str:
    """Which process has ended, and how.

    Raises:
        Interrupted: by a signal.
    """
    # what a line starts, the stack stops, in the opposite order
    with ExitStack() as stack:
        # first, as settings and DAGSTER_HOME may be in it
        os.environ.update(read_env_file(str(Path.cwd())))
        home = stack.enter_context(dev_home(_launcher_config(options)))
        logs.say(home.notice)
        options = stack.enter_context(_with_settings_of_launcher(options, home))
        stop_seconds = SERVER_STOP_SECONDS if home.is_private else SHARED_SERVER_STOP_SECONDS
        stack.enter_context(dagster_home(home.path, stop_seconds))
        with interrupts.at_once():
            _prepare(options, logs)
        stack.callback(logs.close)
        processes = Processes(interrupts.is_forced)
        stack.callback(_stop, processes, logs)
        processes.start_guard()
        for name, arguments in _commands(options).items():
            process = processes.start(name, arguments, Path.cwd(), subprocess.PIPE)
            assert process.stdout is not None
            logs.follow(name, process.stdout)
        while True:
            interrupts.check()
            if ended := processes.ended():
                return _in_words(ended)
            time.sleep(LOOK_SECONDS)


def _launcher_config(options: DevOptions) -> dict[str, Any]:
    """What the launcher takes of the same, as it stands there.

    What comes from the environment is not written to a dagster.yaml.
    """
    block = read_block(options.config_yaml) if options.config_yaml else {}
    taken = {row.name for row in settings_of(Settings) if row.is_of_launcher}
    return {name: value for name, value in block.items() if name in taken}


@contextmanager
def _with_settings_of_launcher(options: DevOptions, home: DevHome) -> Iterator[DevOptions]:
    """The worker's settings: those of ``-y``, else those of the user's own launcher.

    They name the servers to which the launcher sends its runs.
    """
    if options.config_yaml or not home.launcher_config:
        yield options
        return
    with tempfile.TemporaryDirectory(prefix="taskiq-dev-") as directory:
        path = Path(directory) / "settings.yaml"
        block = {"execution": {"config": dict(home.launcher_config)}}
        path.write_text(yaml.safe_dump(block), encoding="utf8")
        yield replace(options, config_yaml=str(path))


def _commands(options: DevOptions) -> Mapping[str, Sequence[str]]:
    """Arguments of Python for each process, in the order in which they are started."""
    settings = ["-y", options.config_yaml] if options.config_yaml else []
    return {
        WORKER: ["-m", "dagster_taskiq", "worker", "start", *settings, *options.worker],
        DAGSTER: ["-W", _UNSAID, "-m", "dagster", "dev", *options.dagster],
    }


def _prepare(options: DevOptions, logs: Logs) -> None:
    """Start the embedded server if it is meant, and make Dagster's tables once for all processes.

    Raises:
        ConfigError: the settings cannot be used, or Dagster cannot use its dagster.yaml.
    """
    settings = Settings.from_config(load_yaml(options.config_yaml) if options.config_yaml else {})
    _set_urls(settings)
    servers = find_servers(settings)
    own = servers.embedded_home is not None
    where = "the embedded server" if own else servers.broker.address
    logs.say(f"Steps and runs go to the worker over {where}.")
    try:
        with DagsterInstance.get():
            pass
    except Exception as error:  # of any kind; its text may have a password
        raise ConfigError(
            f"Dagster's instance cannot be opened ({type(error).__name__}): run `dagster instance "
            "info` to see why."
        ) from error


def _set_urls(settings: Settings) -> None:
    """Let jobs whose executor names no servers use those of the worker."""
    backend_url = None if settings.backend_url == WITH_THE_INSTANCE else settings.backend_url
    urls = {BROKER_URL_VARIABLE: settings.broker_url, BACKEND_URL_VARIABLE: backend_url}
    os.environ.update({name: url for name, url in urls.items() if url and not os.getenv(name)})


def _stop(processes: Processes, logs: Logs) -> None:
    """Stop both at once: no step is started any more, and those that run are cancelled."""
    try:
        logs.say("Stopping; a second Ctrl-C kills at once.")
    finally:
        processes.stop({DAGSTER: signal.SIGINT, WORKER: signal.SIGTERM})
        processes.close()


def _in_words(ended: Mapping[str, int]) -> str:
    return " and ".join(
        f"{name} has ended with {exit_code_in_words(it)}" for name, it in ended.items()
    )
