"""Run Dagster steps and runs on Taskiq workers: see ``taskiq_executor``."""

import sys

if sys.platform == "win32":
    raise ImportError(
        "dagster-taskiq needs the process groups and signals of Unix: use Linux, macOS for "
        "development, or on Windows WSL or a container."
    )

from dagster_shared.libraries import DagsterLibraryRegistry

from dagster_taskiq.executor import taskiq_executor
from dagster_taskiq.launcher import TaskiqRunLauncher
from dagster_taskiq.version import __version__

__all__ = ["TaskiqRunLauncher", "__version__", "taskiq_executor"]

DagsterLibraryRegistry.register("dagster-taskiq", __version__, is_dagster_package=False)
