"""Where the steps of jobs leave their outputs."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
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
        is_directory_known: whether it can be told; it cannot where a function was configured.
    """

    job: str
    key: str
    kind: str
    is_local: bool = False
    directory: str = ""
    is_directory_known: bool = True


def io_managers_of(module: str, executor: str) -> list[IoManager]:
    """The IO managers of a module's jobs that have an executor of that name.

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
        return [it for job in jobs.values() for it in _io_managers_of_job(job)]
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


def _io_managers_of_job(job: JobDefinition) -> Iterator[IoManager]:
    for key, resource in job.resource_defs.items():
        kind: Any = getattr(resource, "configurable_resource_cls", None)
        function = getattr(resource, "resource_fn", None)
        if kind is not None:
            is_local = kind is FilesystemIOManager
            directory = _directory_of(resource) if is_local else ""
            if is_local or key.endswith("io_manager"):
                yield IoManager(job.name, key, kind.__name__, is_local, directory or "")
        elif function is mem_io_manager.resource_fn:
            yield IoManager(job.name, key, IN_MEMORY)
        elif function is fs_io_manager.resource_fn:
            directory = "" if resource is fs_io_manager else _directory_of(resource)
            is_known = directory is not None
            yield IoManager(job.name, key, "fs_io_manager", True, directory or "", is_known)
        elif key.endswith("io_manager"):
            name = getattr(function, "__name__", "unknown")
            is_usual = name.startswith(_USUAL) and not os.getenv(_USUAL_VARIABLE)
            yield IoManager(job.name, key, name, is_usual)


def _directory_of(resource: Any) -> str | None:
    """The directory that an IO manager was given; empty for none, None where it is not known."""
    field = resource.config_schema.as_field()
    if not field.default_provided:
        return None
    value = field.default_value.get("base_dir")
    return value if isinstance(value, str) else ("" if value is None else None)
