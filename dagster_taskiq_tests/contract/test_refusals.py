"""What real servers say when they refuse, and that it is told apart from what is final."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Literal
from urllib.parse import urlsplit

import pytest
from taskiq import BrokerMessage

from dagster_taskiq.backend import open_backend
from dagster_taskiq.brokers import TaskBroker, open_broker
from dagster_taskiq.errors import RefusedByServerError, UnreachableServerError
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq_tests.server_processes import UnavailableError
from dagster_taskiq_tests.server_sources import missing, rabbitmqctl, server_url
from dagster_taskiq_tests.servers import PrivateRedis, private_redis, unique_prefix


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


def task(queue: str) -> BrokerMessage:
    return BrokerMessage(
        task_id="task", task_name="t", message=b"{}", labels={"queue_name": queue, "priority": 5}
    )


@pytest.mark.parametrize("kind", ["redis", "valkey"])
@pytest.mark.parametrize(
    ("rights", "named"),
    [
        ("+@all -@admin -@dangerous +info", None),
        ("+@all -@admin -@dangerous", "INFO"),
        ("+@all -@admin -hset -zpopmin", "HSET"),
        ("+@all -multi", "multi"),
    ],
)
def test_a_user_without_rights_is_told_which(
    kind: Literal["redis", "valkey"], rights: str, named: str | None
) -> None:
    """When backend and broker are opened, before anybody takes a task; nothing is written."""

    async def test(server: PrivateRedis) -> None:
        with server.client() as client:
            client.execute_command(
                "ACL SETUSER", "limited", "on", ">secret", "~t*", "~t.*", *rights.split()
            )
        parts = urlsplit(server.url)
        address = parts.netloc.rpartition("@")[2]
        url = parts._replace(netloc=f"limited:secret@{address}").geturl()
        backend = open_backend(replace(server.options, url=url, key_prefix="t"), Signer())
        broker = open_broker(replace(server.options, url=url, key_prefix="t"))
        try:
            if named is None:
                await backend.startup()
                await broker.startup()
            else:
                with pytest.raises(RefusedByServerError, match=named):
                    await backend.startup()
            if named == "HSET":
                with pytest.raises(RefusedByServerError, match="ZPOPMIN"):
                    await broker.startup()
        finally:
            await broker.shutdown()
            await backend.shutdown()
        with server.client() as client:
            assert client.keys("t*rights") == []

    with private_redis(kind) as server:
        run(test(server))


def test_too_many_clients_of_redis_pass() -> None:
    """A limit that others use up."""

    async def test(server: PrivateRedis) -> None:
        backend = open_backend(server.options, Signer())
        with server.client() as client:
            client.ping()
            client.config_set("maxclients", 1)
            with pytest.raises(UnreachableServerError):
                await backend.startup()
            client.config_set("maxclients", 100)
        await backend.startup()
        await backend.shutdown()

    with private_redis() as server:
        run(test(server))


@contextmanager
def virtual_host() -> Iterator[ServerOptions]:
    """One of RabbitMQ that a test may limit."""
    url, name = server_url("rabbitmq"), unique_prefix()
    try:
        rabbitmqctl("add_vhost", name)
        rabbitmqctl("set_permissions", "-p", name, "guest", ".*", ".*", ".*")
    except (OSError, UnavailableError) as error:
        missing(f"no virtual host of RabbitMQ: {error}")
    try:
        yield ServerOptions(url=urlsplit(url)._replace(path=f"/{name}").geturl(), key_prefix="t")
    finally:
        with suppress(UnavailableError):
            rabbitmqctl("delete_vhost", name)


async def fill(broker: TaskBroker) -> None:
    """Send until it is refused: a policy takes a while to reach its queue."""
    for _ in range(100):
        await broker.kick(task("q"))
        await asyncio.sleep(0.1)


def test_limits_of_rabbitmq_pass() -> None:
    """Connections of a virtual host; and a queue that rejects what is sent to it."""

    async def test(options: ServerOptions) -> None:
        name = urlsplit(options.url).path[1:]
        broker = open_broker(options)
        rabbitmqctl("set_vhost_limits", "-p", name, '{"max-connections": 0}')
        with pytest.raises(UnreachableServerError, match="limit"):
            await broker.startup()
        rabbitmqctl("clear_vhost_limits", "-p", name)
        await broker.startup()
        await broker.kick(task("q"))
        full = '{"max-length": 1, "overflow": "reject-publish"}'
        rabbitmqctl("set_policy", "-p", name, "full", "q", full)
        with pytest.raises(UnreachableServerError, match="rejects messages"):
            await fill(broker)
        rabbitmqctl("clear_permissions", "-p", name, "guest")
        await broker.shutdown()
        broker = open_broker(options)
        with pytest.raises(RefusedByServerError) as caught:
            await broker.startup()
        assert not caught.value.is_final
        await broker.shutdown()

    with virtual_host() as options:
        run(test(options))
