"""The runs of a soak: how they start, and who looks after them.

Half of them are launched on workers and monitored as Dagster's daemon does it, with Dagster's own
functions, in a thread that a server which does not answer may hold up. The others have a process
of their own, a child of the soak, and nobody resumes them: when that process is gone, the soak
says so in the log, as a person would.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from dagster import DagsterEventType, DagsterInstance, DagsterRun, DagsterRunStatus, RunsFilter
from dagster._core.definitions.reconstruct import ReconstructableJob
from dagster._daemon.monitoring.run_monitoring import (
    monitor_canceling_run,
    monitor_started_run,
    monitor_starting_run,
)

from dagster_taskiq.errors import DagsterTaskiqError
from dagster_taskiq_tests.acceptance.harness import Run, Stack
from dagster_taskiq_tests.soak import jobs
from dagster_taskiq_tests.soak.jobs import JOBS, NUMBER_TAG, POOL, SEED_TAG
from dagster_taskiq_tests.soak.stack import GRACE_SECONDS, LEASE_SECONDS, open_watchers_instance

logger = logging.getLogger("soak")

MONITORING_SECONDS = 2.0

#: How long after a run's end its slots of the pool may still be there.
POOL_SLOT_SECONDS = 6.0


@dataclass
class SoakRun:
    """One run, as the soak knows it.

    Attributes:
        own: its process, where it is a child of the soak.
        killed_at: when its own process was found dead, in seconds since 1970.
        faults: what was done to its process.
    """

    number: int
    job: str
    run_id: str | None
    own: Run | None = None
    killed_at: float | None = None
    faults: list[str] = field(default_factory=list)


class Runs:
    """Starts runs and looks after them.

    Args:
        stack: its instance has the launcher.
        other_home: DAGSTER_HOME of the runs that are not resumed.
        seed: of what their ops do.
    """

    def __init__(self, stack: Stack, other_home: Path, seed: int) -> None:
        self._stack = stack
        self._other_home = other_home
        self._seed = seed
        self._random = random.Random(f"{seed}/runs")
        self.all: list[SoakRun] = []
        self._started = 0
        self._finished: dict[str, DagsterRun] = {}
        self._orders: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._monitor, name="monitoring")
        self.errors: list[str] = []

    # --- starting ---

    def start_one(self, *, may_be_own: bool = True) -> None:
        """Start a run of some job: in a process of its own, if it may have one, or on a worker."""
        self._started += 1
        number = self._started
        job = self._random.choice(JOBS)
        tags = {SEED_TAG: str(self._seed), NUMBER_TAG: str(number)}
        config: dict[str, Any] = {
            "lease_seconds": LEASE_SECONDS,
            "cancel_grace_seconds": GRACE_SECONDS,
        }
        if self._random.random() < 0.4 and may_be_own:
            own = self._stack.start(
                f"{jobs.__name__}:{job}",
                tags=tags,
                environment={"DAGSTER_HOME": str(self._other_home)},
                **config,
            )
            self.all.append(SoakRun(number, job, None, own))
            return
        reconstructable = ReconstructableJob.for_module(jobs.__name__, job)
        run_id = self._stack.instance.create_run_for_job(
            reconstructable.get_definition(),
            run_config={"execution": {"config": {**self._stack.config, **config}}},
            tags=tags,
            job_code_origin=reconstructable.get_python_origin(),
        ).run_id
        self.all.append(SoakRun(number, job, run_id))
        self._orders.put(("launch", run_id))

    def excuse_beginners(self, fault: str) -> None:
        """Note a fault of own runs whose executor has not begun: what comes before is Dagster's."""
        for run in self.all:
            if run.own is not None and not self._has_begun(run):
                run.faults.append(fault)

    def _has_begun(self, run: SoakRun) -> bool:
        kinds = {DagsterEventType.ENGINE_EVENT}
        return bool(run.run_id and self._stack.instance.all_logs(run.run_id, of_type=kinds))

    def cancel(self, run: SoakRun) -> None:
        """Terminate a launched run, as the UI does it."""
        self._orders.put(("terminate", run.run_id))

    # --- what has come of them ---

    def look(self) -> list[SoakRun]:
        """Those that have not ended; a process that was killed is noted on the way."""
        found = self._stack.instance.get_runs(RunsFilter())
        self._finished = {run.run_id: run for run in found if run.is_finished}
        by_number = {run.tags.get(NUMBER_TAG): run.run_id for run in found}
        for run in self.all:
            run.run_id = run.run_id or by_number.get(str(run.number))
            self._look_at_process(run)
        return [run for run in self.all if run.run_id is None or run.run_id not in self._finished]

    def _look_at_process(self, run: SoakRun) -> None:
        """Say in the log that a run is over whose own process is gone."""
        if run.own is None or run.own.process.poll() is None or run.killed_at is not None:
            return
        if run.run_id is None:
            if not run.faults:
                self.errors.append(f"run {run.number} never began: {run.own.output_of_process}")
            run.killed_at = time.time()
            self.all.remove(run)
            return
        if run.run_id in self._finished:
            return
        known = self._stack.instance.get_run_by_id(run.run_id)
        if known is not None and not known.is_finished:
            run.killed_at = time.time()
            reason = f"The run's process ended with exit code {run.own.process.poll()}."
            self._stack.instance.report_run_failed(known, reason)
            if not run.faults:
                self.errors.append(f"run {run.number} ended by itself: {reason}")

    def dagster_run(self, run: SoakRun) -> DagsterRun | None:
        """As the instance knows it."""
        return self._stack.instance.get_run_by_id(run.run_id) if run.run_id else None

    # --- monitoring ---

    def start_monitoring(self) -> None:
        """Launch and monitor from now on."""
        self._thread.start()

    def stop_monitoring(self) -> None:
        """Return when nothing is done any more."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _monitor(self) -> None:
        with open_watchers_instance(self._stack.home) as instance:
            next_look = 0.0
            while not self._stopping.is_set():
                try:
                    self._obey(instance, *self._orders.get(timeout=0.2))
                except queue.Empty:
                    pass
                if time.monotonic() >= next_look:
                    self._look_after(instance)
                    next_look = time.monotonic() + MONITORING_SECONDS

    def _obey(self, instance: DagsterInstance, order: str, run_id: str) -> None:
        try:
            if order == "launch":
                instance.launch_run(run_id, cast("Any", None))
            else:
                instance.run_launcher.terminate(run_id)
        except DagsterTaskiqError:
            if order == "terminate":  # a person would click again
                time.sleep(0.5)
                self._orders.put((order, run_id))
        except Exception as error:
            self._note(error, f"{order} {run_id}")

    def _look_after(self, instance: DagsterInstance) -> None:
        launched = {run.run_id for run in self.all if run.own is None}
        statuses = {
            DagsterRunStatus.STARTING: monitor_starting_run,
            DagsterRunStatus.STARTED: None,
            DagsterRunStatus.CANCELING: monitor_canceling_run,
        }
        for record in instance.get_run_records(RunsFilter(statuses=list(statuses))):
            run = record.dagster_run
            if run.run_id not in launched:
                continue
            try:
                monitor = statuses[run.status]
                if monitor is not None:
                    monitor(instance, record, logger)
                else:
                    monitor_started_run(instance, cast("Any", None), record, logger)
            except DagsterTaskiqError:
                pass  # a server is away, which is what a soak is about
            except Exception as error:
                self._note(error, f"monitoring of {run.run_id}")
        self._free_pool_slots(instance)

    def _free_pool_slots(self, instance: DagsterInstance) -> None:
        """What Dagster's daemon does for runs whose process was killed; no others need it."""
        storage = instance.event_log_storage
        info = storage.get_concurrency_info(POOL)
        faults = {run.run_id: run.faults for run in self.all}
        for run_id in {*info.active_run_ids, *info.pending_run_ids, *info.assigned_run_ids}:
            run = instance.get_run_record_by_id(run_id)
            ended_at = (run and run.end_time) or time.time()
            if time.time() - ended_at > POOL_SLOT_SECONDS:
                storage.free_concurrency_slots_for_run(run_id)
                if not faults.get(run_id) and not _has_lost_its_process(instance, run_id):
                    self.errors.append(f"run {run_id} has ended and left a slot of the pool")

    def _note(self, error: Exception, what: str) -> None:
        logger.exception("%s", what)
        self.errors.append(f"{what}: {error!r}")


def _has_lost_its_process(instance: DagsterInstance, run_id: str) -> bool:
    """Whether monitoring has ended the run, as its process was gone once too often."""
    ends = instance.all_logs(run_id, of_type=DagsterEventType.RUN_FAILURE)
    return any("Detected run worker status" in str(entry.message) for entry in ends)
