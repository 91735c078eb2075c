"""Dagster's instance, made ready in a process for those that are forked from it."""

from __future__ import annotations

from dagster import DagsterInstance

from dagster_taskiq._dagster.compiled_statements import compile_statements
from dagster_taskiq._dagster.known_schema import know_schema


def make_ready(instance: DagsterInstance) -> None:
    """Have an instance make now what it would make in each process at its first use.

    Reads the database, and starts no thread.

    Args:
        instance: its storages share engines already, if they will.
    """
    know_schema(instance)
    compile_statements(instance)
    _open_parts(instance)


def _open_parts(instance: DagsterInstance) -> None:
    """Those that every run needs, where they are Dagster's own: others may be no good to fork."""
    ref = instance.get_ref()
    parts = {
        "run_coordinator": ref.run_coordinator_data,
        "compute_log_manager": ref.compute_logs_data,
    }
    for name, data in parts.items():
        if data is not None and data.module_name.partition(".")[0] == "dagster":
            getattr(instance, name)
