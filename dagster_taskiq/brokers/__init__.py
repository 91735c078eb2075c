"""The brokers: one contract (``base``), one implementation a kind of server."""

from __future__ import annotations

from collections.abc import Sequence

from dagster_taskiq.brokers.base import Admission, Delivery, TaskBroker
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
        ConfigError: no broker speaks the URL's scheme, or its client library is not installed.
    """
    make = options.load(f"{__name__}.{options.kind.broker}", "broker")
    broker: TaskBroker = make(options, queues, admission)
    return broker
