"""A whole deployment as its users have it: code server, webserver, daemon, workers, PostgreSQL.

What a user does with it goes through the webserver's GraphQL, as the UI's clicks do.
"""

from __future__ import annotations

import json
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._grpc.client import DagsterGrpcClient

from dagster_taskiq.defaults import (
    BACKEND_URL_VARIABLE,
    BROKER_URL_VARIABLE,
    DASHBOARD_URL_VARIABLE,
)
from dagster_taskiq_tests.acceptance import user_jobs
from dagster_taskiq_tests.acceptance.harness import PATIENCE_SECONDS, Stack
from dagster_taskiq_tests.acceptance.launched import LaunchedRun, open_launching_stack
from dagster_taskiq_tests.server_processes import (
    UnavailableError,
    await_answer,
    free_port,
    popen,
    stop,
    temporary_directory,
)
from dagster_taskiq_tests.servers import postgres_database

LOCATION = "location"
REPOSITORY = {"repositoryName": "__repository__", "repositoryLocationName": LOCATION}
REPOSITORY_PATH = f"__repository__@{LOCATION}"

#: More than the run queue's limit, so that it is the queue which holds runs back.
RUN_SLOTS = user_jobs.RUN_LIMIT + 2

#: Where nobody answers: runs link to it.
DASHBOARD_URL = "http://dashboard.invalid/taskiq"

#: Runs with the same value of this tag run one after the other.
ALONE_TAG = "alone"

_ERRORS = "... on PythonError { message stack } ... on Error { message }"


class GraphQLError(Exception):
    """The webserver has refused what a user asked for."""


class Web:
    """The webserver, asked as the UI asks it.

    Args:
        url: of the webserver.
        stack: whose instance it shows.
    """

    def __init__(self, url: str, stack: Stack) -> None:
        self.url = url
        self.stack = stack

    def query(self, text: str, **variables: Any) -> dict[str, Any]:
        """What GraphQL answers to a query or mutation."""
        body = json.dumps({"query": text, "variables": variables}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/graphql", body, headers)
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as response:
            answer = json.load(response)
        if "errors" in answer:
            raise GraphQLError(json.dumps(answer["errors"]))
        return dict(answer["data"])

    def do(self, text: str, expected: str, **variables: Any) -> dict[str, Any]:
        """The answer to a mutation of one field, which must have the expected type."""
        (answer,) = self.query(text, **variables).values()
        if answer["__typename"] != expected:
            raise GraphQLError(f"Not {expected}: {json.dumps(answer)}")
        return dict(answer)

    # --- what a user does ---

    def launch(self, job: str, *, tags: Mapping[str, str] | None = None) -> LaunchedRun:
        """Launch a run of a job."""
        text = f"""mutation($params: ExecutionParams!) {{
            launchRun(executionParams: $params) {{
                __typename ... on LaunchRunSuccess {{ run {{ runId }} }} {_ERRORS} }} }}"""
        params = {
            "selector": {**REPOSITORY, "jobName": job},
            "runConfigData": {},
            "executionMetadata": {
                "tags": [{"key": k, "value": v} for k, v in (tags or {}).items()]
            },
        }
        answer = self.do(text, "LaunchRunSuccess", params=params)
        return LaunchedRun(self.stack, answer["run"]["runId"])

    def terminate(
        self, run_id: str, *, is_forced: bool = False, expected: str = "TerminateRunSuccess"
    ) -> dict[str, Any]:
        """Terminate a run; forced is what the UI offers for one that is STARTING."""
        policy = "MARK_AS_CANCELED_IMMEDIATELY" if is_forced else "SAFE_TERMINATE"
        text = f"""mutation($run: String!, $policy: TerminateRunPolicy) {{
            terminateRun(runId: $run, terminatePolicy: $policy) {{
                __typename ... on TerminateRunFailure {{ message }} {_ERRORS} }} }}"""
        return self.do(text, expected, run=run_id, policy=policy)

    def start_schedule(self, name: str) -> str:
        """Start a schedule; its id."""
        text = f"""mutation($selector: ScheduleSelector!) {{
            startSchedule(scheduleSelector: $selector) {{
                __typename ... on ScheduleStateResult {{ scheduleState {{ id status }} }}
                {_ERRORS} }} }}"""
        selector = {**REPOSITORY, "scheduleName": name}
        answer = self.do(text, "ScheduleStateResult", selector=selector)
        return str(answer["scheduleState"]["id"])

    def stop_schedule(self, schedule_id: str) -> None:
        """Stop a schedule."""
        text = f"""mutation($id: String!) {{
            stopRunningSchedule(id: $id) {{ __typename {_ERRORS} }} }}"""
        self.do(text, "ScheduleStateResult", id=schedule_id)

    def start_sensor(self, name: str) -> None:
        """Start a sensor."""
        text = f"""mutation($selector: SensorSelector!) {{
            startSensor(sensorSelector: $selector) {{ __typename {_ERRORS} }} }}"""
        self.do(text, "Sensor", selector={**REPOSITORY, "sensorName": name})

    def launch_backfill(self, job: str, partitions: Sequence[str]) -> str:
        """Launch a backfill of a job's partitions; its id."""
        text = f"""mutation($params: LaunchBackfillParams!) {{
            launchPartitionBackfill(backfillParams: $params) {{
                __typename ... on LaunchBackfillSuccess {{ backfillId }} {_ERRORS} }} }}"""
        params = {
            "selector": {
                "repositorySelector": REPOSITORY,
                "partitionSetName": f"{job}_partition_set",
            },
            "partitionNames": partitions,
        }
        return str(self.do(text, "LaunchBackfillSuccess", params=params)["backfillId"])

    # --- what a user sees ---

    def check_location(self) -> str:
        """Its URL, once it has loaded the code location."""
        answer = self._try("""{ repositoriesOrError { ... on RepositoryConnection {
            nodes { pipelines { name } } } } }""")
        if not answer["repositoriesOrError"].get("nodes"):
            raise UnavailableError("the code location is not loaded")
        return self.url

    def check_daemon(self) -> str:
        """Its URL, once it shows a healthy daemon."""
        answer = self._try("""{ instance { daemonHealth { allDaemonStatuses {
            daemonType required healthy } } } }""")
        statuses = answer["instance"]["daemonHealth"]["allDaemonStatuses"]
        if waiting := [s["daemonType"] for s in statuses if s["required"] and not s["healthy"]]:
            raise UnavailableError(f"daemons without a heartbeat: {', '.join(waiting)}")
        return self.url

    def _try(self, text: str) -> dict[str, Any]:
        try:
            return self.query(text)
        except (OSError, urllib.error.URLError) as error:
            raise UnavailableError(str(error)) from None


@contextmanager
def open_user_stack(directory: Path) -> Iterator[Web]:
    """The deployment on RabbitMQ, Redis and PostgreSQL of its own names, ready to be used."""
    with postgres_database() as database:
        settings = {
            "storage": {"postgres": {"postgres_url": database}},
            "nux": {"enabled": False},  # it would cover the page that a browser sees first
            "run_monitoring": {
                "enabled": True,
                "max_resume_run_attempts": 2,
                "poll_interval_seconds": 5,
            },
            "run_coordinator": {
                "module": "dagster",
                "class": "QueuedRunCoordinator",
                "config": {
                    "max_concurrent_runs": user_jobs.RUN_LIMIT,
                    "dequeue_interval_seconds": 1,
                    "tag_concurrency_limits": [
                        {"key": ALONE_TAG, "value": {"applyLimitPerUniqueValue": True}, "limit": 1}
                    ],
                },
            },
        }
        with open_launching_stack("rabbitmq", directory, dagster_yaml=settings) as stack:
            yield _start(stack)


def _start(stack: Stack) -> Web:
    stack.instance.get_runs(limit=1)  # makes the tables, which processes at once would fight over
    settings = _environment(stack)
    workers = [
        stack.worker(
            "--run-slots", str(RUN_SLOTS), slots=0, name="runs", environment=settings, is_fresh=True
        ),
        stack.worker(
            "--run-slots",
            "0",
            slots=user_jobs.RUN_LIMIT,
            name="steps",
            environment=settings,
            is_fresh=True,
        ),
    ]
    socket = str(stack.exit_stack.enter_context(temporary_directory()) / "s")
    code = ["dagster", "api", "grpc", "-s", socket, "-m", user_jobs.__name__]
    # it does not end by SIGTERM, in half a minute
    code_server = _Service(stack, "code-server", code, stop_signal=signal.SIGKILL)
    code_server.await_answer(lambda: _check_code_server(socket))
    port = free_port()
    web = Web(f"http://127.0.0.1:{port}", stack)
    workspace = ["-w", str(_workspace(stack, socket))]
    serve = ["dagster_webserver", *workspace, "-h", "127.0.0.1", "-p", str(port)]
    webserver = _Service(stack, "webserver", serve)
    daemon = _Service(stack, "daemon", ["dagster._daemon", "run", *workspace])
    webserver.await_answer(web.check_location)
    daemon.await_answer(web.check_daemon)
    for worker in workers:
        worker.await_ready()
    return web


class _Service:
    """One of Dagster's long-lived processes; it ends with the stack."""

    def __init__(
        self,
        stack: Stack,
        name: str,
        module: Sequence[str],
        stop_signal: signal.Signals = signal.SIGTERM,
    ) -> None:
        self._log = stack.new_log(name)
        environment = {**stack.environment, **_environment(stack)}
        self._process = popen([sys.executable, "-m", *module], self._log, environment=environment)
        stack.exit_stack.callback(stop, self._process, stop_signal)

    def await_answer(self, check: Callable[[], str]) -> None:
        """Wait until the check is content."""
        await_answer(check, self._process, self._log)


def _environment(stack: Stack) -> dict[str, str]:
    """What the code location is configured by."""
    assert stack.broker is not None
    assert stack.backend is not None
    return {
        BROKER_URL_VARIABLE: stack.broker.url,
        BACKEND_URL_VARIABLE: stack.backend.url,
        DASHBOARD_URL_VARIABLE: DASHBOARD_URL,
        user_jobs.PREFIX_VARIABLE: stack.prefix,
    }


def _check_code_server(socket: str) -> str:
    try:
        DagsterGrpcClient(socket=socket).ping("")
    except DagsterUserCodeUnreachableError as error:
        raise UnavailableError(str(error)) from None
    return socket


def _workspace(stack: Stack, socket: str) -> Path:
    path = stack.directory / "workspace.yaml"
    server = {"socket": socket, "location_name": LOCATION}
    path.write_text(yaml.safe_dump({"load_from": [{"grpc_server": server}]}))
    return path
