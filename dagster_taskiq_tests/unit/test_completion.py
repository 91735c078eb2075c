"""What a shell completes, and that it never waits for long nor shows an error."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

from dagster_taskiq.backend.memory import MemoryBackend
from dagster_taskiq.cli import asking, main
from dagster_taskiq.cli.completion import _VARIABLE
from dagster_taskiq.errors import UnreachableServerError
from dagster_taskiq_tests.cli_runner import cli_runner
from dagster_taskiq_tests.unit.overview_scene import Scene, worker

SHELLS = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    """Three workers, two of which share a name."""
    scene = Scene(is_searchable=True)
    monkeypatch.setenv("DAGSTER_TASKIQ_BROKER_URL", "redis://localhost:6379/0")
    monkeypatch.setattr(
        asking, "open_backend", lambda _, signer: MemoryBackend(scene.state, signer)
    )

    async def begin() -> None:
        await scene.beat(replace(worker("short-1@one"), queues=("short", "dagster")))
        await scene.beat(replace(worker("long@one"), queues=("long",)))
        await scene.beat(replace(worker("long@two"), queues=("long",)))

    asyncio.run(begin())
    return scene


def completed(*line: str, shell: type[ShellComplete] = BashComplete) -> list[str]:
    """What the last word of a line may become."""
    *arguments, incomplete = line
    complete = shell(main, {}, "dagster-taskiq", _VARIABLE)
    return [it.value for it in complete.get_completions(arguments, incomplete)]


@pytest.mark.usefixtures("scene")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["worker", "ping", ""], ["long@one", "long@two", "short-1"]),
        (["worker", "show", "sh"], ["short-1"]),
        (["worker", "terminate", "short-1@"], ["short-1@one"]),
        (["worker", "reload", "@"], ["@one", "@two"]),
        (["worker", "list", "nobody"], []),
        (["queue", "show", ""], ["dagster", "long", "short"]),
        (["queue", "list", "-q", "l"], ["long"]),
        (["worker", "start", "-q", "sh"], ["short"]),
        (["work"], ["worker"]),
        (["worker", "t"], ["terminate"]),
        (["worker", "ping", "--time"], ["--timeout"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
    ],
    ids=" ".join,
)
def test_names_are_completed(line: Sequence[str], expected: list[str]) -> None:
    """A worker's host is left out where its name alone says which is meant."""
    assert completed(*line) == expected


@pytest.mark.usefixtures("scene")
@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_is_told_in_its_words(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Click's scripts ask: by variables; the answer has names, and where there is room more."""
    monkeypatch.setenv("COMP_WORDS", "dagster-taskiq worker ping sh")
    monkeypatch.setenv("COMP_CWORD", "sh" if shell == "fish" else "3")
    text = SHELLS[shell](main, {}, "dagster-taskiq", _VARIABLE).complete()
    assert "short-1" in text
    assert ("one: short, dagster" in text) == (shell != "bash")


def test_the_settings_file_of_the_line_counts(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may name other servers, and another default queue."""
    monkeypatch.delenv("DAGSTER_TASKIQ_BROKER_URL")
    file = tmp_path / "settings.yaml"
    file.write_text("execution: {config: {broker: redis://h, default_queue: mine}}")
    assert completed("queue", "show", "-y", str(file), "m") == ["mine"]


@pytest.mark.parametrize("trouble", ["away", "no settings", "no home"])
def test_an_error_is_no_name_and_no_word(
    trouble: str, scene: Scene, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The shell would write it into the line."""

    async def away(_: MemoryBackend) -> None:
        raise UnreachableServerError("redis://h", "It is away.")

    if trouble == "away":
        monkeypatch.setattr(MemoryBackend, "workers", away)
    elif trouble == "no settings":
        monkeypatch.setenv("DAGSTER_TASKIQ_BROKER_URL", "nonsense://h")
    else:
        monkeypatch.delenv("DAGSTER_TASKIQ_BROKER_URL")
        monkeypatch.delenv("DAGSTER_HOME", raising=False)
    assert completed("worker", "ping", "") == []
    assert completed("queue", "show", "") == []
    assert capfd.readouterr() == ("", "")


def test_a_server_that_says_nothing_is_not_waited_for(tmp_path: Path) -> None:
    """The process ends without a word, whatever it is waiting in."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        file = tmp_path / "settings.yaml"
        port = silent.getsockname()[1]
        file.write_text(
            f"execution: {{config: {{broker: 'redis://127.0.0.1:{port}', "
            "config_source: {broker_connection_timeout: 600}}}"
        )
        done = subprocess.run(
            [sys.executable, "-m", "dagster_taskiq"],
            env={
                **os.environ,
                _VARIABLE: "bash_complete",
                "COMP_WORDS": f"dagster-taskiq worker ping -y {file} ",
                "COMP_CWORD": "5",
            },
            capture_output=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_for_our_command(shell: str) -> None:
    """It asks ``dagster-taskiq`` by the variable that Click reads."""
    done = cli_runner().invoke(main, ["completion", shell])
    assert done.exit_code == 0
    assert f"{_VARIABLE}={shell}_complete" in done.stdout
    assert "dagster-taskiq" in done.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="There is no bash.")
def test_in_a_real_bash(tmp_path: Path) -> None:
    """It sources the script and completes a line as Tab would."""
    command = tmp_path / "dagster-taskiq"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dagster_taskiq "$@"\n')
    command.chmod(0o755)
    script = """
    source <(dagster-taskiq completion bash)
    COMP_WORDS=(dagster-taskiq worker te) COMP_CWORD=2
    $(complete -p dagster-taskiq | sed 's/.*-F \\([^ ]*\\) .*/\\1/') dagster-taskiq
    echo "${COMPREPLY[@]}"
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("terminate\n", "")
