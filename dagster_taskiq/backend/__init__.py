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
from dagster_taskiq.errors import ConfigError
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.servers.bell import Bell
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


def open_backend(options: ServerOptions, signer: Signer, bell: Bell | None = None) -> Backend:
    """The backend for a URL; not yet connected, ``startup`` does that.

    Args:
        options: the kind of server that the URL names decides which backend it is.
        signer: of workers' records.
        bell: that tells of results in place of its own, see ``brokers.open_bell``; it is closed
            with the backend. Loops and workers that share a broker must agree on it.

    Raises:
        ConfigError: no backend speaks the URL's scheme, or its client library is not installed.
    """
    kind = options.kind
    if kind.backend is None:
        raise ConfigError(f"{options.address} cannot be the backend: it is a {kind.name}.")
    make = options.load(f"{__name__}.{kind.backend}", "backend")
    backend: Backend = make(options, signer) if bell is None else make(options, signer, bell)
    return backend
