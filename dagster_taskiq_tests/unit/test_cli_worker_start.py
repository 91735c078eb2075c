"""``worker start``: what its command line means, and what a worker in the background is given."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from dagster_taskiq import connections
from dagster_taskiq.cli import main
from dagster_taskiq.cli import worker_start as module
from dagster_taskiq.cli.background import READY, WAITING, arguments_of
from dagster_taskiq.cli.worker_start import start
from dagster_taskiq.config.settings import Settings
from dagster_taskiq.connections import Servers
from dagster_taskiq.worker.options import WorkerOptions
from dagster_taskiq_tests.cli_runner import cli_runner

START = ("worker", "start")


class ReadyProcess:
    """Stands for ``subprocess.Popen``: notes the command, and says that the worker is ready."""

    pid = 4711
    commands: list[list[str]]
    word = READY

    def __init__(self, command: Sequence[str], *, pass_fds: Sequence[int], **_: Any) -> None:
        self.commands.append(list(command))
        os.write(pass_fds[0], self.word)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """What was started in the background."""
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.setattr(ReadyProcess, "commands", [], raising=False)
    monkeypatch.setattr(subprocess, "Popen", ReadyProcess)
    return ReadyProcess.commands


@pytest.mark.parametrize(
    "spelling",
    [
        ["-d", "-q", "short"],
        ["--background", "--queue=short"],
        ["-dq", "short"],
        ["-dqshort"],
    ],
    ids=" ".join,
)
def test_a_background_worker_starts_one_in_the_foreground(
    commands: list[list[str]], spelling: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However ``-d`` was spelt, and whatever program calls the command: its own arguments count."""
    monkeypatch.setattr(sys, "argv", ["pytest", "-d", "--of-another-program"])
    done = cli_runner().invoke(main, [*START, *spelling, "-n", "w"])
    assert done.exit_code == 0, done.output
    assert "pid 4711" in done.output
    (command,) = commands
    assert command[:5] == [sys.executable, "-m", "dagster_taskiq", *START]
    child = start.make_context("start", command[5:])
    assert child.params["background"] is False
    assert child.params["queues"] == ("short",)
    assert child.params["name"] == "w"


def test_a_background_worker_that_waits_for_its_server_is_not_waited_for(
    commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command returns, and says that the worker takes no tasks yet."""
    monkeypatch.setattr(ReadyProcess, "word", WAITING)
    done = cli_runner().invoke(main, [*START, "-d", "-n", "w"])
    assert done.exit_code == 0, done.output
    assert len(commands) == 1
    assert "It waits for a server that is away" in done.stderr


def test_a_background_worker_is_given_every_option(tmp_path: Path) -> None:
    """Each option of the command arrives in the child as it was parsed, also a 0 and a dash."""
    settings = tmp_path / "settings.yaml"
    settings.touch()
    values = {
        "queues": ("a", "-b c"),
        "includes": ("m", "n"),
        "loglevel": "debug",
        "app": "dagster_taskiq.app",
        "config_yaml": str(settings),
        "concurrency": "0",
        "run_slots": "3",
        "max_tasks_per_child": "7",
        "max_memory_per_child": "100",
        "soft_time_limit": "0",
        "time_limit": "1.5",
        "drain_timeout": "0",
        "reload": True,
        "no_warm_code": True,
        "metrics_port": "0",
        "metrics_host": "::1",
        "celery_arguments": ("--pool", "solo", "-c", "2"),
    }
    arguments, rest = [], ()
    for parameter in start.params:
        value = values.get(str(parameter.name))
        if parameter.name in ("background", "name", "ready_fd"):
            continue
        assert value is not None, f"give {parameter.name} a value here"
        if parameter.name == "celery_arguments":
            rest = value
        elif value is True:
            arguments.append(parameter.opts[-1])
        else:
            given = value if isinstance(value, tuple) else (value,)
            arguments += [word for item in given for word in (parameter.opts[-1], item)]
    parent = start.make_context("start", ["-d", "-n", "w", *arguments, "--", *rest])
    child = start.make_context("start", arguments_of(parent))
    assert {**parent.params, "background": False, "name": None} == child.params


def options(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> WorkerOptions:
    """What a worker would be started with."""
    found: list[WorkerOptions] = []
    done = invoked(monkeypatch, found, *arguments)
    assert done.exit_code == 0, done.output
    return found[0]


def invoked(monkeypatch: pytest.MonkeyPatch, found: list[WorkerOptions], *arguments: str) -> Result:
    """Call the command; what a worker would be started with is added to the list."""

    async def note(_servers: object, given: WorkerOptions, *_: object) -> int:
        found.append(given)
        return 0

    monkeypatch.setenv("DAGSTER_TASKIQ_BROKER_URL", "redis://localhost:6379/0")
    monkeypatch.setattr(module, "_run_worker", note)
    monkeypatch.setattr(module, "start_early", module.EarlyForkServer)
    monkeypatch.setattr(module, "_logging", lambda _level: nullcontext())
    return cli_runner().invoke(main, [*START, *arguments])


@pytest.mark.parametrize(
    "arguments",
    [
        ["-q", "a,b", "-i", "m,n"],
        ["-q", "a", "-q", "b", "-i", "m", "-i", "n"],
        ["-q", "a, b,", "-i", " m", "-i", "n,m"],
        ["--", "-Q", "a,b", "-I", "m,n"],
        ["-q", "a", "-i", "m", "--", "-Q", "b", "-I", "n"],
    ],
    ids=" ".join,
)
def test_lists_with_commas_and_repeated_options_mean_the_same(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Celery reads them, before and after ``--``."""
    given = options(monkeypatch, *arguments)
    assert (given.queues, given.include) == (("a", "b"), ("m", "n"))


@pytest.mark.parametrize("app", ["dagster_taskiq.app", "dagster_celery.app:x"])
def test_the_apps_of_both_packages_are_nothing_to_import(
    app: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may stay on a command line."""
    assert options(monkeypatch, "-A", app).include == ()


@pytest.fixture
def team_app(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A team's module in the present directory, which is not on Python's path; not written yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", ".")])
    yield tmp_path / "team_app.py"
    sys.modules.pop("team_app", None)


@pytest.mark.parametrize("app", ["team_app", "team_app:celery"])
def test_an_app_is_imported_by_the_worker_before_it_starts(
    app: str, team_app: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its set-up (logging, sentry) is for the worker's process; children import it first, too."""
    team_app.write_text("import logging; logging.getLogger('team').set_up = True")
    monkeypatch.setattr(logging.getLogger("team"), "set_up", False, raising=False)
    is_set_up = []

    def find_servers(settings: Settings) -> Servers:
        is_set_up.append(vars(logging.getLogger("team"))["set_up"])
        return connections.find_servers(settings)

    monkeypatch.setattr(module, "find_servers", find_servers)
    assert options(monkeypatch, "-A", app, "-i", "m").include == ("team_app", "m")
    assert is_set_up == [True]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "ModuleNotFoundError: No module named 'team_app'"),
        ("import missing_there", "ModuleNotFoundError: No module named 'missing_there'"),
        ("raise ValueError('no DSN')", "ValueError: no DSN"),
    ],
)
def test_an_app_that_cannot_be_imported(
    text: str | None, reason: str, team_app: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker does not start, and says why in one line."""
    if text is not None:
        team_app.write_text(text)
    done = invoked(monkeypatch, [], "-A", "team_app")
    assert done.exit_code == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert f"The module 'team_app' of -A cannot be imported: {reason}." in line


@pytest.mark.parametrize(
    "name", ["a/b", "..", "../a", "/etc/a", ".", "@h", "a\x1b[2J", "a\nb", "x" * 300]
)
@pytest.mark.parametrize("background", [["-d"], []])
def test_a_name_that_is_no_file_name_is_refused(
    name: str, background: list[str], commands: list[list[str]], tmp_path: Path
) -> None:
    """It would make a path of the log, or reach terminals and logs with what it holds."""
    result = cli_runner().invoke(main, [*START, *background, "-n", name])
    assert result.exit_code == 1
    assert "cannot be named" in result.stderr
    assert "\x1b" not in result.stderr
    assert commands == []


def test_a_log_is_not_written_through_a_link(commands: list[list[str]], tmp_path: Path) -> None:
    """Others may have put it there, where they can write to DAGSTER_HOME."""
    target = tmp_path / "target"
    logs = tmp_path / "dagster_taskiq" / "logs"
    logs.mkdir(parents=True)
    (logs / "w.log").symlink_to(target)
    result = cli_runner().invoke(main, [*START, "-d", "-n", "w"])
    assert result.exit_code == 1
    assert "Cannot write the log" in result.stderr
    assert not target.exists()
    assert commands == []


@pytest.mark.parametrize("name", ["dagster_taskiq", "dagster_taskiq/logs"])
def test_the_directory_of_logs_is_not_somebody_elses(
    name: str, commands: list[list[str]], tmp_path: Path, give_away: Callable[[Path], None]
) -> None:
    """Nor does a link of theirs lead to it."""
    target, link = tmp_path / "target", tmp_path / name
    target.mkdir()
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(target)
    give_away(link)
    result = cli_runner().invoke(main, [*START, "-d", "-n", "w"])
    assert result.exit_code == 1
    assert "is a link that belongs to user 4711" in result.stderr
    assert not list(target.iterdir())
    assert commands == []
