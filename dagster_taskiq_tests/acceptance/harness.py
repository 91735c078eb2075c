"""Real workers, started from the command line, and real runs, each in a process of its own.

A ``Stack`` is a DAGSTER_HOME, a namespace on the servers, the workers and the runs that belong
together; closing it ends them all. At the end of a module no process of its stacks may be left.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

import psutil
import redis
import yaml
from dagster import (
    AssetKey,
    DagsterEvent,
    DagsterEventType,
    DagsterInstance,
    DagsterRun,
    DagsterRunStatus,
    EventLogEntry,
    RunsFilter,
)
from dagster._core.storage.tags import BACKFILL_ID_TAG, SCHEDULE_NAME_TAG, SENSOR_NAME_TAG

from dagster_taskiq import TaskiqRunLauncher
from dagster_taskiq.backend import Backend, open_backend
from dagster_taskiq.brokers import open_broker
from dagster_taskiq.defaults import (
    BACKEND_URL_VARIABLE,
    BROKER_URL_VARIABLE,
    SIGNING_KEY_VARIABLE,
)
from dagster_taskiq.messages.attempt_ends import AttemptEnd
from dagster_taskiq.messages.attempt_ends import Counter as EndCounter
from dagster_taskiq.messages.envelope import QueueKind, physical_queue
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.messages.worker_records import WorkerRecord
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq_tests.acceptance import asset_jobs, jobs, run_process, warm_start
from dagster_taskiq_tests.acceptance.ops import DIRECTORY_VARIABLE
from dagster_taskiq_tests.acceptance.run_process import Order
from dagster_taskiq_tests.acceptance.warm_start import Template, WarmProcess
from dagster_taskiq_tests.database_setup import prepared_postgres
from dagster_taskiq_tests.server_sources import at_session_end
from dagster_taskiq_tests.servers import (
    amqp_options,
    postgres_options,
    redis_options,
    valkey_options,
)

BrokerKind = Literal[
    "redis",
    "valkey",
    "rabbitmq",
    "rabbitmq alone",
    "embedded",
    "nothing",
    "postgres",
    "postgres without rights",
    "redis+postgres",
    "rabbitmq+postgres",
]

#: Every broker that a stack can have.
BROKERS: tuple[BrokerKind, ...] = ("redis", "valkey", "rabbitmq", "embedded", "postgres")

#: Every broker beside a PostgreSQL as the backend: they are not all of a kind for each other.
PAIRS: tuple[BrokerKind, ...] = ("redis+postgres", "rabbitmq+postgres")

#: More options of every worker, such as ``--no-warm-code``: the suite passes with it, too.
WORKER_OPTIONS_VARIABLE = "DAGSTER_TASKIQ_TEST_WORKER_OPTIONS"

#: How long something may take that takes a moment on an idle machine.
PATIENCE_SECONDS = 60.0

#: Between two looks whether something has happened; most of them read a database.
_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.02, 0.2

#: How long a process may take to end when what it served is over.
LEFTOVER_SECONDS = 15.0

ROOT = Path(__file__).parents[2]

#: Marks the processes of one stack; whatever they start inherits it.
STACK_VARIABLE = "DAGSTER_TASKIQ_TEST_STACK"
_RUN_TAG = "acceptance/run"

#: Marks of the stacks whose processes have to be gone by the end of the module.
closed_stacks: list[str] = []

#: Logs of the stacks that are open, for the report of a test that failed.
open_logs: list[Path] = []

#: The stacks that are open.
open_stacks: list[Stack] = []

#: Of every instance.
DAGSTER_YAML: Mapping[str, Any] = {"telemetry": {"enabled": False}}

#: Of a run that may hold a worker's slots.
_UNFINISHED = [
    DagsterRunStatus.STARTING,
    DagsterRunStatus.STARTED,
    DagsterRunStatus.CANCELING,
]

#: A process of the command line, or of a run.
AnyProcess = subprocess.Popen[bytes] | WarmProcess

#: What the daemon's runs have: those of backfills, schedules and sensors.
_TAGS_OF_DAEMON = {BACKFILL_ID_TAG, SCHEDULE_NAME_TAG, SENSOR_NAME_TAG}

T = TypeVar("T")


def until(condition: Callable[[], T], what: str, timeout_seconds: float = PATIENCE_SECONDS) -> T:
    """Wait until a condition holds, and return what it returned."""
    deadline = time.monotonic() + timeout_seconds
    pause_seconds = _SHORTEST_PAUSE_SECONDS
    while True:
        if value := condition():
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"Within {timeout_seconds:g} s this did not happen: {what}.")
        time.sleep(pause_seconds)
        pause_seconds = min(1.5 * pause_seconds, _LONGEST_PAUSE_SECONDS)


def is_running(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@dataclass(frozen=True)
class Note:
    """What an op has left in the trace; see ``ops.note``."""

    kind: str
    run: str
    step: str
    attempt: int
    pid: int
    time: float
    more: Mapping[str, Any]

    @classmethod
    def of(cls, line: dict[str, Any]) -> Note:
        """From a line of the trace."""
        names = [name for name in cls.__dataclass_fields__ if name != "more"]
        return cls(**{name: line.pop(name) for name in names}, more=line)


class WorkerProcess:
    """A worker started by ``dagster-taskiq worker start``."""

    def __init__(self, name: str, process: AnyProcess, log: Path) -> None:
        self.name = name
        self.full_name = f"{name}@{socket.gethostname()}"
        self.process = process
        self.pid = process.pid
        self._log = log

    @property
    def log(self) -> str:
        """What it has written."""
        return self._log.read_text(encoding="utf8", errors="replace")

    def await_ready(self) -> WorkerProcess:
        """Wait until it says that it takes tasks."""
        until(lambda: "is ready" in self.log or self.process.poll() is not None, "worker is ready")
        assert self.process.poll() is None, f"The worker ended:\n{self.log}"
        return self

    def await_log(self, text: str) -> None:
        """Wait until its log has a text."""
        until(lambda: text in self.log, f"{self.name} logs {text!r}")

    def descendants(self) -> list[psutil.Process]:
        """All processes below it, the guard too."""
        return psutil.Process(self.pid).children(recursive=True)

    def terminate(self) -> None:
        """The first signal drains, the second cancels."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the worker alone."""
        self.process.kill()

    def wait(self, timeout_seconds: float = PATIENCE_SECONDS) -> int:
        """Its exit code, once it has ended."""
        return self.process.wait(timeout_seconds)

    def close(self) -> None:
        """End it, by the means that it takes."""
        for ask, patience_seconds in ((self.terminate, 10), (self.terminate, 10), (self.kill, 5)):
            if self.process.poll() is None:
                ask()
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(patience_seconds)


class Run:
    """A run of one of the jobs, in a process of its own, seen through Dagster's instance."""

    def __init__(self, stack: Stack, tag: str, process: AnyProcess, log: Path) -> None:
        self.stack = stack
        self.process = process
        self._log = log
        self._tag = tag

    @functools.cached_property
    def run_id(self) -> str:
        """Waits until the run exists."""
        found = RunsFilter(tags={_RUN_TAG: self._tag})

        def look() -> list[str]:
            ids = [run.run_id for run in self.stack.instance.get_runs(found)]
            assert ids or self.process.poll() is None, (
                "The run's process ended before its run began."
            )
            return ids

        return until(look, "the run exists")[0]

    @property
    def output_of_process(self) -> str:
        """What its process has written."""
        return self._log.read_text(encoding="utf8", errors="replace")

    @property
    def status(self) -> DagsterRunStatus:
        """As the instance knows it."""
        run = self.stack.instance.get_run_by_id(self.run_id)
        assert run is not None
        return run.status

    @property
    def is_success(self) -> bool:
        """Whether it has succeeded; says why where it has not."""
        if self.status is not DagsterRunStatus.SUCCESS:
            self.explain()
        return self.status is DagsterRunStatus.SUCCESS

    def explain(self) -> None:
        """Print the run's log, for the report of a test that fails."""
        for entry in self.logs():
            error = ""
            data = entry.dagster_event and entry.dagster_event.event_specific_data
            if data is not None and getattr(data, "error", None):
                error = f" {data.error.to_string()}"
            print(entry.step_key, entry.message, error)  # noqa: T201

    def wait(self, timeout_seconds: float = PATIENCE_SECONDS) -> Run:
        """Wait until its process has ended."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_seconds)
        if self.process.poll() is None:
            self.explain()
            raise AssertionError(f"The run has not ended within {timeout_seconds:g} s.")
        return self

    def signal(self, number: int = signal.SIGTERM) -> None:
        """Send a signal to its process."""
        self.process.send_signal(number)

    def open_gate(self, name: str = "gate") -> None:
        """Let its ops go on that wait for the gate."""
        (self.stack.directory / f"{self.run_id}.{name}").touch()

    # --- what has happened ---

    def logs(self) -> list[EventLogEntry]:
        """Its whole event log."""
        return list(self.stack.instance.all_logs(self.run_id))

    def events(
        self, kind: DagsterEventType | None = None, step: str | None = None
    ) -> list[DagsterEvent]:
        """Its events, in their order; those of one kind are found fast in a long log."""
        kinds = {kind} if kind else set(DagsterEventType)
        entries = self.stack.instance.all_logs(self.run_id, of_type=kinds)
        events = [entry.dagster_event for entry in entries if entry.dagster_event]
        return [event for event in events if step in (None, event.step_key)]

    def kinds(self, step: str) -> list[str]:
        """The types of a step's events that say how it went."""
        said = ("STEP_START", "STEP_SUCCESS", "STEP_FAILURE", "STEP_SKIPPED", "STEP_UP_FOR_RETRY")
        names = [event.event_type_value for event in self.events(step=step)]
        return [name.removeprefix("STEP_") for name in names if name in said]

    def steps(self, kind: DagsterEventType) -> list[str]:
        """Keys of the steps with an event of that type, in its order."""
        return [str(event.step_key) for event in self.events(kind)]

    def failure(self, step: str) -> str:
        """The error of a step's failure, with its causes."""
        (event,) = self.events(DagsterEventType.STEP_FAILURE, step)
        error = event.step_failure_data.error
        assert error is not None
        return error.to_string()

    def messages(self, step: str | None = None) -> list[str]:
        """The texts of its engine events."""
        events = self.events(DagsterEventType.ENGINE_EVENT, step)
        return [event.message or "" for event in events]

    def await_message(self, text: str, timeout_seconds: float = PATIENCE_SECONDS) -> str:
        """Wait for an engine event whose text has this part."""

        def look() -> list[str]:
            return [message for message in self.messages() if text in message]

        return until(look, f"the run's log says {text!r}", timeout_seconds)[0]

    def notes(self, kind: str | None = None) -> list[Note]:
        """What its ops have left in the trace."""
        return [n for n in self.stack.notes(kind) if n.run == self.run_id]

    def await_notes(self, kind: str, count: int = 1, timeout: float = PATIENCE_SECONDS) -> Any:
        """Wait until the trace has so many of a kind; returns them."""
        until(lambda: len(self.notes(kind)) >= count, f"{count} notes {kind!r}", timeout)
        return self.notes(kind)

    def output(self, step: str, name: str = "result") -> Any:
        """The value that the filesystem IO manager has kept for a step."""
        return pickle.loads((self.stack.storage / self.run_id / step / name).read_bytes())

    def story(self) -> Counter[tuple[str, str]]:
        """How many events of which type each step has; see ``story_in_process``."""
        return _story(self.events())


#: What depends on the executor or on how the run was made, not on what happened to the step.
_OF_THE_EXECUTOR = {
    DagsterEventType.ASSET_CHECK_EVALUATION_PLANNED,
    DagsterEventType.ASSET_MATERIALIZATION_PLANNED,
    DagsterEventType.ENGINE_EVENT,
    DagsterEventType.LOGS_CAPTURED,
    DagsterEventType.RESOURCE_INIT_STARTED,
    DagsterEventType.RESOURCE_INIT_SUCCESS,
    DagsterEventType.RESOURCE_INIT_FAILURE,
    DagsterEventType.STEP_WORKER_STARTED,
    DagsterEventType.STEP_WORKER_STARTING,
}


def _story(events: Sequence[DagsterEvent]) -> Counter[tuple[str, str]]:
    return Counter(
        (event.step_key, event.event_type_value)
        for event in events
        if event.step_key and event.event_type not in _OF_THE_EXECUTOR
    )


def story_in_process(job_name: str, **arguments: Any) -> Counter[tuple[str, str]]:
    """The story of the same job under Dagster's own in-process executor."""
    job = getattr(jobs, job_name, None)
    job = job or asset_jobs.defs.get_repository_def().get_job(job_name)
    with DagsterInstance.ephemeral() as instance:
        result = job.execute_in_process(instance=instance, raise_on_error=False, **arguments)
        return _story(result.all_events)


def _new_mark() -> str:
    return uuid.uuid4().hex


@dataclass
class Stack:
    """A DAGSTER_HOME with its servers, workers and runs.

    Attributes:
        broker, backend: None for the embedded server, and for the broker's own.
        directory: of the trace and the gates.
    """

    home: Path
    broker: ServerOptions | None
    backend: ServerOptions | None
    directory: Path
    mark: str = field(default_factory=_new_mark)

    def __post_init__(self) -> None:
        self.exit_stack = ExitStack()
        self.instance = DagsterInstance.from_config(str(self.home))
        self.exit_stack.callback(self.instance.dispose)
        self._logs = 0
        self._processes: list[AnyProcess] = []

    @property
    def storage(self) -> Path:
        """Where the filesystem IO manager keeps values."""
        return Path(self.instance.storage_directory())

    @property
    def config(self) -> dict[str, Any]:
        """What executor and workers are configured with."""
        config: dict[str, Any] = {}
        if self.broker:
            config |= {
                "broker": self.broker.url,
                "config_source": {"key_prefix": self.broker.key_prefix},
            }
        if self.backend:
            config["backend"] = self.backend.url
        return config

    @property
    def environment(self) -> dict[str, str]:
        """Of the workers."""
        return {
            **_environment(),
            "DAGSTER_HOME": str(self.home),
            STACK_VARIABLE: self.mark,
            DIRECTORY_VARIABLE: str(self.directory),
        }

    # --- workers ---

    def settings_file(self, **more: Any) -> Path:
        """A YAML file with the stack's settings and more of ``execution: config:``."""
        path = self.directory / f"settings-{uuid.uuid4().hex}.yaml"
        path.write_text(yaml.safe_dump({"execution": {"config": {**self.config, **more}}}))
        return path

    def worker(
        self,
        *arguments: str,
        name: str | None = None,
        queues: Sequence[str] = (),
        slots: int = 2,
        environment: Mapping[str, str] | None = None,
        settings: Path | None = None,
        module: str = "dagster_taskiq",
        shell: str = "",
        is_fresh: bool = False,
    ) -> WorkerProcess:
        """Start a worker; ``await_ready`` waits until it takes tasks.

        Args:
            environment: more variables of the worker.
            module: what is called, with the arguments of ``dagster-taskiq``.
            shell: a command of a shell that calls its arguments; the worker is always fresh then.
            is_fresh: start it as a user does, in a new interpreter; see ``warm_start``.
        """
        name = name or f"worker-{uuid.uuid4().hex[:6]}"
        options = ["-n", name, "-c", str(slots), *[x for queue in queues for x in ("-q", queue)]]
        settings = settings or self.settings_file()
        everywhere = os.environ.get(WORKER_OPTIONS_VARIABLE, "").split()
        command = ["worker", "start", "-y", str(settings), *options, *everywhere, *arguments]
        log = self.new_log(name)
        with log.open("wb") as output:
            process = self._popen(
                command, output, output, environment, module=module, shell=shell, is_fresh=is_fresh
            )
        worker = WorkerProcess(name, process, log)
        self.exit_stack.callback(worker.close)
        return worker

    def cli(self, *arguments: str, is_fresh: bool = False) -> str:
        """Call ``dagster-taskiq``; what it wrote. Its exit code must be 0."""
        done = self.try_cli(*arguments, is_fresh=is_fresh)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def try_cli(
        self,
        *arguments: str,
        is_fresh: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Call ``dagster-taskiq``, whatever comes of it.

        Args:
            is_fresh: as with ``worker``.
            environment: more variables.
        """
        wide = {"COLUMNS": "200", **(environment or {})}
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            process = self._popen(arguments, output, errors, wide, is_fresh=is_fresh)
            try:
                exit_code = process.wait(PATIENCE_SECONDS)
            finally:
                process.kill()
            output.seek(0)
            errors.seek(0)
            return subprocess.CompletedProcess(arguments, exit_code, output.read(), errors.read())

    def background(self, *arguments: str) -> tuple[AnyProcess, Path]:
        """Start ``dagster-taskiq`` with a command that goes on; its process, and its output."""
        log = self.new_log(arguments[0])
        with log.open("wb") as output:
            process = self._popen(arguments, output, output)
        self.exit_stack.callback(_end, process)
        return process, log

    def _popen(
        self,
        arguments: Sequence[str],
        stdout: IO[Any],
        stderr: IO[Any],
        environment: Mapping[str, str] | None = None,
        *,
        module: str = "dagster_taskiq",
        directory: Path | None = None,
        shell: str = "",
        is_fresh: bool = False,
    ) -> AnyProcess:
        """Start a module, as a rule ``dagster-taskiq``; where, if not in the stack's directory."""
        variables = {**self.environment, **(environment or {})}
        if warm_start.IS_POSSIBLE and not shell and not is_fresh:
            return _template().start(
                module,
                arguments,
                stdout=stdout,
                stderr=stderr,
                environment=variables,
                directory=directory or self.directory,
            )
        in_shell = ["sh", "-c", shell, "sh"] if shell else []
        return subprocess.Popen(
            [*in_shell, sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=variables,
            cwd=directory or self.directory,
        )

    def empty_file(self) -> Path:
        """A YAML file that settles nothing."""
        path = self.directory / "empty.yaml"
        path.write_text("execution: {config: {}}")
        return path

    def redis(self) -> redis.Redis:
        """A connection to the stack's Redis or Valkey."""
        server = self.backend or self.broker
        assert server is not None
        return redis.Redis.from_url(server.url)

    @property
    def prefix(self) -> str:
        """Of the stack's keys and queues."""
        assert self.broker is not None
        return self.broker.key_prefix

    # --- runs ---

    def start(
        self,
        job: str,
        *,
        ops: Mapping[str, Any] | None = None,
        resources: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        op_selection: Sequence[str] | None = None,
        asset_selection: Sequence[AssetKey] | None = None,
        retry_of: Run | None = None,
        module_path: Path | None = None,
        environment: Mapping[str, str] | None = None,
        **config: Any,
    ) -> Run:
        """Start a run in a process of its own.

        Args:
            job: name of one of ``jobs``, or ``module:name``.
            ops, resources: of the run config.
            retry_of: execute this run again from its failure.
            module_path: where the run's process finds modules that no worker does.
            environment: more variables of the run's process.
            config: of the executor, added to the stack's.
        """
        tag = uuid.uuid4().hex
        run_config: dict[str, Any] = {
            "execution": {"config": {**self.config, **config}},
            "ops": ops,
            "resources": resources,
        }
        arguments = {
            "run_config": {key: value for key, value in run_config.items() if value},
            "tags": {**(tags or {}), _RUN_TAG: tag},
            "op_selection": op_selection,
            "asset_selection": asset_selection,
        }
        order = Order(
            job,
            arguments,
            retry_of=retry_of.run_id if retry_of else None,
            module_path=str(module_path) if module_path else None,
        )
        log = self.new_log(f"run-{job.replace(':', '-')}")
        order.write(log.with_suffix(".order"))
        with log.open("wb") as output:
            process = self._popen(
                [str(log.with_suffix(".order"))],
                output,
                output,
                environment,
                module=run_process.__name__,
                directory=Path.cwd(),  # where the jobs' modules are found
            )
        self._processes.append(process)
        self.exit_stack.callback(_end, process)
        return Run(self, tag, process, log)

    def run(self, job: str, **arguments: Any) -> Run:
        """A run that has ended; see ``start``."""
        return self.start(job, **arguments).wait()

    def end_runs(self) -> None:
        """End every run, or what a failed test has left would hold the slots of the next ones."""
        for process in self._processes:
            _end(process)
        self._processes.clear()
        if isinstance(self.instance.run_launcher, TaskiqRunLauncher):
            for run in self._unfinished():
                self.instance.run_launcher.terminate(run.run_id)
            until(lambda: not self._unfinished(), "the runs that a test has left end")

    def _unfinished(self) -> list[DagsterRun]:
        """The runs that tests have launched; the daemon's are those of a module's fixtures."""
        runs = self.instance.get_runs(RunsFilter(statuses=_UNFINISHED))
        return [run for run in runs if not run.tags.keys() & _TAGS_OF_DAEMON]

    # --- what there is to see ---

    def notes(self, kind: str | None = None) -> list[Note]:
        """What ops have left in the trace, in their order."""
        return [Note.of(line) for line in self.lines("trace") if kind in (None, line["kind"])]

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Another file of JSON lines in the directory."""
        path = self.directory / name
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1:] == "\n"]

    async def depth(self, *queues: str, kind: QueueKind = QueueKind.STEPS) -> int:
        """How many tasks wait in queues of the stack's broker."""
        assert self.broker is not None
        broker = open_broker(self.broker)
        await broker.startup()
        try:
            prefix = self.broker.key_prefix
            names = [physical_queue(prefix, kind, queue) for queue in queues]
            return sum([await broker.depth(name) for name in names])
        finally:
            await broker.shutdown()

    def worker_records(self) -> list[WorkerRecord]:
        """The live workers, as they describe themselves."""
        return self._ask_backend(lambda backend: backend.workers())

    def ended(self, run_id: str) -> list[AttemptEnd]:
        """What the history has of a run, the last end first."""
        found = self._ask_backend(lambda backend: backend.ended())
        return [end for end in found if end.run_id == run_id]

    def counts(self) -> dict[EndCounter, int]:
        """The counters of the history."""
        return self._ask_backend(lambda backend: backend.counts())

    def _ask_backend(self, ask: Callable[[Backend], Awaitable[T]]) -> T:
        async def look() -> T:
            options = self.backend or self.broker
            assert options is not None
            backend = open_backend(replace(options, key_prefix=self.prefix), Signer())
            try:
                return await ask(backend)
            finally:
                await backend.shutdown()

        return asyncio.run(look())

    def refused_count(self) -> int:
        """How many messages the workers have refused."""
        return sum(record.refused for record in self.worker_records())

    def new_log(self, name: str) -> Path:
        """A file for what a process writes; it is shown when the test fails."""
        self._logs += 1
        path = self.directory / f"{self._logs:02}-{name}.log"
        path.touch()
        open_logs.append(path)
        self.exit_stack.callback(open_logs.remove, path)
        return path


def forks(process: psutil.Process) -> bool:
    """Whether it is a worker's fork server, or a template: they listen for who wants a process."""
    with suppress(psutil.Error):
        return any("/pymp-" in it.laddr for it in process.net_connections("unix"))
    return False


def check_nothing_is_left() -> None:
    """Fail if a process of a stack that was closed still runs, and kill it."""
    marks, closed_stacks[:] = set(closed_stacks), []
    lines = end_marked(marks)
    assert not lines, "Processes were left:\n" + "\n".join(lines)


def end_marked(marks: Collection[str]) -> list[str]:
    """Kill the processes of stacks that do not end by themselves in time; says which they were."""
    _, left = psutil.wait_procs(marked(marks), LEFTOVER_SECONDS)
    lines = []
    for process in left:
        with suppress(psutil.NoSuchProcess):
            lines.append(f"{process.pid}: {' '.join(process.cmdline())}")
            process.kill()
    return lines


@contextmanager
def open_stack(
    kind: BrokerKind,
    directory: Path,
    *,
    dagster_yaml: Mapping[str, Any] | None = None,
    beside: Stack | None = None,
) -> Iterator[Stack]:
    """A stack on a namespace of its own.

    Args:
        kind: of the broker; the backend is its own server, or Redis beside RabbitMQ, or the one
            behind a plus sign, or where the instance is. With ``nothing`` no server is named, and
            the broker is where the instance is, or embedded. ``without rights`` is a database that
            a DBA has prepared for a user who may create nothing.
        directory: an empty one.
        dagster_yaml: more of the instance's configuration.
        beside: another stack, whose broker this one shares, with its names there.
    """
    home = directory / "home"
    shutil.copytree(_new_home(), home)
    settings = {**DAGSTER_YAML, **(dagster_yaml or {})}
    (home / "dagster.yaml").write_text(yaml.safe_dump(settings))
    with ExitStack() as servers:
        broker = backend = None
        if beside is not None:
            broker = beside.broker
        elif kind.endswith("+postgres"):
            options_of = redis_options if kind.startswith("redis") else amqp_options
            broker = servers.enter_context(options_of())
            backend = servers.enter_context(postgres_options(broker.key_prefix))
        elif kind == "postgres":
            broker = servers.enter_context(postgres_options())
        elif kind == "postgres without rights":
            broker = servers.enter_context(prepared_postgres())
        elif kind == "rabbitmq alone":
            broker = servers.enter_context(amqp_options())
        elif kind == "redis":
            broker = servers.enter_context(redis_options())
        elif kind == "valkey":
            broker = servers.enter_context(valkey_options())
        elif kind == "rabbitmq":
            backend = servers.enter_context(redis_options())
            url = servers.enter_context(amqp_options()).url
            broker = ServerOptions(url=url, key_prefix=backend.key_prefix)
        stack = Stack(home, broker, backend, directory)
        closed_stacks.append(stack.mark)
        open_stacks.append(stack)
        stack.exit_stack.callback(open_stacks.remove, stack)
        with stack.exit_stack:
            yield stack


@functools.cache
def _new_home() -> Path:
    """A DAGSTER_HOME with an empty SQLite storage, to be copied: to make one takes a second."""
    home = Path(tempfile.mkdtemp(prefix="dagster-taskiq-home-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    with DagsterInstance.from_config(str(home)) as instance:
        instance.get_runs(limit=1)
    return home


def _environment() -> dict[str, str]:
    """Of any process that is started for tests."""
    inherited = {
        key: value
        for key, value in os.environ.items()
        if key not in (BROKER_URL_VARIABLE, BACKEND_URL_VARIABLE, SIGNING_KEY_VARIABLE)
    }
    return {**inherited, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}


@functools.cache
def _template() -> Template:
    template = Template(_environment(), STACK_VARIABLE, len(_new_mark()))
    at_session_end.callback(template.close)
    return template


def _end(process: AnyProcess) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)


def marked(marks: Collection[str]) -> list[psutil.Process]:
    """The processes of stacks."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(STACK_VARIABLE) in marks:
                found.append(process)
    return found
