"""The brokers: one contract (``base``), one implementation a kind of server."""

from __future__ import annotations

from collections.abc import Sequence

from dagster_taskiq.brokers.base import Admission, Delivery, TaskBroker
from dagster_taskiq.servers.bell import Bell
from dagster_taskiq.servers.kinds import ServerOptions

__all__ = ["Admission", "Delivery", "TaskBroker", "open_bell", "open_broker"]


def open_broker(
    options: ServerOptions, queues: Sequence[str] = (), admission: Admission | None = None
) -> TaskBroker:
    """The broker for a URL; not yet connected, ``startup`` does that.

    Args:
        options: the kind of server that the URL names decides which broker it is.
        queues: the physical queues to listen on; none for a sender.
        admission: decides which messages are handed on; None for all.

    Raises:
        ConfigError: no broker speaks the URL's scheme, or its client library is not installed.
    """
    make = options.load(f"{__name__}.{options.kind.broker}", "broker")
    broker: TaskBroker = make(options, queues, admission)
    return broker


def open_bell(broker: ServerOptions, backend: ServerOptions) -> Bell | None:
    """The bell of a broker, for a backend that had better be woken by it; not yet connected.

    Returns:
        None where the broker has no bell, or the backend's own serves as well.
    """
    bell = broker.kind.bell
    if bell is None or not backend.kind.is_woken_by_broker:
        return None
    opened: Bell = broker.load(f"{__name__}.{bell}", "broker")(broker)
    return opened
