"""The backend: results, claims, mailboxes, control, the list of workers, the epoch."""

from __future__ import annotations

from dagster_taskiq.backend.base import (
    Backend,
    Claim,
    ClaimAnswer,
    Renewal,
    TaskReport,
    TaskState,
)
from dagster_taskiq.backend.redis import RedisBackend
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.servers.kinds import ServerOptions

__all__ = [
    "Backend",
    "Claim",
    "ClaimAnswer",
    "Renewal",
    "TaskReport",
    "TaskState",
    "open_backend",
]


def open_backend(options: ServerOptions, signer: Signer) -> Backend:
    """The backend for a URL; not yet connected, ``startup`` does that.

    Args:
        signer: of workers' records.
    """
    return RedisBackend(options, signer)
