"""Which servers the settings mean, and what is said of them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from dagster_taskiq import executor, launcher
from dagster_taskiq.cli import main, worker_start
from dagster_taskiq.config.settings import Settings
from dagster_taskiq.connections import Servers, embedded_notice
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
