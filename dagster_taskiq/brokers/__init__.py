"""The brokers: one contract (``base``), one implementation a kind of server."""

from __future__ import annotations

from collections.abc import Sequence
from pkgutil import resolve_name

from dagster_taskiq.brokers.base import Admission, Delivery, TaskBroker
from dagster_taskiq.errors import ConfigError
from dagster_taskiq.servers.kinds import ServerOptions

__all__ = ["Admission", "Delivery", "TaskBroker", "open_broker"]


def open_broker(
    options: ServerOptions, queues: Sequence[str] = (), admission: Admission | None = None
) -> TaskBroker:
    """The broker for a URL; not yet connected, ``startup`` does that.

    Args:
        options: the kind of server that the URL names decides which broker it is.
        queues: the physical queues to listen on; none for a sender.
        admission: decides which messages are handed on; None for all.

    Raises:
        ConfigError: no broker speaks the URL's scheme.
    """
    kind = options.kind
    if kind.broker is None:
        raise ConfigError(f"{options.address} cannot be the broker: it is a {kind.name}.")
    # by name, so that no run or worker loads the client library of a server that it does not use
    broker: TaskBroker = resolve_name(f"{__name__}.{kind.broker}")(options, queues, admission)
    return broker
