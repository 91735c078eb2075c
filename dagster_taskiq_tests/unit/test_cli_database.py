"""``database sql``: what is printed for which settings, and that nothing is connected to.

That the SQL is enough is shown in ``contract/test_postgresql_rights.py``.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import Result

from dagster_taskiq import connections
from dagster_taskiq.cli import main
from dagster_taskiq_tests.cli_runner import cli_runner

SECRET = "s3cr3t"
BROKER, BACKEND = f"postgresql://u:{SECRET}@one/d", f"postgresql://u:{SECRET}@two/d"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DAGSTER_HOME; whoever would connect or start a server fails."""

    def refuse(*_: object) -> None:
        pytest.fail("it connects")

    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(connections, "use_embedded_server", refuse)
    return tmp_path


def call(*arguments: str, broker: str | None = None, backend: str | None = None) -> Result:
    variables = {
        "DAGSTER_TASKIQ_BROKER_URL": broker,
        "DAGSTER_TASKIQ_BACKEND_URL": backend,
    }
    return cli_runner().invoke(main, ["database", "sql", *arguments], env=variables)


def parts_of(result: Result) -> Sequence[str]:
    assert result.exit_code == 0, result.stderr
    assert SECRET not in result.stdout
    tables = {"broker": ".messages (", "backend": ".tasks ("}
    return [
        part for part, table in tables.items() if f"CREATE TABLE {SCHEMA}{table}" in result.stdout
    ]


SCHEMA = '"dagster_taskiq"'


@pytest.mark.parametrize(
    ("broker", "backend", "parts"),
    [
        (BROKER, None, ["broker", "backend"]),
        (BROKER, BROKER, ["broker", "backend"]),
        ("amqp://h", BACKEND, ["backend"]),
        (BROKER, "redis://h", ["broker"]),
        (BROKER, BACKEND, ["broker", "backend"]),
        (None, BACKEND, ["backend"]),  # beside an embedded broker, which is not started
    ],
)
def test_the_settings_decide_what_is_made(
    broker: str | None, backend: str | None, parts: Sequence[str]
) -> None:
    """The first lines say in which database; both parts in each of two."""
    result = call("--role", "w", broker=broker, backend=backend)
    assert parts_of(result) == parts
    for url in (BROKER, BACKEND):
        address = url.replace(SECRET, "***")
        assert (f"-- {address}\n" in result.stdout) is (url in (broker, backend))


def test_the_database_of_the_instance_is_meant_too(home: Path) -> None:
    (home / "dagster.yaml").write_text(f"storage: {{postgres: {{postgres_url: '{BROKER}'}}}}")
    assert parts_of(call("--role", "w")) == ["broker", "backend"]
    assert parts_of(call("--role", "w", broker="amqp://h")) == ["backend"]


def test_settings_may_be_in_a_file(tmp_path: Path) -> None:
    settings = tmp_path / "taskiq.yaml"
    settings.write_text(
        f"execution: {{config: {{broker: '{BROKER}', config_source: {{key_prefix: mine}}}}}}"
    )
    result = call("--role", "w", "-y", str(settings))
    assert result.exit_code == 0, result.stderr
    assert 'CREATE SCHEMA "dagster_taskiq_mine"' in result.stdout


def test_any_role_is_one_name() -> None:
    """Whatever is in it, also in the first lines, which are comments."""
    result = call("--role", 'a"; DROP\nDATABASE d; --', broker=BROKER)
    assert f'GRANT USAGE ON SCHEMA {SCHEMA} TO "a""; DROP\nDATABASE d; --";\n' in result.stdout
    heading = result.stdout.split("BEGIN;", 1)[0]
    assert all(line.startswith("-- ") for line in heading.splitlines())


def test_without_a_postgresql_there_is_nothing_to_make() -> None:
    result = call("--role", "w", broker="amqp://h", backend=f"redis://:{SECRET}@h")
    assert result.exit_code == 1
    assert "Neither the broker (amqp://h) nor the backend (redis://:***@h) is on" in result.stderr


def test_a_role_is_asked_for() -> None:
    result = call(broker=BROKER)
    assert result.exit_code == 2
    assert "--role" in result.stderr
