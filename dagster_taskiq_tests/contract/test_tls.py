"""TLS: servers are verified by default, and each way to fail says in a line what to do."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import pytest
from taskiq import BrokerMessage

from dagster_taskiq.backend import Backend, open_backend
from dagster_taskiq.brokers import Delivery, TaskBroker, open_broker
from dagster_taskiq.config.settings import Settings
from dagster_taskiq.errors import RefusedByServerError, ServerError
from dagster_taskiq.messages.envelope import QueueKind, physical_queue
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq.servers.tls import Tls
from dagster_taskiq_tests.tls_servers import TlsKind, certificates, tls_options


@pytest.fixture(params=["redis", "rabbitmq"])
def options(request: pytest.FixtureRequest) -> ServerOptions:
    """A server that demands a client certificate, and how it is reached."""
    kind: TlsKind = request.param
    return tls_options(kind)


async def use(options: ServerOptions) -> None:
    """Send a task, take it and ack it; and look at the list of workers, where Redis is."""
    queue = physical_queue(options.key_prefix, QueueKind.STEPS, "q")
    broker = open_broker(options, [queue])
    try:
        await broker.startup()
        labels = {"queue_name": queue, "priority": 5}
        await broker.kick(
            BrokerMessage(task_id="t", task_name="x", message=b"secret", labels=labels)
        )
        async with aclosing(broker.listen()) as deliveries:
            delivery: Any = await anext(deliveries)
            assert isinstance(delivery, Delivery)
            assert delivery.data == b"secret"
            await delivery.ack()
        assert await broker.absent(queue, ["t"]) == {"t"}
    finally:
        await broker.shutdown()
    if options.url.startswith("rediss"):
        backend = open_backend(options, Signer())
        try:
            await backend.startup()
            assert await backend.workers() == []
        finally:
            await backend.shutdown()


async def failure(options: ServerOptions) -> str:
    """The error of whoever connects, which is one line with the address; broker and backend."""
    texts = []
    servers: list[TaskBroker | Backend] = [open_broker(options)]
    if options.url.startswith("rediss"):
        servers.append(open_backend(options, Signer()))
    for server in servers:
        with pytest.raises(ServerError) as caught:
            await server.startup()
        await server.shutdown()
        assert options.address in str(caught.value)
        assert "\n" not in str(caught.value)
        assert "guest:guest" not in str(caught.value)
        texts.append(str(caught.value))
        if "client certificate" not in texts[-1]:  # the server may have closed before it said so
            assert isinstance(caught.value, RefusedByServerError)
    return " ".join(texts)


def test_a_verified_server_works(options: ServerOptions) -> None:
    """By the CA that was given, for its own host name, with a client certificate."""
    asyncio.run(use(options))


def test_an_unknown_ca_is_refused(options: ServerOptions) -> None:
    """By default, and where another one was given: the given one is trusted alone."""
    files = certificates()
    for ca_file in (None, files.other_ca):
        text = asyncio.run(failure(replace(options, tls=replace(options.tls, ca_file=ca_file))))
        assert "its certificate cannot be trusted" in text
        assert "Set ca_certs in config_source.broker_use_ssl" in text


def test_a_wrong_host_name_is_refused(options: ServerOptions) -> None:
    """A certificate for another host of the same authority is none for this one."""
    other = replace(options, url=options.url.replace("localhost", "127.0.0.1"))
    text = asyncio.run(failure(other))
    assert "Use a host name that is in it" in text


def test_a_missing_client_certificate_is_named(options: ServerOptions) -> None:
    """The server wants one: the error says what to set."""
    text = asyncio.run(failure(replace(options, tls=Tls(ca_file=certificates().ca))))
    assert "set certfile and keyfile in config_source.broker_use_ssl" in text.replace("Set", "set")


def test_verification_can_be_turned_off(options: ServerOptions) -> None:
    """With ``cert_reqs``, whoever the server is; it still gets our certificate."""
    asyncio.run(use(replace(options, tls=replace(options.tls, ca_file=None, verify=False))))


def test_celerys_ways_to_write_it(options: ServerOptions) -> None:
    """Beside a URL without TLS in any kombu spelling, and in the URL for Redis."""
    files = certificates()
    ssl_options = {"ca_certs": files.ca, "certfile": files.client, "keyfile": files.client_key}
    plain = options.url.replace("rediss://", "redis://").replace("amqps://", "pyamqp://")
    spellings: list[tuple[str, Any]] = [
        (plain, {**ssl_options, "cert_reqs": "CERT_REQUIRED"}),
        (plain, {**{f"ssl_{key}": value for key, value in ssl_options.items()}}),
        (plain, {**ssl_options, "ca_certs": files.other_ca, "cert_reqs": 0}),
    ]
    if options.url.startswith("rediss"):
        query = "&".join(f"ssl_{key}={quote(value)}" for key, value in ssl_options.items())
        unknown = query.replace("ca.pem", "other-ca.pem")
        spellings += [
            (f"{options.url}?{query}&ssl_cert_reqs=required", None),
            (f"{options.url}?{unknown}&ssl_cert_reqs=CERT_NONE", None),
        ]
    for url, broker_use_ssl in spellings:
        config = {"broker_use_ssl": broker_use_ssl, "key_prefix": options.key_prefix}
        settings = Settings.from_config(
            {"broker": url, "backend": "redis://unused", "config_source": config}
        )
        found = settings.server_options(url, settings.source.broker_use_ssl)
        assert found.address.startswith(("rediss://", "amqps://"))
        asyncio.run(use(found))
