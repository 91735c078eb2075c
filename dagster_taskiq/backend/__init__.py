"""The backend: results, claims, mailboxes, control, the list of workers, the epoch."""

from __future__ import annotations

from pkgutil import resolve_name

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
        options: the kind of server that the URL names decides which backend it is.
        signer: of workers' records.

    Raises:
        ConfigError: no backend speaks the URL's scheme.
    """
    name = options.kind.backend
    if name is None:
        raise ConfigError(f"{options.address} cannot be the backend: it is a {options.kind.name}.")
    # by name, so that no run or worker loads the client library of a server that it does not use
    backend: Backend = resolve_name(f"{__name__}.{name}")(options, signer)
    return backend
