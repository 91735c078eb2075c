"""Which servers the settings mean, and what is said of them."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from dagster_taskiq import connections, executor, launcher
from dagster_taskiq.aio.tracing import Tracing
from dagster_taskiq.cli import main, worker_start
from dagster_taskiq.config.settings import Settings
from dagster_taskiq.connections import Servers, find_running_servers, find_servers
from dagster_taskiq.errors import ConfigError
from dagster_taskiq.servers.kinds import ServerOptions

POSTGRES = "storage: {postgres: {postgres_url: 'postgresql://u:s3cr3t@db/d'}}"
MYSQL = "storage: {mysql: {mysql_url: mysql://u:s3cr3t@h/d}}"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DAGSTER_HOME, whose embedded server is not started."""
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.setattr(connections, "use_embedded_server", lambda at: f"unix://{at}/socket")
    monkeypatch.setattr(connections, "embedded_identity", lambda at: f"embedded {at}")
    return tmp_path


def found(home: Path, dagster_yaml: str | None, **config: Any) -> Servers:
    """The servers of an instance and of settings."""
    if dagster_yaml is not None:
        (home / "dagster.yaml").write_text(dagster_yaml)
    return find_servers(Settings.from_config(config))


def backend_to_look_at(settings: Settings) -> ServerOptions | None:
    servers = find_running_servers(settings)
    return servers and servers.backend


# --- nothing is named ---


@pytest.mark.parametrize("dagster_yaml", [None, "", "storage: {sqlite: {base_dir: /x}}", MYSQL])
def test_without_a_broker_it_is_the_embedded_server(home: Path, dagster_yaml: str | None) -> None:
    """Where hosts share a database they are likely to be meant to share a broker: that is said."""
    servers = found(home, dagster_yaml)
    assert servers.broker.url == servers.backend.url == f"unix://{home}/socket"
    assert servers.backend.identity == f"embedded {home}"
    assert servers.embedded_home == home
    assert ("DAGSTER_TASKIQ_BROKER_URL" in servers.notice) is (dagster_yaml == MYSQL)
    assert "\n" not in servers.notice
    assert servers.notice_level == logging.WARNING
    assert find_running_servers(Settings()) is None


def test_without_a_broker_it_is_the_postgresql_of_the_instance(home: Path) -> None:
    """So that workers on several hosts meet; a line says so."""
    servers = found(home, POSTGRES)
    assert servers.broker == servers.backend
    assert servers.broker.url == "postgresql://u:s3cr3t@db/d"
    assert servers.embedded_home is None
    assert "'broker: dagster'" in servers.notice
    assert "postgresql://u:***@db/d" in servers.notice
    assert "\n" not in servers.notice
    assert servers.notice_level == logging.INFO
    assert backend_to_look_at(Settings()) == servers.backend


def test_a_named_backend_alone_leaves_the_broker_embedded(home: Path) -> None:
    servers = found(home, POSTGRES, backend="redis://h")
    assert (servers.broker.url, servers.backend.url) == (f"unix://{home}/socket", "redis://h")
    assert (servers.embedded_home, servers.notice) == (home, "")


def test_a_dagster_yaml_that_cannot_be_used(home: Path) -> None:
    """The error names the file, and repeats none of it."""
    with pytest.raises(ConfigError, match=r"dagster\.yaml") as caught:
        found(home, "storage: {postgrs: {password: s3cr3t}}")
    assert "s3cr3t" not in str(caught.value)


def test_without_anything_to_find_the_servers_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    with pytest.raises(ConfigError, match=r"No broker is.*set DAGSTER_HOME, or set 'bro"):
        find_servers(Settings())


@pytest.mark.parametrize("dagster_yaml", [POSTGRES, MYSQL])
def test_the_run_and_the_launcher_say_it(
    home: Path, dagster_yaml: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The run in its own log, the launcher in the daemon's."""
    servers = found(home, dagster_yaml)
    monkeypatch.setattr(executor, "Client", mock.Mock())
    context: Any = SimpleNamespace(instance=mock.Mock(), run_id="r", log=mock.Mock())
    executor._open_dispatcher(Settings(), context, mock.Mock(), Tracing())
    context.log.log.assert_called_once_with(servers.notice_level, servers.notice)
    monkeypatch.setattr(launcher, "RunClient", mock.Mock())
    monkeypatch.setattr(launcher, "LaunchWatch", mock.Mock())
    with caplog.at_level(logging.INFO):
        launcher.TaskiqRunLauncher(Settings())._open()
    assert caplog.messages == [servers.notice]


def test_the_worker_says_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In its log, before it is ready."""
    servers = found(home, POSTGRES)

    async def run(*_: object) -> int:
        return 0

    monkeypatch.setattr(worker_start, "_run_worker", run)
    monkeypatch.setattr(worker_start, "start_early", worker_start.EarlyForkServer)
    monkeypatch.setattr(worker_start, "_logging", lambda _level: nullcontext())
    with caplog.at_level(logging.INFO), pytest.raises(SystemExit) as end:
        main(["worker", "start"], standalone_mode=False)
    assert end.value.code == 0
    assert caplog.messages == [servers.notice]


# --- the database of Dagster's instance, by its name ---


def test_dagster_names_the_database_of_the_instance(home: Path) -> None:
    """For the queue and the state, or beside another backend; nothing needs to be said of it."""
    servers = found(home, POSTGRES, broker="dagster", config_source={"key_prefix": "p"})
    assert servers.broker == servers.backend
    assert (servers.broker.url, servers.broker.key_prefix) == ("postgresql://u:s3cr3t@db/d", "p")
    assert (servers.embedded_home, servers.notice) == (None, "")
    servers = found(home, None, broker="dagster", backend="redis://h")
    assert (servers.broker.url, servers.backend.url) == ("postgresql://u:s3cr3t@db/d", "redis://h")


@pytest.mark.parametrize(("dagster_yaml", "where"), [(None, "files"), (MYSQL, "another server")])
def test_dagster_where_the_instance_is_on_no_postgresql(
    home: Path, dagster_yaml: str | None, where: str
) -> None:
    """The error says what to set, and repeats no password."""
    with pytest.raises(ConfigError, match=rf"is in {where}: set 'storage: postgres:'") as caught:
        found(home, dagster_yaml, broker="dagster")
    assert "s3cr3t" not in str(caught.value)


def test_dagster_without_an_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    with pytest.raises(ConfigError, match=r"'dagster'.*set DAGSTER_HOME, or set 'broker'"):
        find_servers(Settings.from_config({"broker": "dagster"}))


# --- the state where Dagster's instance is ---

AMQP: dict[str, Any] = {"broker": "amqp://h", "config_source": {"key_prefix": "p"}}


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
    assert backend_to_look_at(settings) == servers.backend
    assert servers.notice == ""


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


def test_rabbitmq_and_an_instance_in_files(home: Path) -> None:
    """The state is in the embedded server of the host, which a listing does not start."""
    settings = Settings.from_config(AMQP)
    servers = find_servers(settings)
    assert (servers.broker.url, servers.backend.url) == ("amqp://h", f"unix://{home}/socket")
    assert servers.embedded_home == home
    assert servers.notice == ""
    assert find_running_servers(settings) is None


def test_rabbitmq_and_an_instance_elsewhere(home: Path) -> None:
    """The error says what can keep the state, and repeats no password."""
    (home / "dagster.yaml").write_text(MYSQL)
    settings = Settings.from_config(AMQP)
    for find in (find_servers, find_running_servers):
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
