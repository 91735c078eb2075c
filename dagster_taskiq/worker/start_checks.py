"""What a worker that starts finds around it, and says in its log."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable

from dagster_taskiq.messages.worker_records import WorkerRecord

logger = logging.getLogger(__name__)

#: The process that all orphans of a container are given to.
_INIT = 1


def warn_without_init() -> None:
    """Say so if this worker is the process that must reap what steps leave behind."""
    if os.getpid() == _INIT:
        logger.warning(
            "This worker is process 1 of its container, and processes that steps leave behind stay "
            "there as defunct ones. Start the container with an init: docker run --init, init: "
            "true in a compose file, or tini in the image."
        )


def warn_of_namesakes(name: str, workers: Iterable[WorkerRecord]) -> None:
    """Say so if other workers have the same name on the same host.

    Args:
        name: ``name@host`` of the worker that starts.
        workers: that are listed already.
    """
    for record in workers:
        if record.name == name:
            logger.warning(
                "A worker named %s is listed already, with pid %d. Unless it has ended in the last "
                "half minute, both run: give each its own name (-n), as orders to a name go to "
                "all that have it.",
                name,
                record.pid,
            )
