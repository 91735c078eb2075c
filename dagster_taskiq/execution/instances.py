"""Dagster's instance in a process that executes steps and runs."""

from __future__ import annotations

import os

from dagster import DagsterInstance

from dagster_taskiq._dagster.names import InstanceRef
from dagster_taskiq.errors import WrongInstanceError


def open_instance(ref: InstanceRef | None) -> DagsterInstance:
    """The instance of a message; this process's own where the message names none.

    Raises:
        WrongInstanceError: this process has none.
    """
    if ref is not None:
        return DagsterInstance.from_ref(ref)
    if not os.getenv("DAGSTER_HOME"):
        raise WrongInstanceError(
            "This worker has no Dagster instance: set DAGSTER_HOME to the directory of the "
            "dagster.yaml that the run uses, and start the worker again."
        )
    return DagsterInstance.get()
