"""Which servers the settings mean, and what is said of them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from dagster_taskiq import connections, executor, launcher
from dagster_taskiq.cli import main, worker_start
from dagster_taskiq.config.settings import Settings
from dagster_taskiq.connections import (
    Servers,
    embedded_notice,
    find_running_backend,
    find_servers,
)
from dagster_taskiq.errors import ConfigError
from dagster_taskiq.servers.kinds import ServerOptions

POSTGRES = "storage: {postgres: {postgres_url: {env: NOT_SET_HERE}}}"


def embedded(home: Path, dagster_yaml: str | None) -> Servers:
    """The servers of a DAGSTER_HOME without a broker."""
    if dagster_yaml is not None:
        (home / "dagster.yaml").write_text(dagster_yaml)
    options = ServerOptions("unix:///s")
    return Servers(options, options, Settings().signer(), home)


@pytest.mark.parametrize(
    ("dagster_yaml", "is_said"),
    [
        (None, False),
        ("", False),
        ("storage: {sqlite: {base_dir: /x}}", False),
        (POSTGRES, True),
        ("storage: {mysql: {mysql_url: mysql://u:p@h/d}}", True),
    ],
)
def test_an_instance_on_a_server_beside_an_embedded_broker(
    dagster_yaml: str | None, is_said: bool, tmp_path: Path
) -> None:
    """Hosts that share a database are likely to be meant to share a broker."""
    notice = embedded_notice(embedded(tmp_path, dagster_yaml))
    assert ("DAGSTER_TASKIQ_BROKER_URL" in notice) is is_said
    assert "\n" not in notice


def test_a_broker_of_its_own_is_no_surprise(tmp_path: Path) -> None:
    """Whatever the instance is."""
    servers = embedded(tmp_path, POSTGRES)
    assert embedded_notice(Servers(servers.broker, servers.backend, servers.signer)) == ""


def test_a_dagster_yaml_that_cannot_be_used(tmp_path: Path) -> None:
    """The error names the file, and repeats none of it."""
    with pytest.raises(ConfigError, match=r"dagster\.yaml") as caught:
        embedded_notice(embedded(tmp_path, "storage: {postgrs: {password: s3cr3t}}"))
    assert "s3cr3t" not in str(caught.value)


def test_the_run_and_the_launcher_say_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The run in its own log, the launcher in the daemon's."""
    servers = embedded(tmp_path, POSTGRES)
    for module in (executor, launcher):
        monkeypatch.setattr(module, "find_servers", lambda _settings: servers)
    monkeypatch.setattr(executor, "Client", mock.Mock())
    context: Any = SimpleNamespace(instance=mock.Mock(), run_id="r", log=mock.Mock())
    executor._open_dispatcher(Settings(), context, mock.Mock())
    ((said,), _) = context.log.warning.call_args
    assert said == embedded_notice(servers)
    monkeypatch.setattr(launcher, "RunClient", mock.Mock())
    monkeypatch.setattr(launcher, "LaunchWatch", mock.Mock())
    launcher.TaskiqRunLauncher(Settings())._open()
    assert caplog.messages == [said]


def test_the_worker_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In its log, before it is ready."""
    servers = embedded(tmp_path, POSTGRES)

    async def run(*_: object) -> int:
        return 0

    monkeypatch.setattr(worker_start, "find_servers", lambda _settings: servers)
    monkeypatch.setattr(worker_start, "_run_worker", run)
    monkeypatch.setattr(worker_start, "start_early", worker_start.EarlyForkServer)
    monkeypatch.setattr(worker_start, "_logging", lambda _level: nullcontext())
    with pytest.raises(SystemExit) as end:
        main(["worker", "start"], standalone_mode=False)
    assert end.value.code == 0
    assert caplog.messages == [embedded_notice(servers)]


# --- the state where Dagster's instance is ---

AMQP: dict[str, Any] = {"broker": "amqp://h", "config_source": {"key_prefix": "p"}}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("storage", "url"),
    [
        ("postgres: {postgres_url: {env: DATABASE}}", "postgresql://u:p@db/d?sslmode=require"),
        (
            'postgres: {postgres_db: {username: u, password: "p/ @", hostname: db, db_name: d}}',
            "postgresql://u:p%2F%20%40@db:5432/d",
        ),
    ],
)
def test_rabbitmq_and_an_instance_on_postgresql(
    storage: str, url: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state is in the instance's own database, however dagster.yaml names it."""
    monkeypatch.setenv("DATABASE", "postgresql+psycopg2://u:p@db/d?sslmode=require")
    (home / "dagster.yaml").write_text(f"storage: {{{storage}}}")
    settings = Settings.from_config(AMQP)
    servers = find_servers(settings)
    assert servers.broker.url == "amqp://h"
    assert servers.backend.client_url == url
    assert (servers.backend.key_prefix, servers.embedded_home) == ("p", None)
    assert find_running_backend(settings) == servers.backend
    assert embedded_notice(servers) == ""


def test_a_token_is_made_anew_for_each_connection(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the provider that dagster.yaml names, as Dagster itself does it."""
    auth = pytest.importorskip("dagster_postgres.auth")
    monkeypatch.setattr(auth.AzureWifTokenProvider, "_fetch_token", lambda _: ("token", 0.0))
    database = "{username: u, hostname: db, db_name: d}"
    provider = "{azure_wif: {}}"
    (home / "dagster.yaml").write_text(
        f"storage: {{postgres: {{postgres_db: {database}, auth_provider: {provider}}}}}"
    )
    make = find_servers(Settings.from_config(AMQP)).backend.fresh_password
    assert make is not None
    assert [make(), make()] == ["token", "token"]


def test_rabbitmq_and_an_instance_in_files(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state is in the embedded server of the host, which a listing does not start."""
    monkeypatch.setattr(connections, "use_embedded_server", lambda at: f"unix://{at}/socket")
    settings = Settings.from_config(AMQP)
    servers = find_servers(settings)
    assert (servers.broker.url, servers.backend.url) == ("amqp://h", f"unix://{home}/socket")
    assert servers.embedded_home == home
    assert embedded_notice(servers) == ""
    assert find_running_backend(settings) is None


def test_rabbitmq_and_an_instance_elsewhere(home: Path) -> None:
    """The error says what can keep the state, and repeats no password."""
    (home / "dagster.yaml").write_text("storage: {mysql: {mysql_url: mysql://u:s3cr3t@h/d}}")
    settings = Settings.from_config(AMQP)
    for find in (find_servers, find_running_backend):
        with pytest.raises(ConfigError, match=r"nor can the database.*'backend'") as error:
            find(settings)
        assert "s3cr3t" not in str(error.value)


@pytest.mark.parametrize("text", ["{postgres_url: {env: NOT_SET_HERE}}", "{postgres_urls: s3cr3t}"])
def test_rabbitmq_and_a_database_that_is_not_named(text: str, home: Path) -> None:
    (home / "dagster.yaml").write_text(f"storage: {{postgres: {text}}}")
    with pytest.raises(ConfigError, match=r"dagster\.yaml") as error:
        find_servers(Settings.from_config(AMQP))
    assert "s3cr3t" not in str(error.value)


def test_rabbitmq_without_an_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    with pytest.raises(ConfigError, match="set DAGSTER_HOME, or set 'backend'"):
        find_servers(Settings.from_config(AMQP))
