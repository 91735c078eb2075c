"""How brokers reach a server: what its URL, its password and its certificate mean."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import time
from dataclasses import replace
from urllib.parse import urlsplit

import pytest

from dagster_taskiq.brokers import open_broker
from dagster_taskiq.errors import ConfigError, RefusedByServerError, UnreachableServerError
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq.servers.tls import Tls
from dagster_taskiq_tests.contract.broker_bench import (
    AT_ONCE_SECONDS,
    SECRET,
    consuming,
    harness_of,
    proxied,
    run,
    task,
)
from dagster_taskiq_tests.server_sources import missing


def test_a_server_that_does_not_answer_is_unreachable(broker_options: ServerOptions) -> None:
    async def test() -> None:
        with proxied(broker_options) as network:
            network.freeze()
            broker = network.broker()
            start = time.monotonic()
            with pytest.raises(UnreachableServerError, match="within 1 s"):
                await broker.startup()
            assert time.monotonic() - start < 1 + AT_ONCE_SECONDS
            await broker.shutdown()

    run(test())


def test_wrong_credentials_are_refused(broker_options: ServerOptions) -> None:
    async def test() -> None:
        parts = urlsplit(broker_options.url)
        host = parts.netloc.rpartition("@")[2]
        url = parts._replace(netloc=f"nobody:{SECRET}@{host}").geturl()
        broker = open_broker(replace(broker_options, url=url))
        start = time.monotonic()
        with pytest.raises(RefusedByServerError, match="nobody") as caught:
            await broker.startup()
        assert time.monotonic() - start < broker_options.connect_timeout_seconds
        assert SECRET not in str(caught.value)
        await broker.shutdown()

    run(test())


@pytest.mark.parametrize("url", ["redis://127.0.0.1:port/0", "amqp://127.0.0.1:port/"])
def test_a_url_that_cannot_be_read_is_a_config_error(url: str) -> None:
    with pytest.raises(ConfigError, match="port"):
        open_broker(ServerOptions(url=url))


# --- TLS ---


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """PEM files of a certificate for 127.0.0.1, and of its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        missing("No openssl on PATH to make a certificate with.")
    directory = tmp_path_factory.mktemp("tls")
    files = (str(directory / "cert.pem"), str(directory / "key.pem"))
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    command += ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, "-out", files[0], "-keyout", files[1]], check=True, timeout=60)
    return files


@pytest.mark.parametrize("broker_options", ["redis", "valkey", "rabbitmq"], indirect=True)
def test_tls_servers_are_verified(
    broker_options: ServerOptions, certificate: tuple[str, str]
) -> None:
    """By the given authority; not at all where that is asked for; otherwise refused.

    PostgreSQL's TLS begins with words of its own, and is libpq's; see ``test_postgresql_broker``.
    """

    async def test() -> None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*certificate)
        with proxied(broker_options, context) as network:
            for tls in (Tls(ca_file=certificate[0]), Tls(verify=False)):
                there = harness_of(replace(network.options, tls=tls))
                queue = there.queue()
                async with consuming(there, queue) as consumer:
                    await consumer.broker.kick(task(queue, "secret"))
                    assert await consumer.finish() == "secret"
            unverified = network.broker()
            with pytest.raises(RefusedByServerError, match="certificate cannot be trusted"):
                await unverified.startup()
            await unverified.shutdown()
            with pytest.raises(ConfigError, match="/no/such/file"):
                await open_broker(
                    replace(network.options, tls=Tls(ca_file="/no/such/file"))
                ).startup()

    run(test())
