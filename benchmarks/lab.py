"""Where one measurement takes place: a DAGSTER_HOME, workers, the processes of runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import redis
import yaml
from dagster import (
    DagsterEventType,
    DagsterInstance,
    DagsterRunStatus,
    EventLogEntry,
    RunRecord,
    RunsFilter,
)

from benchmarks.assets import LOADS_VARIABLE
from benchmarks.contenders import Contender, Namespace, former_package
from benchmarks.jobs import EXECUTOR_VARIABLE, JOBS_VARIABLE
from benchmarks.processes import (
    LOOK_AT_STORAGE_SECONDS,
    FailedError,
    Processes,
    connections,
    cpu_seconds,
    tree,
    wait_for,
    wait_for_rest,
)
from dagster_taskiq.defaults import BACKEND_URL_VARIABLE, BROKER_URL_VARIABLE, SIGNING_KEY_VARIABLE
from dagster_taskiq.servers.embedded.server import find_embedded_server
from dagster_taskiq_tests.server_processes import stop

ROOT = Path(__file__).parents[1]

#: How long a worker may take to be ready, and a run to exist.
START_SECONDS = 120.0

_NOT_INHERITED = (BROKER_URL_VARIABLE, BACKEND_URL_VARIABLE, SIGNING_KEY_VARIABLE)


@dataclass(frozen=True)
class Plan:
    """How large a measurement is.

    Attributes:
        steps: of the job, or of each of its jobs.
        slots: of the worker, or of the executor that has none.
        runs: that are launched at once.
        limit_seconds: after which a run counts as one that does not end.
        window_seconds: how long an idle process is watched.
        growth: how many times as many steps a case's large job has.
    """

    steps: int
    slots: int
    runs: int = 1
    limit_seconds: float = 600.0
    window_seconds: float = 20.0
    growth: int = 1


@dataclass(frozen=True)
class Run:
    """A run that has succeeded, and the CPU time of its process and that one's children."""

    record: RunRecord
    cpu_seconds: float

    @property
    def seconds(self) -> float:
        """From the start of execution to the end of the run."""
        return _moment(self.record.end_time) - _moment(self.record.start_time)


@dataclass(frozen=True)
class Launch:
    """A launched run that has succeeded; when it was launched, began and ended, by Unix time."""

    launched: float
    began: float
    ended: float


@dataclass(frozen=True)
class _Driver:
    """A process of ``driver.py``."""

    job: str
    process: subprocess.Popen[bytes]
    log: Path
    result: Path

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def answer(self) -> dict[str, Any]:
        """What it has done, once it has ended."""
        if self.process.returncode:
            raise FailedError(f"The process of {self.job} failed: {_last_line(self.log)}")
        answer: dict[str, Any] = json.loads(self.result.read_text())
        return answer


class Lab:
    """One contender's place; ``open_lab`` opens and closes it.

    Attributes:
        loads_file: where ``benchmarks.assets`` notes its loads.
    """

    def __init__(
        self, contender: Contender, space: Namespace, directory: Path, jobs: Sequence[str]
    ) -> None:
        self.contender = contender
        self.directory = directory
        self.home = directory / "home"
        self.loads_file = directory / "loads"
        self.workers: list[subprocess.Popen[bytes]] = []
        self.worker_start_seconds: float | None = None
        self._space = space
        self.home.mkdir()
        (self.home / "dagster.yaml").write_text(yaml.safe_dump(self._dagster_yaml()))
        self.instance = DagsterInstance.from_config(str(self.home))
        self._processes = Processes(self._environment(jobs), directory)

    def close(self) -> None:
        """End all processes."""
        try:
            self._processes.close()
        finally:
            self.instance.dispose()

    def _dagster_yaml(self) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "telemetry": {"enabled": False},
            "storage": {"postgres": {"postgres_url": self._space.postgres_url}},
            # runs are launched by the driver, so no daemon is needed
            "run_coordinator": {
                "module": "dagster._core.run_coordinator",
                "class": "DefaultRunCoordinator",
            },
        }
        launcher = self.contender.run_launcher(self._space)
        return {**settings, **({"run_launcher": launcher} if launcher else {})}

    def _environment(self, jobs: Sequence[str]) -> dict[str, str | None]:
        former = former_package() if self.contender.variant == "former" else None
        paths = list(filter(None, [former, str(ROOT), os.environ.get("PYTHONPATH")]))
        return {
            **dict.fromkeys(_NOT_INHERITED),
            "DAGSTER_HOME": str(self.home),
            # dagster-celery calls `celery` by its name
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            JOBS_VARIABLE: " ".join(dict.fromkeys(jobs)),
            EXECUTOR_VARIABLE: self.contender.job_executor,
            LOADS_VARIABLE: str(self.loads_file),
        }

    # --- workers ---

    def start_workers(self, slots: int, run_slots: int = 0, includes: str | None = None) -> None:
        """Start them, and wait until they take steps.

        Args:
            slots: for steps.
            run_slots: for runs.
            includes: a module that they import before there is a task.

        Raises:
            FailedError: one of them has ended.
            DidNotEndError: one of them is not ready in time.
        """
        settings = self.directory / "settings.yaml"
        config = self.contender.connection(self._space)
        settings.write_text(yaml.safe_dump({"execution": {"config": config}}))
        commands = self.contender.worker_command(str(settings), slots, run_slots, includes)
        began = time.monotonic()
        started = [self._processes.start("worker", command) for command in commands]
        for process, log in started:

            def is_ready(process: subprocess.Popen[bytes] = process, log: Path = log) -> bool:
                if process.poll() is not None:
                    raise FailedError(f"The worker ended: {_last_line(log)}")
                return self.contender.ready_text in log.read_text(errors="replace")

            wait_for(is_ready, "The worker was not ready", START_SECONDS)
            self.workers.append(process)
        if started:
            self.worker_start_seconds = time.monotonic() - began

    def stop_workers(self) -> None:
        """Have them end in order."""
        for worker in self.workers:
            stop(worker)
        self.workers.clear()

    def worker_processes(self) -> list[psutil.Process]:
        """The workers and all below them."""
        return [process for worker in self.workers for process in tree(worker.pid)]

    def worker_cpu_seconds(self) -> float:
        """CPU time that they have used so far, with their children that have ended."""
        return cpu_seconds(self.worker_processes(), with_past=True)

    def wait_for_rest(self) -> float:
        """Wait until the workers only wait; since when they do, by ``time.monotonic``."""
        return wait_for_rest(self.worker_processes, START_SECONDS)

    def worker_connections(self) -> int:
        """How many connections to PostgreSQL they have."""
        return connections(self.worker_processes(), urlsplit(self._space.postgres_url).port or 5432)

    # --- runs ---

    def run(
        self,
        job: str,
        plan: Plan,
        *,
        module: str = "benchmarks.jobs",
        watch: Sequence[Callable[[int], None]] = (),
        profile: Path | None = None,
        execution: Mapping[str, Any] | None = None,
    ) -> Run:
        """A run in a process of its own that has succeeded.

        Args:
            job: one that the module defines.
            plan: its slots count for an executor without worker, and its time limit.
            watch: functions that are called with the process's id while it runs.
            profile: a file for what cProfile sees in the process.
            execution: more of the executor's config.

        Raises:
            FailedError, DidNotEndError: it has not.
        """
        driver = self._drive(job, plan, module=module, profile=profile, execution=execution)

        def has_ended() -> bool:
            for look in () if driver.has_ended else watch:
                look(driver.process.pid)
            return driver.has_ended

        wait_for(has_ended, f"{job} did not end", plan.limit_seconds)
        answer = driver.answer()
        (run_id,) = answer["run_ids"]
        return Run(self._succeeded(run_id), answer["cpu_seconds"])

    def start_run(self, job: str, plan: Plan) -> int:
        """Start a run of one step and wait until its step is executed; its process's id."""
        driver = self._drive(job, plan)

        def is_started() -> bool:
            if driver.has_ended:
                raise FailedError(f"The process of {job} ended: {_last_line(driver.log)}")
            run_ids = self.instance.get_run_ids(RunsFilter(job_name=job))
            return any(self.events(it, DagsterEventType.STEP_START) for it in run_ids)

        wait_for(is_started, f"{job} did not start", START_SECONDS, LOOK_AT_STORAGE_SECONDS)
        return driver.process.pid

    def launch(
        self, job: str, plan: Plan, *, module: str = "benchmarks.jobs", in_turn: bool = False
    ) -> list[Launch]:
        """Launch runs, all at once or each when the one before has ended.

        Raises:
            FailedError, DidNotEndError: not all of them have succeeded.
        """
        driver = self._drive(job, plan, module=module, launches=plan.runs, in_turn=in_turn)
        limit_seconds = START_SECONDS + (plan.limit_seconds if in_turn else 0)
        wait_for(lambda: driver.has_ended, "Launching did not end", limit_seconds)
        launched = driver.answer()
        chosen = RunsFilter(run_ids=launched["run_ids"])

        def are_finished() -> bool:
            runs = self.instance.get_runs(chosen)
            for run in runs:
                if run.status is DagsterRunStatus.FAILURE:
                    self._succeeded(run.run_id)
            return all(run.is_finished for run in runs)

        what = f"{plan.runs} runs of {job} did not end"
        # the moment of the end is in the storage; to look more often would slow what is measured
        wait_for(are_finished, what, plan.limit_seconds, LOOK_AT_STORAGE_SECONDS)
        records = [self._succeeded(run_id) for run_id in launched["run_ids"]]
        return [
            Launch(began, _moment(record.start_time), _moment(record.end_time))
            for began, record in zip(launched["began"], records, strict=True)
        ]

    def _drive(
        self,
        job: str,
        plan: Plan,
        *,
        module: str = "benchmarks.jobs",
        launches: int = 0,
        in_turn: bool = False,
        profile: Path | None = None,
        execution: Mapping[str, Any] | None = None,
    ) -> _Driver:
        result = self.directory / f"result-{time.monotonic_ns()}.json"
        config = {**self.contender.execution_config(self._space, plan.slots), **(execution or {})}
        order = {
            "module": module,
            "job": job,
            "launches": launches,
            "in_turn": in_turn,
            "run_config": {"execution": {"config": config}} if config else {},
            "result": str(result),
        }
        profiler = ["-m", "cProfile", "-o", str(profile)] if profile else []
        command = [sys.executable, *profiler, "-m", "benchmarks.driver", json.dumps(order)]
        return _Driver(job, *self._processes.start(job, command), result)

    def _succeeded(self, run_id: str) -> RunRecord:
        record = self.instance.get_run_record_by_id(run_id)
        assert record is not None
        if record.dagster_run.status is not DagsterRunStatus.SUCCESS:
            raise FailedError(f"A run is {record.dagster_run.status.value}: {self._reason(run_id)}")
        return record

    def _reason(self, run_id: str) -> str:
        """The innermost error in the run's log, in one line."""
        for entry in self.instance.all_logs(run_id):
            event = entry.dagster_event
            error = getattr(event and event.event_specific_data, "error", None)
            while error is not None and error.cause is not None:
                error = error.cause
            if error is not None:
                text = " ".join(str(error.message).split())
                return text.partition(" Stack Trace: ")[0][:300]
        return "its log names no error"

    def events(self, run_id: str, *kinds: DagsterEventType) -> Sequence[EventLogEntry]:
        """The run's events of these kinds, in their order."""
        return list(self.instance.all_logs(run_id, of_type=set(kinds)))

    # --- what there is to see ---

    def redis(self) -> redis.Redis | None:
        """A connection to the contender's Redis, if it has one now."""
        if self.contender.broker == "embedded":
            url = find_embedded_server(self.home)
            return redis.Redis.from_url(url) if url else None
        if self.contender.broker in (None, "database") or self._space.redis is None:
            return None
        is_rpc = self.contender.name == "celery-rabbitmq"
        return None if is_rpc else redis.Redis.from_url(self._space.redis.url)


def _moment(time_of_record: float | None) -> float:
    """One that the record of a run has that has ended."""
    assert time_of_record is not None
    return time_of_record


@contextmanager
def open_lab(
    contender: Contender, space: Namespace, jobs: Sequence[str], keep: bool = False
) -> Iterator[Lab]:
    """A lab whose workers and runs know these jobs.

    Args:
        keep: leave the directory with the logs where the measurement fails.
    """
    directory = Path(tempfile.mkdtemp(prefix=f"benchmark-{contender.name}-"))
    with ExitStack() as resources:
        resources.callback(shutil.rmtree, directory, ignore_errors=True)
        try:
            with closing(Lab(contender, space, directory, jobs)) as lab:
                # of other samples' runs, whose code a worker would load when it starts
                lab.instance.wipe()
                yield lab
        except Exception:
            if keep:
                resources.pop_all()
                print(f"Logs: {directory}", file=sys.stderr)
            raise


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "it wrote nothing"
