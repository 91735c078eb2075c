"""Run Dagster steps and runs on Taskiq workers."""

from dagster_taskiq.version import __version__

__all__ = ["__version__"]
