"""The backend: results, claims, mailboxes, control, the list of workers, the epoch."""

from __future__ import annotations

from dagster_taskiq.backend.base import (
    Backend,
    Claim,
    ClaimAnswer,
    Renewal,
    TaskReport,
    TaskState,
    WorkerRecord,
)
from dagster_taskiq.backend.redis import RedisBackend
from dagster_taskiq.servers import ServerOptions
from dagster_taskiq.signing import Signer

__all__ = [
    "Backend",
    "Claim",
    "ClaimAnswer",
    "Renewal",
    "TaskReport",
    "TaskState",
    "WorkerRecord",
    "open_backend",
]


def open_backend(options: ServerOptions, signer: Signer) -> Backend:
    """The backend for a URL; not yet connected, ``startup`` does that.

    Args:
        signer: of workers' records.
    """
    return RedisBackend(options, signer)
