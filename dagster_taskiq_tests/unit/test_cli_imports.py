"""What a command imports: a health check and a shell that completes wait for neither library."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from dagster_taskiq.cli import main
from dagster_taskiq.cli.later import Later
from dagster_taskiq.defaults import BACKEND_URL_VARIABLE, BROKER_URL_VARIABLE

#: Runs the command line and then says which of some packages have been imported.
_PROBE = """
import atexit, os, sys
from dagster_taskiq.__main__ import main
known = ("dagster", "taskiq", "dagster_taskiq.backend.redis", "dagster_taskiq.backend.postgresql")
atexit.register(lambda: print("imported:", *(it for it in known if it in sys.modules)))
sys.argv[0] = "dagster-taskiq"
main()
"""


def imported(home: Path, *arguments: str, **variables: str) -> set[str]:
    """Which libraries a command has imported when it ends; nothing answers at port 1."""
    without = {BACKEND_URL_VARIABLE, BROKER_URL_VARIABLE}
    environment = {key: value for key, value in os.environ.items() if key not in without}
    process = subprocess.run(
        [sys.executable, "-c", _PROBE, *arguments],
        env={**environment, "DAGSTER_HOME": str(home), **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in process.stderr, process.stderr
    _, _, names = process.stdout.rpartition("imported:")
    return set(names.split())


@pytest.mark.parametrize(
    ("config", "backend"),
    [
        ("broker: redis://127.0.0.1:1/0", "redis"),
        ("{broker: amqp://127.0.0.1:1, backend: redis://127.0.0.1:1}", "redis"),
        ("broker: postgresql://127.0.0.1:1/d", "postgresql"),
        ("lease_seconds: 10", None),
    ],
)
@pytest.mark.once
def test_a_ping_imports_neither_dagster_nor_taskiq(
    config: str, backend: str | None, tmp_path: Path
) -> None:
    """With any backend, the embedded one too; it has got as far as to connect."""
    file = tmp_path / "settings.yaml"
    file.write_text(f"execution:\n  config:\n    {config}\n")
    (tmp_path / "dagster.yaml").write_text("telemetry: {enabled: false}")
    found = imported(tmp_path, "worker", "ping", "x", "-y", str(file))
    assert found == ({f"dagster_taskiq.backend.{backend}"} if backend else set())


def test_a_ping_asks_dagster_where_the_instance_has_a_storage(tmp_path: Path) -> None:
    """Only Dagster can read where that is; the README says so."""
    (tmp_path / "dagster.yaml").write_text("storage: {sqlite: {base_dir: /tmp}}")
    assert "dagster" in imported(tmp_path, "worker", "ping", "x")
    assert "dagster" not in imported(
        tmp_path, "worker", "ping", "x", **{BROKER_URL_VARIABLE: "redis://127.0.0.1:1"}
    )


@pytest.mark.parametrize("arguments", [["--help"], ["worker", "--help"], ["--version"]])
@pytest.mark.once
def test_help_imports_no_command(arguments: list[str], tmp_path: Path) -> None:
    """A listing of commands has their first sentences."""
    assert imported(tmp_path, *arguments) == set()


@pytest.mark.parametrize("arguments", [["status"], ["worker", "list"], ["queue", "list"]])
@pytest.mark.once
def test_listings_do_without_dagster(arguments: list[str], tmp_path: Path) -> None:
    """They read broker and backend."""
    found = imported(tmp_path, *arguments, **{BROKER_URL_VARIABLE: "redis://127.0.0.1:1"})
    assert found == {"taskiq", "dagster_taskiq.backend.redis"}


def _commands(group: click.Group) -> Iterator[Later]:
    for command in group.commands.values():
        if isinstance(command, click.Group):
            yield from _commands(command)
        elif isinstance(command, Later):
            yield command


@pytest.mark.parametrize("command", list(_commands(main)), ids=lambda it: it.name)
def test_a_listing_says_what_the_command_says(command: Later) -> None:
    """The first sentence of its help, under its name."""
    loaded = command.load()
    assert loaded.name == command.name
    assert loaded.get_short_help_str(1000) == command.get_short_help_str(1000)
