"""Properties of messages from RabbitMQ that its client library cannot read.

Anybody who may publish can send some: text that is no UTF-8, a time out of range, nested headers
without end. The library fails at them in the middle of a connection, which ends it; RabbitMQ then
delivers the message again, and nothing else of its queue is ever read. A message with such
properties is none of ours: it gets a mark in their place, by which the broker refuses it.
"""

from __future__ import annotations

from contextvars import ContextVar

from pamqp.commands import Basic
from pamqp.header import ContentHeader

#: Set in the tasks of our connections, which inherit it from the call that connects: other
#: connections of the process keep the library's behaviour.
is_ours = ContextVar("is_ours", default=False)

#: Stands as the type of a message whose properties cannot be decoded.
UNREADABLE = "dagster-taskiq: unreadable properties"

#: Properties that aio-pika converts; it fails at odd ones.
_CONVERTED = ("delivery_mode", "expiration", "timestamp")

_unmarshal = ContentHeader.unmarshal


def _unmarshal_leniently(self: ContentHeader, data: bytes) -> None:
    try:
        _unmarshal(self, data)
    except Exception:
        is_cut = vars(self)["class_id"] is None  # then it is not the properties that are wrong
        if is_cut or not is_ours.get():
            raise
        self.properties = Basic.Properties(message_type=UNREADABLE)
    if is_ours.get():
        for name in _CONVERTED:
            setattr(self.properties, name, None)


ContentHeader.unmarshal = _unmarshal_leniently  # type: ignore[method-assign]
