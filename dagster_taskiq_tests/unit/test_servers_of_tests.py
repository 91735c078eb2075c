"""The servers that tests get are isolated, and survive what the tests do to their own."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import redis

from dagster_taskiq_tests.servers import (
    PrivateRedis,
    private_redis,
    redis_options,
)


@pytest.fixture(params=[False, True], ids=["tcp", "unix"])
def server(request: pytest.FixtureRequest) -> Iterator[PrivateRedis]:
    with private_redis(unix_socket=request.param, password="p@ss:w/ord") as server:
        yield server


def test_killed_server_comes_back_at_its_url_with_its_data(server: PrivateRedis) -> None:
    with server.client() as client:
        client.set("key", "value")
    server.kill()
    with server.client() as client, pytest.raises(redis.ConnectionError):
        client.ping()
    server.restart()
    with server.client() as client:
        assert client.get("key") == b"value"


def test_paused_server_does_not_answer_until_resumed(server: PrivateRedis) -> None:
    with redis.Redis.from_url(server.url, socket_timeout=0.2) as client:
        server.pause()
        with pytest.raises(redis.TimeoutError):
            client.ping()
    server.resume()
    with server.client() as client:
        assert client.ping()


def test_paused_server_can_be_stopped(server: PrivateRedis) -> None:
    server.pause()
    began = time.monotonic()
    server.stop()
    assert time.monotonic() - began < 10


def test_namespaces_do_not_see_each_other_and_leave_nothing() -> None:
    with redis_options() as mine, redis_options() as other:
        assert mine.key_prefix != other.key_prefix
        with redis.Redis.from_url(mine.url) as client:
            client.set(f"{mine.key_prefix}:a", 1)
            client.set(f"{other.key_prefix}:a", 2)
    with redis.Redis.from_url(mine.url) as client:
        assert not list(client.scan_iter(f"*{mine.key_prefix}*"))
        assert not list(client.scan_iter(f"*{other.key_prefix}*"))
