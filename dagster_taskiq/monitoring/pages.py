"""A small HTTP server in threads of its own, which answers while everything else hangs."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from socketserver import ThreadingMixIn
from typing import Any

from dagster_taskiq.errors import ConfigError
from dagster_taskiq.version import __version__

logger = logging.getLogger(__name__)

#: How many requests are answered at once; more are hung up on.
_MOST_REQUESTS = 16

#: How long a client may take to say what it wants, and to read the answer.
_CLIENT_SECONDS = 10.0

#: How often the server looks whether it is to end.
_POLL_SECONDS = 0.25

TEXT = "text/plain; charset=utf-8"


@dataclass(frozen=True)
class Page:
    """What is answered."""

    body: bytes
    status: HTTPStatus = HTTPStatus.OK
    content_type: str = TEXT


def lines(sentences: Iterable[str]) -> bytes:
    """A body of text with a sentence in each line."""
    return "".join(f"{sentence}\n" for sentence in sentences).encode()


#: Makes a page for a request's ``Accept`` header, which may be empty.
MakePage = Callable[[str], Page]


class PageServer:
    """Serves pages by their paths.

    Args:
        host: a name or an address to listen on.
        port: 0 for a free one.
        pages: by path; they are made in threads of the server.

    Raises:
        ConfigError: nothing can listen there; with the reason.
    """

    def __init__(self, host: str, port: int, pages: Mapping[str, MakePage]) -> None:
        try:
            family, _, _, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            self._server = _server(family, address, pages)
        except (OSError, UnicodeError) as error:
            raise ConfigError(
                f"Cannot serve metrics on {host}, port {port}: "
                f"{getattr(error, 'strerror', None) or error}. Give another port or host, or port "
                "0 for any that is free."
            ) from error
        self._host = host
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        """That it listens on."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """Without a path."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.port}"

    def start(self) -> None:
        """Answer from now on."""
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_SECONDS,), name="pages", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop to listen; what is being answered goes on."""
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


def _server(family: int, address: Any, pages: Mapping[str, MakePage]) -> HTTPServer:
    class Handler(_Handler):
        pass

    class Server(_Server):
        address_family = family

    Handler.pages = pages
    return Server(address[:2], Handler)


class _Server(ThreadingMixIn, HTTPServer):
    """Answers each request in a thread, up to so many."""

    daemon_threads = True
    block_on_close = False
    # two that listen on one port would share its requests
    allow_reuse_port = False

    def __init__(self, *args: Any) -> None:
        self._places = threading.BoundedSemaphore(_MOST_REQUESTS)
        super().__init__(*args)

    def server_bind(self) -> None:
        """Bind, without asking DNS for this host's name as ``HTTPServer`` does."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "", self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a new thread, if there is a place for one."""
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread can be started
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer in this thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no event."""
        logger.debug("A request from %s was not answered.", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    pages: Mapping[str, MakePage] = {}
    timeout = _CLIENT_SECONDS

    def do_GET(self) -> None:
        """Answer with the page of the path."""
        self._answer(self._page())

    do_HEAD = do_GET  # noqa: N815 - the standard library's name

    def _page(self) -> Page:
        path = self.path.partition("?")[0]
        make = self.pages.get(path)
        if make is None:
            text = f"There is no such page. There are: {', '.join(self.pages)}"
            return Page(lines([text]), HTTPStatus.NOT_FOUND)
        try:
            return make(self.headers.get("Accept", ""))
        except Exception:
            logger.exception("%s cannot be answered.", path)
            text = "This page cannot be made: the log of its process says why."
            return Page(lines([text]), HTTPStatus.INTERNAL_SERVER_ERROR)

    def _answer(self, page: Page) -> None:
        self.send_response(page.status)
        self.send_header("Content-Type", page.content_type)
        self.send_header("Content-Length", str(len(page.body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page.body)

    def version_string(self) -> str:
        """For the header ``Server``."""
        return f"dagster-taskiq/{__version__}"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """A request is no event."""
