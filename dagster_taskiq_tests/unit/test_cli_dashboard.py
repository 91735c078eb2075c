"""``dagster-taskiq dashboard``: its options, what it says, and how it ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import Any

import pytest
from click.testing import Result

from dagster_taskiq.cli import main
from dagster_taskiq.dashboard import serving
from dagster_taskiq_tests.cli_runner import cli_runner


class Served:
    """What would be shown, had it not been kept from it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.arguments: tuple[Any, ...] = ()
        monkeypatch.setattr(serving, "serve", self._serve)
        monkeypatch.setenv("DAGSTER_TASKIQ_BROKER_URL", "redis://localhost")

    def _serve(self, *arguments: Any) -> None:
        self.arguments = arguments


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    return Served(monkeypatch)


def call(*arguments: str) -> Result:
    return cli_runner().invoke(main, ["dashboard", *arguments])


def test_it_listens_on_this_host_alone_unless_told(served: Served) -> None:
    done = call()
    assert (done.exit_code, done.output) == (0, "")
    _, queues, address, face, access, _ = served.arguments
    assert queues == ()
    assert (address.host, address.port, face.prefix, face.may_act) == (
        "127.0.0.1",
        3030,
        "",
        False,
    )
    assert access.is_open


@pytest.mark.parametrize(
    ("host", "is_warned"),
    [("0.0.0.0", True), ("::", True), ("tasks", True), ("127.0.0.2", False), ("::1", False)],
)
def test_an_open_page_for_others_is_warned_of(served: Served, host: str, is_warned: bool) -> None:
    """In one sentence, which says what others can do, and what to set."""
    done = call("--host", host, "--allow-actions")
    assert done.exit_code == 0
    lines = done.stderr.splitlines()
    assert len(lines) == is_warned
    if is_warned:
        assert (
            f"everybody who reaches {host} sees everything and can stop workers and steps"
            in lines[0]
        )


def test_a_login_comes_from_the_environment(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is in nothing that is printed."""
    monkeypatch.setenv("DAGSTER_TASKIQ_DASHBOARD_TOKEN", "t" * 16)
    monkeypatch.setenv("DAGSTER_TASKIQ_DASHBOARD_BASIC_AUTH", "ann:secret")
    assert call("--host", "0.0.0.0").output == ""
    access = served.arguments[4]
    assert (access.token, access.basic) == ("t" * 16, "ann:secret")
    assert "secret" not in repr(access)
    assert "ttt" not in repr(access)
    monkeypatch.setenv("DAGSTER_TASKIQ_DASHBOARD_TOKEN", "guessable")
    done = call()
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: DAGSTER_TASKIQ_DASHBOARD_TOKEN has less than 16 char")
    assert "guessable" not in done.output


@pytest.mark.parametrize(
    ("given", "prefix"), [("taskiq", "/taskiq"), ("/a/b/", "/a/b"), ("/", ""), ("", "")]
)
def test_a_prefix_is_given_as_people_write_it(served: Served, given: str, prefix: str) -> None:
    call("--path-prefix", given)
    assert served.arguments[3].prefix == prefix


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--path-prefix", "/a b"], "--path-prefix '/a b' is no path"),
        (["--path-prefix", "/../x"], "--path-prefix '/../x' is no path"),
        (["--path-prefix", '/"onload='], "is no path"),
        (["--dagster-url", "javascript:alert(1)"], "--dagster-url or DAGSTER_TASKIQ_DAGSTER_URL"),
        (["--dagster-url", "dagster.example.com"], "is no address such as"),
        (["--dagster-url", "http://["], "is no address such as"),
    ],
)
def test_a_wrong_option_is_one_sentence(served: Served, arguments: list[str], words: str) -> None:
    done = call(*arguments)
    assert done.exit_code == 1
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert served.arguments == ()


def test_the_address_of_dagster_may_come_from_the_environment(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_TASKIQ_DAGSTER_URL", "https://dagster.example.com/")
    call()
    assert served.arguments[3].run_in_dagster("r") == "https://dagster.example.com/runs/r"


def test_without_the_extra_it_says_what_to_install() -> None:
    """In a process of its own, where the package is not to be found."""
    program = (
        "import sys; sys.modules['starlette'] = None; "
        "from dagster_taskiq.cli import main; main(['dashboard'])"
    )
    variables = {**os.environ, "DAGSTER_TASKIQ_BROKER_URL": "redis://localhost"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    advice = "pip install 'dagster-taskiq[dashboard]'"
    assert done.stderr == f"Error: The page needs starlette: {advice}\n"


def test_a_port_that_is_taken_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_TASKIQ_BROKER_URL", "redis://localhost")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = call("--port", str(port))
    assert done.exit_code == 1
    assert done.stderr == (
        f"Error: The page cannot listen at 127.0.0.1, port {port}: Address already in use. "
        "Choose another one with --port.\n"
    )


def test_a_host_that_is_none_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_TASKIQ_BROKER_URL", "redis://localhost")
    done = call("--host", "no host at all")
    assert done.exit_code == 1
    assert "Error: --host no host at all is no address" in done.stderr
