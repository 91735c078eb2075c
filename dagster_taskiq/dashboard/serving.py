"""The process of the page: from its options to a server that listens."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import uvicorn

from dagster_taskiq.config.settings import Settings
from dagster_taskiq.connections import Servers, find_running_servers
from dagster_taskiq.dashboard.access import Access
from dagster_taskiq.dashboard.face import Address, Face
from dagster_taskiq.dashboard.looks import Watch
from dagster_taskiq.dashboard.orders import Orders
from dagster_taskiq.dashboard.web import make_app
from dagster_taskiq.errors import ConfigError, DagsterTaskiqError

#: How long answers under way may take when the process is told to end.
_END_SECONDS = 2


def serve(
    settings: Settings,
    queues: Iterable[str],
    address: Address,
    face: Face,
    access: Access,
    say: Callable[[str], None],
) -> None:
    """Show the page until a signal ends the process.

    Args:
        queues: that are shown though nobody may know of them.
        say: tells the user where the page is.

    Raises:
        ConfigError: of the settings.
        DagsterTaskiqError: the page cannot listen at the address.
    """

    def find() -> Servers | None:
        return find_running_servers(settings)

    _quieten_logs()
    find()  # a mistake in the settings is said now, and in the terminal
    with _listening(address) as listener:
        port = listener.getsockname()[1]
        own_names = {*access.hosts, address.host, socket.gethostname()}
        access = replace(access, hosts=own_names)
        watch = Watch(find, [settings.default_queue, *queues])
        app = make_app(watch, Orders(find), face, access, f"_{port}")
        host = f"[{address.host}]" if ":" in address.host else address.host
        say(f"http://{host}:{port}{face.path()}")
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            loop="asyncio",
            ws="none",
            timeout_graceful_shutdown=_END_SECONDS,
        )
        asyncio.run(_Server(config, watch).serve(sockets=[listener]))


@contextmanager
def _listening(address: Address) -> Iterator[socket.socket]:
    try:
        family, kind, _, _, place = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
    except OSError as error:
        raise ConfigError(f"--host {address.host} is no address: {error.strerror}.") from error
    with listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
            listener.listen()
        except OSError as error:
            raise DagsterTaskiqError(
                f"The page cannot listen at {address.host}, port {address.port}: "
                f"{error.strerror}. Choose another one with --port."
            ) from error
        yield listener


class _Server(uvicorn.Server):
    """Ends its streams first: uvicorn waits for answers under way, and those never end."""

    def __init__(self, config: uvicorn.Config, watch: Watch) -> None:
        super().__init__(config)
        self._watch = watch

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Without raising them again at the end: to be told to end is no error."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._end, number)
        yield

    def _end(self, number: int) -> None:
        self._watch.stop()
        self.handle_exit(number, None)


def _quieten_logs() -> None:
    """Have this package's own lines written, and of libraries only what is wrong."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("dagster_taskiq.dashboard").setLevel(logging.INFO)
