"""The brokers: one contract (``base``), one implementation a kind of server."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from dagster_taskiq.brokers.base import Delivery, TaskBroker
from dagster_taskiq.servers.kinds import ServerOptions, is_amqp

__all__ = ["Delivery", "TaskBroker", "open_broker"]


def open_broker(options: ServerOptions, queues: Sequence[str] = ()) -> TaskBroker:
    """The broker for a URL; not yet connected, ``startup`` does that.

    Args:
        options: the URL's scheme decides which broker it is.
        queues: the physical queues to listen on; none for a sender.

    Raises:
        ConfigError: no broker speaks the URL's scheme.
    """
    # by name, so that every run and worker does not load the client libraries of both servers
    kind = ("amqp", "AmqpTaskBroker") if is_amqp(options.url) else ("redis", "RedisTaskBroker")
    broker: TaskBroker = getattr(import_module(f"{__name__}.{kind[0]}"), kind[1])(options, queues)
    return broker
