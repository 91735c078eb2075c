"""Run Dagster steps and runs on Taskiq workers: see ``taskiq_executor``."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if sys.platform == "win32":
    raise ImportError(
        "dagster-taskiq needs the process groups and signals of Unix: use Linux, macOS for "
        "development, or on Windows WSL or a container."
    )

from dagster_shared.libraries import DagsterLibraryRegistry

from dagster_taskiq.version import __version__

if TYPE_CHECKING:
    from dagster_taskiq.errors import SoftTimeLimitError
    from dagster_taskiq.executor import taskiq_executor
    from dagster_taskiq.launcher import TaskiqRunLauncher

__all__ = ["SoftTimeLimitError", "TaskiqRunLauncher", "__version__", "taskiq_executor"]

DagsterLibraryRegistry.register("dagster-taskiq", __version__, is_dagster_package=False)

_MODULES = {
    "SoftTimeLimitError": "errors",
    "TaskiqRunLauncher": "launcher",
    "taskiq_executor": "executor",
}


def __getattr__(name: str) -> Any:
    # at the first use: the command line must answer Ctrl-C before all of Dagster is imported
    if name in _MODULES:
        return getattr(import_module(f"dagster_taskiq.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
