"""The parts of ``dagster-taskiq dev``: its home, its logs, its checks, what it starts."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from dagster._cli.dev import dev_command as dagsters

from dagster_taskiq.cli import main
from dagster_taskiq.cli.dev import dev as dev_command
from dagster_taskiq.defaults import BACKEND_URL_VARIABLE, BROKER_URL_VARIABLE
from dagster_taskiq.dev import run as dev_run
from dagster_taskiq.dev.checks import check_port, check_webserver
from dagster_taskiq.dev.home import DevHome, dev_home
from dagster_taskiq.dev.logs import Logs
from dagster_taskiq.dev.run import DAGSTER, WORKER, DevOptions, run_dev
from dagster_taskiq.errors import ConfigError
from dagster_taskiq_tests.cli_runner import cli_runner

LAUNCHER = {"module": "dagster_taskiq.launcher", "class": "TaskiqRunLauncher"}


def config_of(home: DevHome) -> Any:
    return yaml.safe_load((home.path / "dagster.yaml").read_text())


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own."""
    made = tmp_path / "home"
    made.mkdir()
    monkeypatch.setenv("DAGSTER_HOME", str(made))
    return made


# --- the home ---


def test_without_a_home_a_temporary_one_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the dagster.yaml of this directory, as for ``dagster dev``; it is gone at the end."""
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dagster.yaml").write_text("telemetry: {enabled: false}")
    with dev_home({"default_queue": "q"}) as made:
        launcher = {**LAUNCHER, "config": {"default_queue": "q"}}
        assert config_of(made) == {"telemetry": {"enabled": False}, "run_launcher": launcher}
        assert made.is_private
        assert made.path.parent == tmp_path.resolve()
        assert f"DAGSTER_HOME is not set: {made.path} serves" in made.notice
    assert [it.name for it in tmp_path.iterdir()] == ["dagster.yaml"]


@pytest.mark.parametrize("module", ["dagster_taskiq", "dagster_taskiq.launcher"])
def test_a_home_with_our_launcher_serves_itself(module: str, home: Path) -> None:
    """With the user's own settings of the launcher."""
    text = f"run_launcher: {{module: {module}, class: TaskiqRunLauncher, config: {{broker: b}}}}"
    (home / "dagster.yaml").write_text(text)
    with dev_home({"default_queue": "q"}) as made:
        assert made.path == home.resolve()
        assert "own run launcher" in made.notice
        assert made.launcher_config == {"broker": "b"}
    assert (home / "dagster.yaml").read_text() == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run_launcher: {module: m, class: DockerRunLauncher}", "names DockerRunLauncher"),
        ("concurrency: {default_op_concurrency_limit: 1}", "names no run launcher"),
        (None, "names no run launcher"),
    ],
)
def test_a_home_with_another_launcher_is_left_as_it_is(
    text: str | None, said: str, home: Path
) -> None:
    """One of links serves: what runs write there is in the user's home, now and afterwards."""
    if text:
        (home / "dagster.yaml").write_text(text)
    (home / "notes").write_text("mine")
    with dev_home({}) as made:
        assert made.path != home
        assert said in made.notice
        assert str(made.path) in made.notice
        expected = yaml.safe_load(text) if text else {}
        assert config_of(made) == {**expected, "run_launcher": {**LAUNCHER, "config": {}}}
        assert (made.path / "notes").read_text() == "mine"
        for name in ("history", "storage", "schedules", "dagster_taskiq"):
            (made.path / name / "new").write_text("kept")
    assert not made.path.exists()
    assert (home / "storage" / "new").read_text() == "kept"
    assert (home / "dagster_taskiq").stat().st_mode & 0o077 == 0
    assert (home / "dagster.yaml").exists() == bool(text)
    assert not text or (home / "dagster.yaml").read_text() == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run_launcher: [", "is not YAML"),
        ("- a", "must be a mapping"),
        ("run_launcher: [a]", "run_launcher must be a mapping"),
    ],
)
def test_a_home_that_cannot_be_read_is_one_sentence(text: str, said: str, home: Path) -> None:
    """Before anything is started."""
    (home / "dagster.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said), dev_home({}):
        pass


def test_a_home_that_is_not_there_is_one_sentence(home: Path) -> None:
    """It is not made, since it may be misspelt."""
    home.rmdir()
    with pytest.raises(ConfigError, match="no such directory"), dev_home({}):
        pass


# --- logs ---


def test_lines_have_the_name_of_their_process(capfd: pytest.CaptureFixture[str]) -> None:
    """Whole lines, also what is no text, and without colours where nobody would see them."""
    logs = Logs(("dagster", "worker", "dev"))
    for name in ("dagster", "worker"):
        reader, writer = os.pipe()
        os.write(writer, b"\x1b[34mone\x1b[0m of " + name.encode() + b"\r\n\xff two")
        os.close(writer)
        logs.follow(name, os.fdopen(reader, "rb"))
    logs.close()
    logs.say("Ended.")
    lines = capfd.readouterr().out.splitlines()
    assert lines[-1] == "dev     | Ended."
    assert sorted(lines[:-1]) == [
        "dagster | one of dagster",
        "dagster | � two",
        "worker  | one of worker",
        "worker  | � two",
    ]


# --- checks ---


def test_a_port_that_is_taken_is_one_sentence() -> None:
    """With the way out; one that is free passes."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"Port {port} of 127.0.0.1 .*--port"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


def test_a_ui_that_is_not_installed_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that installs it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="pip install dagster-webserver"):
        check_webserver()


# --- the command ---


def started(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> DevOptions:
    """What a command line would start."""
    found: list[DevOptions] = []

    def note(options: DevOptions) -> int:
        found.append(options)
        return 0

    monkeypatch.setattr("dagster_taskiq.cli.dev.run_dev", note)
    done = cli_runner().invoke(main, ["dev", *arguments])
    assert done.exit_code == 0, done.output
    return found[0]


def test_what_dagster_and_the_worker_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each its own options."""
    settings = tmp_path / "settings.yaml"
    settings.touch()
    code = tmp_path / "code.py"
    code.touch()
    found = started(
        monkeypatch,
        *("-f", str(code), "-m", "a", "-m", "b", "-d", str(tmp_path), "-a", "defs"),
        *("-h", "0.0.0.0", "-p", "3001", "-c", "4", "-q", "one", "-q", "two", "-y", str(settings)),
        *("--log-level", "debug", "--", "--live-data-poll-rate", "100"),
    )
    assert found.dagster == [
        *("--python-file", str(code), "--module-name", "a", "--module-name", "b"),
        *("--working-directory", str(tmp_path), "--attribute", "defs"),
        *("--host", "0.0.0.0", "--port", "3001", "--log-level", "debug"),
        *("--live-data-poll-rate", "100"),
    ]
    assert found.worker == [
        *("--name", "dev", "--drain-timeout", "1", "--loglevel", "debug"),
        *("-c", "4", "-q", "one", "-q", "two", "--reload"),
    ]
    assert (found.host, found.port) == ("0.0.0.0", 3001)
    assert found.config_yaml == str(settings)


def test_without_options_dagster_finds_code_and_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a pyproject.toml, for example."""
    found = started(monkeypatch, "--no-reload")
    assert found.dagster == ["--host", "127.0.0.1", "--log-level", "info"]
    assert "--reload" not in found.worker
    assert found.port is None


def test_dagster_knows_the_options_that_are_passed_on() -> None:
    """A release that drops one breaks this test, not somebody's morning."""
    theirs = {option for it in dagsters.params for option in it.opts}
    ours = {option for it in dev_command.params for option in it.opts if option.startswith("--")}
    only_ours = {"--concurrency", "--queue", "--config-yaml", "--reload"}
    assert ours - only_ours <= theirs


def test_a_taken_port_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the embedded server."""
    monkeypatch.setattr(dev_run, "_run", lambda *_: pytest.fail("started"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = cli_runner().invoke(main, ["dev", "-p", str(taken.getsockname()[1])])
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: Port ")
    assert done.stderr.count("\n") == 1


# --- the order of events ---

#: Ends by SIGINT alone; says so to whom that was the first of two signals, if it has to.
SERVES = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, {on_interrupt})
print("serves", flush=True)
{then}
time.sleep(600)
"""

ENDS = "lambda *_: sys.exit(0)"


@pytest.fixture
def _handlers() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, below which tests may run, ignores it
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def run(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    commands: Mapping[str, str],
    config_yaml: Path | None = None,
) -> tuple[int, str]:
    """What ``dev`` comes to with other processes, and what it prints."""
    arguments = {name: ["-c", code] for name, code in commands.items()}
    monkeypatch.setattr(dev_run, "_commands", lambda _: arguments)
    monkeypatch.setattr(dev_run, "_prepare", lambda *_: None)
    options = DevOptions(config_yaml=str(config_yaml) if config_yaml else None)
    return run_dev(options), capfd.readouterr().out


@pytest.mark.usefixtures("_handlers", "home")
def test_a_process_that_ends_is_said_and_ends_the_others(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With its exit code and its last words."""
    dies = "import sys; print('no such thing'); sys.exit(3)"
    serves = SERVES.format(on_interrupt=ENDS, then="")
    code, text = run(monkeypatch, capfd, {DAGSTER: serves, WORKER: dies})
    assert code == 1
    assert "worker  | no such thing\n" in text
    assert text.endswith("dev     | Ended, since worker has ended with exit code 3.\n")


@pytest.mark.usefixtures("_handlers", "home")
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_everything(
    number: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Dagster by SIGINT, the worker by SIGTERM; that is no failure."""
    told = SERVES.format(on_interrupt=ENDS, then=f"os.kill(os.getppid(), signal.{number})")
    code, text = run(monkeypatch, capfd, {DAGSTER: told, WORKER: "import time; time.sleep(600)"})
    assert code == 0
    assert text.endswith("dev     | Stopped; nothing that was started is left.\n")
    assert "Stopping" in text


@pytest.mark.usefixtures("_handlers", "home")
def test_a_second_signal_kills(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What would not end before its time."""
    monkeypatch.setattr("dagster_taskiq.stack.processes.STOP_SECONDS", 600.0)
    again = "lambda *_: os.kill(os.getppid(), signal.SIGINT)"
    told = SERVES.format(on_interrupt=again, then="os.kill(os.getppid(), signal.SIGTERM)")
    assert run(monkeypatch, capfd, {DAGSTER: told})[0] == 0


@pytest.mark.usefixtures("_handlers")
def test_an_env_file_of_the_directory_counts(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """For all processes, as for ``dagster dev``; it may name the home, and what settings need.

    The launcher gets those of the settings that it takes, with the variable's name, not its value.
    """
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setenv("MINE", "before")
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text(f"MINE=redis://h\nDAGSTER_HOME={other}\n")
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        "execution: {config: {broker: {env: MINE}, max_concurrent: 3, default_queue: q}}"
    )
    code = "import os; print(open(os.environ['DAGSTER_HOME'] + '/dagster.yaml').read())"
    _, text = run(monkeypatch, capfd, {WORKER: code}, settings)
    assert str(other) in text
    assert not list(home.iterdir())
    lines = [it.removeprefix("worker  | ") for it in text.splitlines() if it.startswith("worker")]
    config = yaml.safe_load("\n".join(lines))["run_launcher"]["config"]
    assert config == {"broker": {"env": "MINE"}, "default_queue": "q"}


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize("is_given", [True, False])
def test_the_worker_has_the_settings_of_the_users_own_launcher(
    is_given: bool,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Else it would wait at other servers than those to which the runs go; ``-y`` comes first."""
    (home / "dagster.yaml").write_text(
        "run_launcher: {module: dagster_taskiq, class: TaskiqRunLauncher, "
        "config: {broker: {env: MINE}}}"
    )
    given = tmp_path / "settings.yaml"
    given.write_text("execution: {config: {broker: redis://h}}")
    commands = dev_run._commands

    def shown(options: DevOptions) -> Mapping[str, list[str]]:
        arguments = list(commands(options)[WORKER])
        code = "import sys; print(open(sys.argv[1]).read())"
        return {WORKER: ["-c", code, arguments[arguments.index("-y") + 1]]}

    monkeypatch.setattr(dev_run, "_commands", shown)
    monkeypatch.setattr(dev_run, "_prepare", lambda *_: None)
    run_dev(DevOptions(config_yaml=str(given) if is_given else None))
    text = capfd.readouterr().out
    assert ("broker: redis://h" in text) == is_given
    assert ("env: MINE" in text) != is_given


def test_jobs_without_servers_of_their_own_meet_the_worker(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """By the variables that a bare ``taskiq_executor`` reads; one that is set stays."""
    monkeypatch.setenv(BROKER_URL_VARIABLE, "")
    monkeypatch.setenv(BACKEND_URL_VARIABLE, "redis://mine")
    settings = tmp_path / "settings.yaml"
    settings.write_text("execution: {config: {broker: 'amqp://u:p@h', backend: 'redis://h'}}")
    dev_run._prepare(DevOptions(config_yaml=str(settings)), Logs(("dev",)))
    assert os.environ[BROKER_URL_VARIABLE] == "amqp://u:p@h"
    assert os.environ[BACKEND_URL_VARIABLE] == "redis://mine"
    assert capfd.readouterr().out == "dev | Steps and runs go to the worker over amqp://u:***@h.\n"
    (home / "dagster.yaml").write_text("nonsense: true")
    with pytest.raises(ConfigError, match="Dagster's instance cannot be opened"):
        dev_run._prepare(DevOptions(config_yaml=str(settings)), Logs(("dev",)))
