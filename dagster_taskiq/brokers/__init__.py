"""The brokers: one contract (``base``), one implementation a kind of server."""

from __future__ import annotations

from collections.abc import Sequence

from dagster_taskiq.brokers.amqp import AmqpTaskBroker
from dagster_taskiq.brokers.base import Delivery, TaskBroker
from dagster_taskiq.brokers.redis import RedisTaskBroker
from dagster_taskiq.servers import ServerOptions, is_amqp

__all__ = ["Delivery", "TaskBroker", "open_broker"]


def open_broker(options: ServerOptions, queues: Sequence[str] = ()) -> TaskBroker:
    """The broker for a URL; not yet connected, ``startup`` does that.

    Args:
        options: the URL's scheme decides which broker it is.
        queues: the physical queues to listen on; none for a sender.

    Raises:
        ConfigError: no broker speaks the URL's scheme.
    """
    if is_amqp(options.url):
        return AmqpTaskBroker(options, queues)
    return RedisTaskBroker(options, queues)
