"""Definitions that are made of what an API has said: a run has those that it was launched with."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from dagster import DagsterEventType
from dagster._core.code_pointer import CodePointer, FileCodePointer, ModuleCodePointer
from dagster._core.definitions.definitions_load_context import DefinitionsLoadContext
from dagster._core.definitions.reconstruct import (
    ReconstructableJob,
    ReconstructableRepository,
    initialize_repository_def_from_pointer,
)

from dagster_taskiq_tests.acceptance.harness import Stack, until
from dagster_taskiq_tests.acceptance.launched import (
    LEASE_SECONDS,
    LaunchedRun,
    open_launching_stack,
)

#: A code location whose one step is named by its state, which is another one each time.
CODE = """
import os
import uuid
from pathlib import Path

from dagster import Definitions, job, op
from dagster._core.definitions.definitions_load_context import StateBackedDefinitionsLoader

from dagster_taskiq import taskiq_executor

def note(what: str) -> None:
    with Path(__file__).with_name(what).open("a") as file:
        file.write(f"{os.getpid()} ")

class Loader(StateBackedDefinitionsLoader):
    defs_key = "tables"

    def fetch_state(self):
        note("fetched")
        return uuid.uuid4().hex

    def defs_from_state(self, state):
        note("made")

        @op(name=f"read_{state}")
        def read() -> None: ...

        @job(executor_def=taskiq_executor)
        def tables() -> None:
            read()

        return Definitions(jobs=[tables])

defs = Loader().build_defs()
"""


class Location:
    """The code location, and the code server that Dagster would have for it."""

    def __init__(self, stack: Stack, monkeypatch: pytest.MonkeyPatch, *, is_file: bool) -> None:
        self._is_file = is_file
        self._stack = stack
        self._monkeypatch = monkeypatch
        self._module = f"stateful_{uuid.uuid4().hex}"
        (stack.directory / f"{self._module}.py").write_text(CODE)

    def times(self, what: str) -> int:
        """How often processes of the worker have done something."""
        path = self._stack.directory / what
        pids = path.read_text().split() if path.exists() else []
        return len(pids) - pids.count(str(os.getpid()))

    @contextmanager
    def _loading(self) -> Iterator[None]:
        """Load the module anew; what Dagster and Python keep of it is gone afterwards."""
        with self._monkeypatch.context() as kept:
            kept.setattr(DefinitionsLoadContext, "_instance", None)
            try:
                yield
            finally:
                sys.modules.pop(self._module, None)

    def reload(self) -> ReconstructableJob:
        """Load it as a code server does, which asks for the state; its job, as runs have it."""
        directory = str(self._stack.directory)
        pointer: CodePointer = ModuleCodePointer(self._module, "defs", directory)
        if self._is_file:
            file = str(self._stack.directory / f"{self._module}.py")
            pointer = FileCodePointer(file, "defs", directory)
        with self._loading():
            definition = initialize_repository_def_from_pointer(pointer)
        job = ReconstructableJob(ReconstructableRepository(pointer), "tables")
        return job.with_repository_load_data(definition.repository_load_data)

    def launch(self, job: ReconstructableJob) -> LaunchedRun:
        config = {**self._stack.config, "lease_seconds": LEASE_SECONDS}
        with self._loading():
            definition = job.get_definition()
        run_id = self._stack.instance.create_run_for_job(
            definition,
            run_config={"execution": {"config": config}},
            job_code_origin=job.get_python_origin(),
            repository_load_data=job.repository.repository_load_data,
        ).run_id
        self._stack.instance.launch_run(run_id, cast("Any", None))
        return LaunchedRun(self._stack, run_id)


@pytest.mark.parametrize("is_file", [False, True], ids=["module", "file"])
def test_runs_have_the_state_that_they_were_launched_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_file: bool
) -> None:
    """Their steps do, too; no worker asks for it, and each state is loaded once."""
    with open_launching_stack("redis", tmp_path) as stack:
        location = Location(stack, monkeypatch, is_file=is_file)
        jobs = [location.reload() for _ in range(2)]
        stack.worker(slots=2).await_ready()
        steps = []
        for job in [*jobs, *jobs]:
            run = location.launch(job).wait()
            assert run.is_success
            steps += [it.step_key for it in run.events(DagsterEventType.STEP_SUCCESS)]
        assert len(steps) == 4
        assert len(set(steps)) == 2
        assert location.times("fetched") == 0
        assert location.times("made") == 2


def test_a_worker_that_starts_loads_the_last_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it finds it in what the workers before it have executed, so runs need not wait for it."""
    with open_launching_stack("redis", tmp_path) as stack:
        location = Location(stack, monkeypatch, is_file=False)
        jobs = [location.reload() for _ in range(2)]
        worker = stack.worker(slots=1).await_ready()
        for job in jobs:
            run = location.launch(job).wait()
            assert run.is_success
        until(lambda: stack.ended(run.run_id), "the end of the last run is known")
        assert location.times("made") == 2
        worker.terminate()
        assert worker.wait() == 0
        stack.worker(slots=1).await_log("Loaded from stateful")
        assert location.times("made") == 3
        assert location.launch(jobs[1]).wait().is_success
        assert location.times("made") == 3
        assert location.times("fetched") == 0
