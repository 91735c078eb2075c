"""The code that a process has loaded, and the processes that are forked from it find loaded.

A *template* loads code once: the modules that a worker includes, Dagster's instance, and perhaps
one code location. Its children find all of it in ``LOADED``, and note there what they load.
"""

from __future__ import annotations

import importlib
import json
import math
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dagster import DagsterInstance, DagsterRun, RepositoryDefinition

from dagster_taskiq._dagster.names import (
    ExecuteRunArgs,
    ExecuteStepArgs,
    InstanceRef,
    ReconstructableJob,
    recon_job_from_origin,
    unpack_value,
)
from dagster_taskiq._dagster.patches import end_copies_of_steps, keep_definitions
from dagster_taskiq._dagster.ready_instance import make_ready
from dagster_taskiq.aio.forked_copies import ending_copies
from dagster_taskiq.errors import UnloadableCodeError
from dagster_taskiq.execution.code_locations import ARGS_KEY, EXECUTABLE_KEY, RUN_ARGS_KEY
from dagster_taskiq.execution.generators import noting_seeds
from dagster_taskiq.execution.instances import open_instance
from dagster_taskiq.execution.known_runs import load_data_of
from dagster_taskiq.execution.loaded_files import LoadedFiles
from dagster_taskiq.execution.storage_connections import kept_connections


@dataclass(frozen=True)
class OldCode:
    """Why no new run may be executed with what a process has.

    Attributes:
        reason: in words.
        is_own: whether the process has loaded it itself, and not what it was forked from.
        is_by_age: whether it is only older than it may be, and nothing has changed.
    """

    reason: str
    is_own: bool
    is_by_age: bool = False


#: A template makes other jobs than that of its first task for this share of the time that the
#: latter has taken, which waits. What it leaves is made by each child that executes it.
_OTHER_JOBS_SHARE = 0.1


@dataclass
class _Load:
    """What one process has loaded.

    Attributes:
        files: from which.
        at: when the first of it was, by ``time.monotonic``; infinite before.
    """

    files: LoadedFiles = field(default_factory=LoadedFiles)
    at: float = math.inf

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Note what is loaded meanwhile."""
        self.at = min(self.at, time.monotonic())
        with self.files.noting(), noting_seeds():
            yield

    def why_old(self, max_age_seconds: float | None, *, is_own: bool) -> OldCode | None:
        """See ``LoadedCode``."""
        if max_age_seconds is not None and time.monotonic() - self.at > max_age_seconds:
            reason = f"it was loaded more than {max_age_seconds:g} seconds ago"
            return OldCode(reason, is_own, is_by_age=True)
        path = self.files.changed()
        return OldCode(f"{path} has changed", is_own) if path else None


class LoadedCode:
    """What was loaded here and in the templates that this process was forked from, and when."""

    def __init__(self) -> None:
        self._own = _Load()
        self._inherited: list[_Load] = []
        self._instance: tuple[InstanceRef | None, DagsterInstance] | None = None
        #: What the start of a process has changed in it.
        self._path: list[str] = []
        self._directory = ""
        self._start_method: str | None = None

    # --- in a template ---

    def load(self, modules: Sequence[str], payload: Mapping[str, Any]) -> DagsterRun | None:
        """Load modules, this process's own instance, and the code location of a task.

        What is loaded already stays.

        Args:
            modules: to import.
            payload: of a task of the location; empty for no location.

        Returns:
            the run of the task; None where there is none.

        Raises:
            Exception: whatever user code or Dagster raises.
        """
        keep_definitions()
        end_copies_of_steps()
        with self.loading():
            if reason := import_modules(modules):
                raise UnloadableCodeError(reason)
            if self._instance is None and os.getenv("DAGSTER_HOME"):
                self._open_instance(None)
            return self._load_location(payload) if payload else None

    def _open_instance(self, ref: InstanceRef | None) -> None:
        instance = open_instance(ref)
        self._instance = (ref, instance)
        with kept_connections(instance):  # which has storages share an engine, as in the children
            make_ready(instance)

    def _load_location(self, payload: Mapping[str, Any]) -> DagsterRun | None:
        began = time.monotonic()
        ref, run_id, job = _code_of(payload)
        if self._instance is None or self._instance[0] != ref:
            self._open_instance(ref)
        assert self._instance is not None
        instance = self._instance[1]
        run = instance.get_run_by_id(run_id)
        if run is not None and RUN_ARGS_KEY in payload:  # a step's payload has its own
            job = job.with_repository_load_data(load_data_of(instance, run))
        if run is not None and run.remote_job_origin is not None:
            instance.inject_env_vars(run.remote_job_origin.location_name)
        _ = job.get_definition().run_config_schema  # it is made when it is first asked for
        _make_jobs(job.repository.get_definition(), _OTHER_JOBS_SHARE * (time.monotonic() - began))
        return run

    def hand_on(self) -> None:
        """From here on this process only forks others."""
        self._inherited.append(self._own)
        self._own = _Load()
        self._path = list(sys.path)
        self._directory = str(Path.cwd())
        self._start_method = multiprocessing.get_start_method(allow_none=True)

    # --- in any process that executes code ---

    def find_code(self) -> None:
        """Have modules found as they were when code was loaded, or are to be found for that.

        Those of the worker's directory are, wherever the run's process was started. Dagster takes
        the first entry for the script's directory and skips it when it loads a job, so the
        directory is the second one.
        """
        if not self._inherited:
            here = str(Path.cwd())
            sys.path[:] = ["", here, *(path for path in sys.path if path not in ("", here))]
            return
        # the start of this process has changed them, and code may have changed them before
        sys.path[:] = self._path
        with suppress(OSError):  # the directory is gone, as it may be for any process
            os.chdir(self._directory)
        multiprocessing.set_start_method(self._start_method, force=True)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Load code, perhaps not for the first time."""
        with self._own.going_on():
            yield

    def why_old(self, max_age_seconds: float | None) -> OldCode | None:
        """Why no new run may be executed with what was loaded; None if it may.

        Args:
            max_age_seconds: how old it may be; None for any age.
        """
        for load in self._inherited:
            if old := load.why_old(max_age_seconds, is_own=False):
                return old
        return self._own.why_old(max_age_seconds, is_own=True)

    def take_instance(self, ref: InstanceRef | None) -> DagsterInstance | None:
        """The open instance of a message, for its taker to close; None if it is not open here.

        Args:
            ref: None for this process's own.
        """
        if self._instance is None or self._instance[0] != ref:
            return None
        instance, self._instance = self._instance[1], None
        return instance


def _code_of(payload: Mapping[str, Any]) -> tuple[InstanceRef | None, str, ReconstructableJob]:
    """The instance, the run and the job of a task's payload."""
    if ARGS_KEY in payload:
        step = unpack_value(payload[ARGS_KEY], as_type=ExecuteStepArgs)
        job = ReconstructableJob.from_dict(dict(payload[EXECUTABLE_KEY]))
        return step.instance_ref, step.run_id, job
    run = unpack_value(payload[RUN_ARGS_KEY], as_type=ExecuteRunArgs)
    return run.instance_ref, run.run_id, recon_job_from_origin(run.job_origin)


def _make_jobs(repository: RepositoryDefinition, seconds: float) -> None:
    """Make jobs of a repository, as many as there is time for."""
    until = time.monotonic() + seconds
    for name in repository.job_names:
        if time.monotonic() > until:
            return
        with suppress(Exception):  # its own runs will tell
            _ = repository.get_job(name).run_config_schema


def title_of(payload: str | None) -> str:
    """The code location of a task's payload, for people; empty where it names none."""
    try:
        _, _, job = _code_of(json.loads(payload or "{}"))
        return str(job.repository.pointer.describe())
    except Exception:  # whoever loads it will say what is wrong with it
        return ""


def import_modules(modules: Sequence[str]) -> str:
    """Import modules; why one of them cannot be imported, or empty."""
    for module in modules:
        try:
            with ending_copies():
                importlib.import_module(module)
        except BaseException as error:
            if not (isinstance(error, ModuleNotFoundError) and error.name == module):
                traceback.print_exc()
            return f"the module {module!r} cannot be imported: {type(error).__name__}: {error}"
    return ""


#: Of this process.
LOADED = LoadedCode()
