"""Runs that were given to the launcher, and stacks whose instance has it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import yaml
from dagster import (
    DagsterEvent,
    DagsterEventType,
    DagsterInstance,
    DagsterRun,
    DagsterRunStatus,
    RunsFilter,
)
from dagster._core.definitions.reconstruct import ReconstructableJob
from dagster._core.launcher import CheckRunHealthResult, WorkerStatus
from dagster._daemon.monitoring.run_monitoring import monitor_started_run

from dagster_taskiq_tests.acceptance import launcher_jobs
from dagster_taskiq_tests.acceptance.harness import (
    DAGSTER_YAML,
    PATIENCE_SECONDS,
    BrokerKind,
    Run,
    Stack,
    open_stack,
    until,
)

#: Of runs and steps: an expired lease is a matter of seconds in tests.
LEASE_SECONDS = 3.0


class LaunchedRun(Run):
    """A run that was given to the launcher."""

    def __init__(self, stack: Stack, run_id: str) -> None:
        self.stack = stack
        self.run_id = run_id

    @property
    def dagster_run(self) -> DagsterRun:
        """As the instance knows it."""
        run = self.stack.instance.get_run_by_id(self.run_id)
        assert run is not None
        return run

    def wait(self, timeout_seconds: float = PATIENCE_SECONDS) -> LaunchedRun:
        """Wait until Dagster holds it for finished."""
        try:
            until(lambda: self.dagster_run.is_finished, "the run is finished", timeout_seconds)
        except AssertionError:
            self.explain()
            raise
        return self

    def await_status(self, status: DagsterRunStatus) -> None:
        """Wait until Dagster says so."""
        until(lambda: self.status is status, f"the run is {status.value}")

    def starts(self) -> list[DagsterEvent]:
        """The events of the workers that executed it."""
        events = self.events(DagsterEventType.ENGINE_EVENT)
        return [e for e in events if (e.message or "").startswith("Executing the run on worker")]

    def await_start(self, count: int = 1) -> int:
        """Wait until it is executed for the so manieth time; the process's id."""
        events = until(lambda: self.starts()[count - 1 :], f"start {count} of the run")
        return int(str(metadata(events[0])["pid"]))

    def terminate(self) -> bool:
        """As the UI does it."""
        return self.stack.instance.run_launcher.terminate(self.run_id)

    def health(self) -> CheckRunHealthResult:
        """What run monitoring is told."""
        return self.stack.instance.run_launcher.check_run_worker_health(self.dagster_run)

    def debug_info(self) -> str:
        """The launcher's text for people."""
        return str(self.stack.instance.run_launcher.get_run_worker_debug_info(self.dagster_run))

    def await_death(self) -> CheckRunHealthResult:
        """Wait until run monitoring is told that its process is gone."""
        alive = (WorkerStatus.RUNNING, WorkerStatus.SUCCESS)
        seen = [self.health()]

        def is_dead() -> bool:
            seen.append(self.health())
            return seen[-1].status not in alive

        until(is_dead, "the run's process is known to be gone")
        return seen[-1]

    def monitor(self) -> None:
        """Wait until its process is known to be gone, then do what the daemon does about it."""
        self.await_death()
        (record,) = self.stack.instance.get_run_records(RunsFilter(run_ids=[self.run_id]))
        monitor_started_run(
            self.stack.instance, cast("Any", None), record, logging.getLogger("monitoring")
        )

    def signal_process(self, number: int) -> int:
        """Send a signal to the process that executes it; its id."""
        pid = int(str(metadata(self.starts()[-1])["pid"]))
        os.kill(pid, number)
        return pid


def metadata(event: DagsterEvent) -> dict[str, Any]:
    """What an engine event says beside its text."""
    return {key: value.value for key, value in event.engine_event_data.metadata.items()}


def launch(
    stack: Stack,
    job: str,
    *,
    tags: Mapping[str, str] | None = None,
    ops: Mapping[str, Any] | None = None,
    lease_seconds: float = LEASE_SECONDS,
) -> LaunchedRun:
    """Launch a run of one of ``launcher_jobs``."""
    run_id = create(stack, job, tags=tags, ops=ops, lease_seconds=lease_seconds)
    stack.instance.launch_run(run_id, cast("Any", None))
    return LaunchedRun(stack, run_id)


def create(
    stack: Stack,
    job: str,
    *,
    tags: Mapping[str, str] | None = None,
    ops: Mapping[str, Any] | None = None,
    lease_seconds: float = LEASE_SECONDS,
) -> str:
    """A run that waits to be launched."""
    reconstructable = ReconstructableJob.for_module(launcher_jobs.__name__, job)
    definition = reconstructable.get_definition()
    run_config: dict[str, Any] = {"ops": ops} if ops else {}
    if definition.executor_def.name == "taskiq":
        run_config["execution"] = {"config": {**stack.config, "lease_seconds": lease_seconds}}
    return stack.instance.create_run_for_job(
        definition,
        run_config=run_config,
        tags=tags,
        job_code_origin=reconstructable.get_python_origin(),
    ).run_id


def launching_settings(
    stack: Stack, resumes: int, launcher: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Of an instance that launches runs on the stack's workers; see ``open_launching_stack``."""
    return {
        **DAGSTER_YAML,
        "run_launcher": {
            "module": "dagster_taskiq.launcher",
            "class": "TaskiqRunLauncher",
            "config": {**stack.config, "lease_seconds": LEASE_SECONDS, **(launcher or {})},
        },
        "run_monitoring": {"enabled": True, "max_resume_run_attempts": resumes},
    }


@contextmanager
def open_launching_stack(
    kind: BrokerKind,
    directory: Path,
    *,
    resumes: int = 0,
    launcher: Mapping[str, Any] | None = None,
    dagster_yaml: Mapping[str, Any] | None = None,
) -> Iterator[Stack]:
    """A stack whose instance has the launcher.

    Args:
        kind: of the broker.
        directory: an empty one.
        resumes: how often a run whose process died is resumed.
        launcher: more of the launcher's configuration.
        dagster_yaml: more of the instance's.
    """
    with open_stack(kind, directory) as stack:
        settings = {**launching_settings(stack, resumes, launcher), **(dagster_yaml or {})}
        (stack.home / "dagster.yaml").write_text(yaml.safe_dump(settings))
        stack.instance = DagsterInstance.from_config(str(stack.home))
        stack.exit_stack.callback(stack.instance.dispose)
        yield stack
