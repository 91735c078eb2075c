"""A TCP proxy before a server, which fails as networks and servers do, when it is told to.

It runs in a thread of its own, so that tests and scripts may do what they like meanwhile.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import Enum
from urllib.parse import urlsplit

from dagster_taskiq.aio.loop_thread import LoopThread
from dagster_taskiq.servers.kinds import ServerOptions

_DEFAULT_PORTS = {"amqp": 5672, "redis": 6379, "postgresql": 5432}


#: Takes what came, in one direction of one connection.
Reader = Callable[[bytes], object]

#: Makes the reader of a new connection's direction; its argument is whether it is to the server.
MakeReader = Callable[[bool], Reader]


def _unread(_: bool) -> Reader:
    """Nobody looks at what goes through."""
    return lambda _: None


class Mode(Enum):
    """What the proxy does with connections."""

    #: Everything gets through.
    PASS = "pass"
    #: Nobody listens: connections are refused, those that there were are reset.
    REFUSE = "refuse"
    #: What is sent vanishes without a word, and the connection never recovers: a network that is
    #: cut, with a firewall between that forgets its connections.
    DROP = "drop"
    #: What is sent arrives later: a short cut that TCP makes good, or a server that is frozen.
    HOLD = "hold"


@dataclass(eq=False)
class _Pair:
    """One connection through the proxy: both its sides, and whether it has lost something."""

    writers: tuple[asyncio.StreamWriter, asyncio.StreamWriter]
    has_lost: bool = False

    def reset(self) -> None:
        for writer in self.writers:
            writer.transport.abort()


class Proxy:
    """Listens on a port of its own, the same for its whole life.

    Args:
        url: of the server behind it, ``redis://``, ``amqp://`` or ``postgresql://``.
        make_reader: is called twice for each connection, by whoever wants to see what goes through.
        tls: what clients must speak with the proxy, where its server speaks none.
    """

    def __init__(
        self, url: str, make_reader: MakeReader = _unread, tls: ssl.SSLContext | None = None
    ) -> None:
        self._parts = urlsplit(url)
        port = self._parts.port or _DEFAULT_PORTS[self._parts.scheme]
        self._upstream = (str(self._parts.hostname), port)
        self._port = 0
        self._make_reader = make_reader
        self._tls = tls
        self._mode = Mode.PASS
        self._changed = asyncio.Event()
        self._pairs: set[_Pair] = set()
        self._server: asyncio.Server | None = None
        self._thread = LoopThread("proxy")
        self._thread.call(self._listen())

    @property
    def url(self) -> str:
        """The server's, through the proxy."""
        login, at, _ = self._parts.netloc.rpartition("@")
        scheme = self._parts.scheme + ("s" if self._tls else "")
        netloc = f"{login}{at}127.0.0.1:{self._port}"
        return self._parts._replace(scheme=scheme, netloc=netloc).geturl()

    def options(self, options: ServerOptions) -> ServerOptions:
        """The same server through the proxy."""
        return replace(options, url=self.url)

    @property
    def connections(self) -> int:
        """How many there are through it now."""
        return len(self._pairs)

    @property
    def mode(self) -> Mode:
        """What it does now."""
        return self._mode

    def set(self, mode: Mode) -> None:
        """From now on do this."""
        self._thread.call(self._set(mode))

    def cut(self) -> None:
        """Reset all connections; new ones are taken."""
        self._thread.call(self._cut())

    @contextmanager
    def failing(self, mode: Mode) -> Iterator[None]:
        """Do this for a while, then let everything through again."""
        self.set(mode)
        try:
            yield
        finally:
            self.set(Mode.PASS)

    def close(self) -> None:
        """End it with all connections."""
        self._thread.call(self._set(Mode.REFUSE))
        self._thread.stop()

    # --- in the thread ---

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(
            self._connect, "127.0.0.1", self._port, ssl=self._tls
        )
        self._port = self._server.sockets[0].getsockname()[1]

    async def _set(self, mode: Mode) -> None:
        self._mode = mode
        self._changed.set()
        self._changed = asyncio.Event()
        if mode is Mode.REFUSE:
            if self._server is not None:
                self._server.close()
                self._server = None
            await self._cut()
        elif self._server is None:
            await self._listen()

    async def _cut(self) -> None:
        for pair in list(self._pairs):
            pair.reset()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._until_not(Mode.DROP, Mode.HOLD)
        try:
            there_reader, there_writer = await asyncio.open_connection(*self._upstream)
        except OSError:
            writer.transport.abort()
            return
        if self._mode is Mode.REFUSE:
            writer.transport.abort()
            there_writer.transport.abort()
            return
        pair = _Pair((writer, there_writer))
        self._pairs.add(pair)
        try:
            await asyncio.gather(
                self._pump(pair, reader, there_writer, self._make_reader(True)),
                self._pump(pair, there_reader, writer, self._make_reader(False)),
            )
        finally:
            self._pairs.discard(pair)
            pair.reset()

    async def _pump(
        self,
        pair: _Pair,
        source: asyncio.StreamReader,
        target: asyncio.StreamWriter,
        read: Reader,
    ) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                await self._until_not(Mode.HOLD)
                if self._mode is Mode.DROP:
                    pair.has_lost = True
                if not pair.has_lost:
                    read(data)
                    target.write(data)
                    await target.drain()
        await self._until_not(
            Mode.DROP, Mode.HOLD
        )  # the end of a connection does not arrive either
        with suppress(OSError):
            target.close()

    async def _until_not(self, *modes: Mode) -> None:
        while self._mode in modes:
            await self._changed.wait()


@contextmanager
def proxied(url: str, make_reader: MakeReader = _unread) -> Iterator[Proxy]:
    """A proxy before the server, closed afterwards."""
    proxy = Proxy(url, make_reader)
    try:
        yield proxy
    finally:
        proxy.close()
