"""Messages between a worker and its children: JSON over a socket, behind a mark and its length."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from typing import Any

#: Begins each message, so that whatever else a process writes to the socket is noticed at once.
_MARK = b"\x00dt\n"

_HEAD = struct.Struct("!4sI")


def encode(message: dict[str, Any]) -> bytes:
    """One frame."""
    body = json.dumps(message).encode()
    return _HEAD.pack(_MARK, len(body)) + body


async def read(reader: asyncio.StreamReader) -> dict[str, Any]:
    """The next message.

    Raises:
        asyncio.IncompleteReadError: the other side is gone.
        ValueError: what came is no message.
    """
    length = _length(await reader.readexactly(_HEAD.size))
    return _decoded(await reader.readexactly(length))


def receive(connection: socket.socket) -> dict[str, Any] | None:
    """The next message, for the synchronous side; None when the other side is gone.

    Raises:
        ValueError: what came is no message.
    """
    head = _receive_exactly(connection, _HEAD.size)
    if head is None:
        return None
    body = _receive_exactly(connection, _length(head))
    return None if body is None else _decoded(body)


def _decoded(body: bytes) -> dict[str, Any]:
    message = json.loads(body)
    if isinstance(message, dict):
        return message
    raise ValueError("it is no JSON object")


def _length(head: bytes) -> int:
    mark, length = _HEAD.unpack(head)
    if mark != _MARK:
        raise ValueError(f"{head!r} is not the head of a message")
    return int(length)


def _receive_exactly(connection: socket.socket, count: int) -> bytes | None:
    chunks = bytearray()
    while len(chunks) < count:
        chunk = connection.recv(count - len(chunks))
        if not chunk:
            return None
        chunks += chunk
    return bytes(chunks)
