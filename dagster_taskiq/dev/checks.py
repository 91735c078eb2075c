"""What ``dev`` looks at before it starts anything, so that a mistake is one sentence."""

from __future__ import annotations

import importlib.util
import socket

from dagster_taskiq.errors import ConfigError


def check_webserver() -> None:
    """Raise ConfigError where Dagster's web server is not installed."""
    if importlib.util.find_spec("dagster_webserver") is None:
        raise ConfigError("Dagster's UI is not installed: pip install dagster-webserver.")


def check_port(host: str, port: int) -> None:
    """Raise ConfigError where nobody can listen at a port."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            # as the web server does: an earlier one's closed connections do not matter
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"Port {port} of {host} cannot be used ({error.strerror}): give another one (--port)."
        ) from None
