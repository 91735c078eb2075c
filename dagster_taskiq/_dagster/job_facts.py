"""Where the steps of jobs are sent to, and where they leave their outputs."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dagster import (
    Definitions,
    FilesystemIOManager,
    JobDefinition,
    fs_io_manager,
    mem_io_manager,
)
from dagster._core.definitions.repository_definition import RepositoryDefinition

from dagster_taskiq.errors import ConfigError

#: The name of an IO manager that keeps outputs in the memory of one process.
IN_MEMORY = "mem_io_manager"

#: The IO manager of a job that names none: files, unless this variable names another one.
_USUAL = "default_job_io_manager"
_USUAL_VARIABLE = "DAGSTER_DEFAULT_IO_MANAGER_MODULE"


@dataclass(frozen=True)
class IoManager:
    """An IO manager of a job whose steps execute on workers.

    Attributes:
        job: its name.
        key: of the resource.
        kind: its class or function.
        is_local: whether it keeps outputs in a directory of the step's host.
        directory: where; empty for the usual one of the instance.
        is_directory_known: whether it can be told; it cannot where it is told by each run.
    """

    job: str
    key: str
    kind: str
    is_local: bool = False
    directory: str = ""
    is_directory_known: bool = True


@dataclass(frozen=True)
class JobFacts:
    """A job whose steps execute on workers.

    Attributes:
        executor_config: of its executor, as the code gives it; what runs are given with their own
            config is not in it.
    """

    name: str
    io_managers: Sequence[IoManager] = ()
    executor_config: Mapping[str, Any] = field(default_factory=dict)


def jobs_of(module: str, executor: str) -> list[JobFacts]:
    """The jobs of a module that have an executor of that name.

    Args:
        module: which is imported; it may lie in the present directory.

    Raises:
        ConfigError: it cannot be imported, or has no definitions that can be used.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
        jobs = {job.name: job for job in _jobs_of(found) if job.executor_def.name == executor}
        return [
            JobFacts(job.name, tuple(_io_managers_of(job)), _executor_config(job))
            for job in jobs.values()
        ]
    except Exception as error:  # of any kind: it is the user's code
        raise ConfigError(
            f"The definitions of module {module!r} cannot be loaded here: "
            f"{type(error).__name__}: {error}"
        ) from error


def _jobs_of(module: Any) -> Iterator[JobDefinition]:
    for value in list(vars(module).values()):
        if isinstance(value, JobDefinition):
            yield value
        elif isinstance(value, Definitions):
            yield from value.get_repository_def().get_all_jobs()
        elif isinstance(value, RepositoryDefinition):
            yield from value.get_all_jobs()


def _io_managers_of(job: JobDefinition) -> Iterator[IoManager]:
    for key, resource in job.resource_defs.items():
        kind: Any = getattr(resource, "configurable_resource_cls", None)
        function = getattr(resource, "resource_fn", None)
        if kind is FilesystemIOManager:
            directory = _directory_of(resource)
            is_known = directory is not None
            yield IoManager(job.name, key, kind.__name__, True, directory or "", is_known)
        elif function is mem_io_manager.resource_fn:
            yield IoManager(job.name, key, IN_MEMORY)
        elif function is fs_io_manager.resource_fn:
            directory = _directory_of(resource)
            is_known = directory is not None
            yield IoManager(job.name, key, "fs_io_manager", True, directory or "", is_known)
        elif key.endswith("io_manager"):
            name = str(getattr(kind or function, "__name__", "unknown"))
            is_usual = name.startswith(_USUAL) and not os.getenv(_USUAL_VARIABLE)
            yield IoManager(job.name, key, name, is_usual)


def _directory_of(resource: Any) -> str | None:
    """The directory that an IO manager was given; empty for none, None where it is not known."""
    config = _config_of(resource)
    if config is None:
        return None
    # an IO manager that is a class has what it was given as the default of its config
    schema = resource.config_schema.as_field()
    given = schema.default_value if schema.default_provided else None
    directory = {**(given or {}), **config}.get("base_dir")
    if isinstance(directory, Mapping):  # a variable of the environment, where the step is executed
        return None
    return str(directory or "")


def _executor_config(job: JobDefinition) -> Mapping[str, Any]:
    """What the code gives a job's executor: with the executor, or with the job's run config."""
    own = (job.run_config or {}).get("execution", {}).get("config", {})
    return own or _config_of(job.executor_def) or {}


def _config_of(definition: Any) -> Mapping[str, Any] | None:
    """The config of a definition that a run gives none; None where it needs some."""
    try:
        result = definition.apply_config_mapping({"config": {}})
    except Exception:  # of any kind: it may be the user's code
        return None
    return (result.value or {}).get("config", {}) if result.success else None
