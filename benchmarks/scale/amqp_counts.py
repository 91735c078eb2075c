"""Counts what goes through a proxy to an AMQP server."""

from __future__ import annotations

import struct
from collections import Counter

from dagster_taskiq_tests.proxy import Reader

#: The methods that tell what a broker does for steps, by class and method of AMQP 0-9-1.
_METHODS = {
    (60, 40): "publish",
    (60, 60): "deliver",
    (60, 70): "get",
    (60, 71): "get-ok",
    (60, 72): "get-empty",
    (60, 20): "consume",
    (60, 30): "cancel",
    (60, 80): "ack",
    (60, 90): "reject",
}

_FRAME_HEADER = struct.Struct(">BHI")
_METHOD_FRAME, _HEADER_FRAME = 1, 2
_PROTOCOL_HEADER_BYTES = 8


class AmqpCounts:
    """Counts frames, bytes and methods of the connections through an AMQP proxy.

    Attributes:
        counts: ``frames``, ``input_bytes`` (to the server), ``output_bytes``, ``body_bytes`` of
            what was published, and the methods by name; ``ack`` to the server and ``confirm`` from
            it are the same method.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def make_reader(self, is_to_server: bool) -> Reader:
        """For ``proxied``."""
        buffer = bytearray()
        skip = _PROTOCOL_HEADER_BYTES if is_to_server else 0
        is_publishing = False

        def read(data: bytes) -> None:
            nonlocal skip, is_publishing
            self.counts["input_bytes" if is_to_server else "output_bytes"] += len(data)
            buffer.extend(data)
            if len(buffer) < skip:
                return
            del buffer[:skip]
            skip = 0
            while len(buffer) >= _FRAME_HEADER.size:
                kind, _, size = _FRAME_HEADER.unpack_from(buffer)
                end = _FRAME_HEADER.size + size + 1
                if len(buffer) < end:
                    return
                body = bytes(buffer[_FRAME_HEADER.size : end - 1])
                del buffer[:end]
                is_publishing = self._count(kind, body, is_to_server, is_publishing)

        return read

    def _count(self, kind: int, body: bytes, is_to_server: bool, is_publishing: bool) -> bool:
        """Count one frame; whether a published message's header comes next."""
        self.counts["frames"] += 1
        if kind == _HEADER_FRAME and is_publishing:
            self.counts["body_bytes"] += int.from_bytes(body[4:12], "big")
        if kind != _METHOD_FRAME:
            return False
        name = _METHODS.get((int.from_bytes(body[:2], "big"), int.from_bytes(body[2:4], "big")))
        if name == "ack" and not is_to_server:
            name = "confirm"
        if name is not None:
            self.counts[name] += 1
        return name == "publish"
