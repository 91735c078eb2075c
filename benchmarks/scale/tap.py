"""A tap: it lets everything through to a server and shows it to somebody who counts."""

from __future__ import annotations

import asyncio
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

from dagster_taskiq.aio.loop_thread import LoopThread
from dagster_taskiq.servers.kinds import is_amqp

#: Takes what came, in one direction of one connection.
Reader = Callable[[bytes], None]

#: Makes the reader of a new connection's direction; its argument is whether it is to the server.
MakeReader = Callable[[bool], Reader]

_DEFAULT_PORTS = {True: 5672, False: 6379}


class Tap:
    """Listens on a port of its own.

    Args:
        url: of the server behind it, ``redis://`` or ``amqp://``.
        make_reader: is called twice for each connection.
    """

    def __init__(self, url: str, make_reader: MakeReader) -> None:
        self._parts = urlsplit(url)
        self._upstream = (
            str(self._parts.hostname),
            self._parts.port or _DEFAULT_PORTS[is_amqp(url)],
        )
        self._make_reader = make_reader
        self.connections = 0
        self._thread = LoopThread("tap")
        self._server = self._thread.call(self._listen())
        self._port = self._server.sockets[0].getsockname()[1]

    @property
    def url(self) -> str:
        """The server's, through the tap."""
        login, at, _ = self._parts.netloc.rpartition("@")
        return self._parts._replace(netloc=f"{login}{at}127.0.0.1:{self._port}").geturl()

    def close(self) -> None:
        """End it with all connections."""
        self._thread.stop()

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._connect, "127.0.0.1", 0)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(*self._upstream)
        self.connections += 1
        try:
            # asyncio's streams would report a cancellation, the end of the tap, as an error
            with suppress(asyncio.CancelledError):
                await asyncio.gather(
                    self._pump(reader, there_writer, self._make_reader(True)),
                    self._pump(there_reader, writer, self._make_reader(False)),
                )
        finally:
            self.connections -= 1
            for side in (writer, there_writer):
                side.transport.abort()

    async def _pump(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, read: Reader
    ) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                read(data)
                target.write(data)
                await target.drain()
        with suppress(OSError):
            target.close()


@contextmanager
def tapped(url: str, make_reader: MakeReader) -> Iterator[Tap]:
    """A tap before the server, closed afterwards."""
    tap = Tap(url, make_reader)
    try:
        yield tap
    finally:
        tap.close()


# --- AMQP ---------------------------------------------------------------------------------------

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
    """Counts frames, bytes and methods of the connections of an AMQP tap.

    Attributes:
        counts: ``frames``, ``input_bytes`` (to the server), ``output_bytes``, ``body_bytes`` of
            what was published, and the methods by name; ``ack`` to the server and ``confirm`` from
            it are the same method.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def make_reader(self, is_to_server: bool) -> Reader:
        """For ``Tap``."""
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
