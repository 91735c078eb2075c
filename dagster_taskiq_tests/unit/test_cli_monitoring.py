"""The options and the command that serve metrics, and what they do without their extra."""

from __future__ import annotations

import signal
import sys
import threading
from contextlib import closing
from importlib import import_module
from typing import Any

import pytest

from dagster_taskiq.cli import main
from dagster_taskiq.monitoring.exporter import Exporter
from dagster_taskiq.monitoring.pages import PageServer
from dagster_taskiq_tests.cli_runner import cli_runner
from dagster_taskiq_tests.unit.test_cli_worker_start import START, invoked
from dagster_taskiq_tests.unit.test_worker_metrics import get

#: The package's own name for it is the command.
exporter_module = import_module("dagster_taskiq.cli.exporter")

#: Nothing listens there.
NOWHERE = "redis://127.0.0.1:1/0"


@pytest.fixture
def _without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.startswith("dagster_taskiq.monitoring"):
            monkeypatch.delitem(sys.modules, name)
        elif name.partition(".")[0] == "prometheus_client":
            monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("_without_the_extra")
@pytest.mark.parametrize(
    "command", [("exporter", "--port", "0"), (*START, "--metrics-port", "0")], ids=" ".join
)
def test_without_the_extra_the_command_to_install_it_is_said(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    invoked(monkeypatch, found)  # a worker without a port needs no extra
    assert len(found) == 1
    done = cli_runner().invoke(main, command)
    assert done.exit_code == 1
    assert done.stderr == (
        "Error: Metrics need a package that is not here (prometheus-client): "
        "pip install 'dagster-taskiq[metrics]'.\n"
    )
    assert len(found) == 1


def test_a_worker_whose_port_is_taken_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    with closing(PageServer("127.0.0.1", 0, {})) as server:
        done = invoked(monkeypatch, found, "--metrics-port", str(server.port))
    assert done.exit_code == 1
    assert f"Cannot serve metrics on 127.0.0.1, port {server.port}" in done.stderr
    assert found == []


def test_the_port_of_a_worker_is_free_again_when_it_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[Any] = []
    with closing(PageServer("127.0.0.1", 0, {})) as server:
        port = server.port
    for _ in range(2):
        assert invoked(monkeypatch, found, "--metrics-port", str(port)).exit_code == 0
    assert len(found) == 2


@pytest.mark.parametrize("port", ["-1", "65536", "http"])
def test_a_port_that_is_none_is_a_wrong_option(port: str) -> None:
    for command in (("exporter", "--port", port), (*START, "--metrics-port", port)):
        assert cli_runner().invoke(main, command).exit_code == 2
    assert cli_runner().invoke(main, ["exporter"]).exit_code == 2


def test_an_exporter_starts_while_its_server_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says which one, serves what it knows, and ends when it is told to."""
    monkeypatch.setenv("DAGSTER_TASKIQ_BROKER_URL", NOWHERE)
    answers: list[tuple[int, str]] = []

    main_thread = threading.get_ident()

    class Scraped(Exporter):
        def start(self) -> None:
            super().start()
            threading.Thread(target=self._scrape).start()

        def _scrape(self) -> None:
            try:
                answers.append(get(self, "/metrics"))
            finally:
                signal.pthread_kill(main_thread, signal.SIGTERM)

    monkeypatch.setattr(exporter_module, "load_metrics", lambda _: Scraped)
    done = cli_runner().invoke(main, ["exporter", "--port", "0"])
    assert done.exit_code == 0, done.output
    ((status, text),) = answers
    assert status == 200
    assert 'dagster_taskiq_server_up{role="broker"} 0.0' in text
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGTERM}


def test_an_exporter_with_wrong_settings_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_TASKIQ_BROKER_URL", "nonsense://host")
    done = cli_runner().invoke(main, ["exporter", "--port", "0"])
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: ")
