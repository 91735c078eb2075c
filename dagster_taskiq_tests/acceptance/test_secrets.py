"""Passwords and keys: servers, files, logs and listings are searched for them after real runs.

And for anything that is not JSON or plain text: nothing that is read there may run code.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import stat
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import aio_pika
import psutil
import psycopg2  # type: ignore[import-untyped]
import pytest
import redis
import yaml
from dagster import DagsterInstance, DagsterRunStatus

from dagster_taskiq.defaults import (
    BACKEND_URL_VARIABLE,
    BROKER_URL_VARIABLE,
    SIGNING_KEY_VARIABLE,
)
from dagster_taskiq.messages.envelope import QueueKind, physical_queue
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq.servers.urls import normalize_amqp
from dagster_taskiq_tests.acceptance.harness import (
    BrokerKind,
    Run,
    Stack,
    marked,
    open_stack,
    until,
)
from dagster_taskiq_tests.acceptance.test_launcher import LaunchedRun, launch
from dagster_taskiq_tests.server_sources import rabbitmqctl
from dagster_taskiq_tests.servers import amqp_options, postgres_database, private_redis
from dagster_taskiq_tests.tls_servers import certificates, tls_options

#: In every password and key; nothing else has it in it.
CANARY = "canary7f3a"
WRONG = f"wrong-{CANARY}"
KEY = f"key-{CANARY}-" + "k" * 32

UNSERVED = {"dagster-taskiq/queue": "unserved"}


class SecretStack(Stack):
    """A stack that says its URLs by environment variables only, as people should."""

    @property
    def config(self) -> dict[str, Any]:
        """Of executor, launcher and workers."""
        return {
            "broker": {"env": BROKER_URL_VARIABLE},
            "backend": {"env": BACKEND_URL_VARIABLE},
            "signing_key": {"env": SIGNING_KEY_VARIABLE},
            "config_source": {"key_prefix": self.prefix},
        }

    @property
    def secrets(self) -> dict[str, str]:
        """The variables."""
        assert self.broker is not None
        assert self.backend is not None
        return {
            BROKER_URL_VARIABLE: self.broker.url,
            BACKEND_URL_VARIABLE: self.backend.url,
            SIGNING_KEY_VARIABLE: KEY,
        }

    @property
    def environment(self) -> dict[str, str]:
        """Of the commands."""
        return {**super().environment, **self.secrets}


@pytest.fixture
def secret_stack(tmp_path: Path) -> Iterator[SecretStack]:
    """RabbitMQ, a Redis of its own and PostgreSQL, each with a password; and the launcher."""
    with ExitStack() as servers:
        backend = servers.enter_context(private_redis("redis", password=f"redis-{CANARY}")).options
        amqp = servers.enter_context(amqp_options())
        broker = ServerOptions(_amqp_user(amqp.url, servers), amqp.key_prefix)
        backend = ServerOptions(backend.url, amqp.key_prefix)
        database = urlsplit(servers.enter_context(postgres_database()))
        netloc = f"{database.username}:postgres-{CANARY}@{database.hostname}:{database.port}"
        home = tmp_path / "home"
        home.mkdir()
        stack = SecretStack(home, broker, backend, tmp_path)
        settings = {
            "telemetry": {"enabled": False},
            "storage": {"postgres": {"postgres_url": database._replace(netloc=netloc).geturl()}},
            "run_launcher": {
                "module": "dagster_taskiq.launcher",
                "class": "TaskiqRunLauncher",
                "config": stack.config,
            },
        }
        (home / "dagster.yaml").write_text(yaml.safe_dump(settings))
        stack.instance = DagsterInstance.from_config(str(home))
        stack.exit_stack.callback(stack.instance.dispose)
        with stack.exit_stack:
            yield stack


def _amqp_user(url: str, servers: ExitStack) -> str:
    """The URL with a user of its own, who is deleted afterwards."""
    parts = urlsplit(normalize_amqp(url))
    user, password = f"user-{os.getpid()}", f"amqp-{CANARY}"
    rabbitmqctl("add_user", user, password)
    servers.callback(rabbitmqctl, "delete_user", user)
    rabbitmqctl("set_permissions", "-p", parts.path[1:] or "/", user, ".*", ".*", ".*")
    netloc = f"{user}:{password}@{parts.hostname}:{parts.port or 5672}"
    return parts._replace(netloc=netloc).geturl()


@pytest.mark.timeout(400)  # it starts some twenty processes
def test_no_password_or_key_gets_anywhere(secret_stack: SecretStack) -> None:
    """Not into a log at its most talkative, an error, an event, a listing, a file, a message or a
    command line, also where a connection fails; and what we make is for its owner only.
    """
    stack = secret_stack
    file = stack.directory / "settings.yaml"
    file.write_text(yaml.safe_dump({"execution": {"config": stack.config}}))
    worker = stack.worker("-l", "DEBUG", settings=file, is_fresh=True)
    said = stack.cli(
        "worker", "start", "-d", "-n", "background", "-c", "1", "-q", "background", "-l", "DEBUG",
        "-y", str(file),
        is_fresh=True,
    )  # fmt: skip
    background = int(re.findall(r"pid (\d+)", said)[0])
    try:
        worker.await_ready()
        said += "".join(_failures(stack))
        run = stack.run("diamond", environment=stack.secrets)
        assert run.is_success
        # as the daemon has it: another instance than DAGSTER_HOME's goes by value
        with mock.patch.dict(os.environ, {**stack.secrets, "DAGSTER_HOME": str(stack.home)}):
            launched = launch(stack, "single").wait()
            assert launched.is_success
            waiting = launch(stack, "single", tags=UNSERVED)
        held = stack.start("one_gated", environment=stack.secrets)
        held.await_notes("started")
        lost = stack.start("one_gated", environment=stack.secrets, tags=UNSERVED)
        said += stack.cli("worker", "list", "-y", str(file), is_fresh=True)
        lost.await_message("No worker listens")
        assert "background@" in said
        _search_processes(stack)
        _search_messages(stack)
        _end(held, lost, waiting)
    finally:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(background)
            process.terminate()
            process.wait(60)
    worker.terminate()
    assert worker.wait() == 0
    assert CANARY not in said
    _search_files(stack)
    _search_database(stack)


def _end(held: Run, lost: Run, waiting: LaunchedRun) -> None:
    held.open_gate()
    assert held.wait().is_success
    lost.signal()
    lost.wait()
    waiting.terminate()


def _failures(stack: SecretStack) -> Iterator[str]:
    """What is said when a server refuses the password, or is not there; nobody waits for it."""
    impatient = {"server_patience_seconds": 0}
    file = stack.settings_file(**impatient)
    wrong_urls = list(_wrong_urls(stack))
    workers = [stack.worker("-l", "DEBUG", settings=file, environment=it) for it in wrong_urls]
    runs = [
        stack.start("simple", environment={**stack.secrets, **it}, **impatient) for it in wrong_urls
    ]
    for worker, run in zip(workers, runs, strict=True):
        assert worker.wait() == 1
        assert "Traceback" not in worker.log
        assert run.wait().status is DagsterRunStatus.FAILURE
        yield worker.log + run.output_of_process


def _wrong_urls(stack: SecretStack) -> Iterator[dict[str, str]]:
    """The variable of each server, with a password that is wrong and with a port that is closed."""
    for name, url in list(stack.secrets.items())[:2]:
        parts = urlsplit(url)
        login = f"{parts.username or ''}:{WRONG}"
        for address in (f"{parts.hostname}:{parts.port}", f"{parts.hostname}:1"):
            yield {name: parts._replace(netloc=f"{login}@{address}").geturl()}


def _search_processes(stack: Stack) -> None:
    found = marked([stack.mark])
    assert len(found) > 10
    for process in found:
        with suppress(psutil.NoSuchProcess):
            assert CANARY not in " ".join([process.name(), *process.cmdline()])


def _search_messages(stack: Stack) -> None:
    texts = [
        *redis_texts(stack),
        *asyncio.run(amqp_texts(stack, QueueKind.STEPS, QueueKind.RUNS)),
    ]
    assert any("execute_plan" in text for text in texts)
    assert any("execute_job" in text for text in texts)
    for text in texts:
        assert CANARY not in text
        assert_is_plain(text)


def _search_files(stack: Stack) -> None:
    """All below the home and beside it, logs too; what is ours is for its owner only."""
    ours = stack.home / "dagster_taskiq"
    assert list(ours.rglob("*.log"))
    for path in stack.directory.rglob("*"):
        if path.is_file() and path != stack.home / "dagster.yaml":
            assert CANARY.encode() not in path.read_bytes(), path
    for path in (ours, *ours.rglob("*")):
        expected = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def _search_database(stack: Stack) -> None:
    """Runs, events, tags and whatever else Dagster has stored."""
    document = yaml.safe_load((stack.home / "dagster.yaml").read_text())
    connection = psycopg2.connect(document["storage"]["postgres"]["postgres_url"])
    with connection, connection.cursor() as cursor:
        cursor.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        tables = [name for (name,) in cursor.fetchall()]
        assert {"event_logs", "runs"} <= set(tables)
        for table in tables:
            query = f'SELECT count(*) FROM "{table}" t WHERE t::text LIKE %s'
            cursor.execute(query, [f"%{CANARY}%"])
            assert cursor.fetchone() == (0,), table
    connection.close()


# --- what is stored is JSON or plain text ---


def redis_texts(stack: Stack) -> list[str]:
    """Every key under the stack's prefix, with all that is in it."""
    with stack.redis() as client:
        keys = list(client.scan_iter(f"*{stack.prefix}*", count=1000))
        values = [part for key in keys for part in (key, *_values(client, key))]
    return [value.decode() for value in values]  # not UTF-8: no text


def _values(client: redis.Redis, key: bytes) -> list[bytes]:
    kind = client.type(key)
    if kind == b"none":
        return []  # it has expired meanwhile
    read: dict[bytes, Any] = {
        b"string": lambda: [client.get(key) or b""],
        b"hash": lambda: [part for pair in client.hgetall(key).items() for part in pair],
        b"list": lambda: client.lrange(key, 0, -1),
        b"zset": lambda: client.zrange(key, 0, -1),
    }
    values: list[bytes] = read[kind]()
    return values


async def amqp_texts(stack: Stack, *kinds: QueueKind) -> list[str]:
    """What waits in queue "unserved" of the stack's RabbitMQ, with all that goes with it.

    It is put back.
    """
    assert stack.broker is not None
    connection = await aio_pika.connect(normalize_amqp(stack.broker.url))
    texts: list[str] = []
    async with connection:
        channel = await connection.channel()
        for kind in kinds:
            queue = physical_queue(stack.prefix, kind, "unserved")
            found = await channel.get_queue(queue)
            message = await found.get(fail=False)
            assert message is not None, queue
            assert not message.headers
            assert message.content_type == "application/json"
            assert CANARY not in str(message.info())
            texts.append(message.body.decode())
            await message.reject(requeue=True)
    return texts


def assert_is_plain(text: str) -> None:
    """Each line is JSON, or names and numbers: nothing that a decoder could take for code."""
    for line in text.split("\n"):
        if line[:1] in ("{", "["):
            json.loads(line)
        else:
            assert re.fullmatch(r"[\w .:@*/-]*", line), line[:200]


@pytest.mark.parametrize("kind", ["redis", "rabbitmq"])
def test_what_is_stored_is_json_or_plain_text(kind: BrokerKind, tmp_path: Path) -> None:
    """Tasks that wait, claims, results, records, orders and the list of workers, while runs go on
    and after them.
    """
    with open_stack(kind, tmp_path) as stack:
        stack.worker(name="w").await_ready()
        assert stack.run("diamond").is_success
        held, lost = stack.start("one_gated"), stack.start("one_gated", tags=UNSERVED)
        held.await_notes("started")
        lost.await_message("No worker listens")
        held.signal(signal.SIGSTOP)  # so that its result stays
        held.open_gate()
        with stack.redis() as client:
            until(lambda: list(client.scan_iter(f"{stack.prefix}:result:*")), "there is a result")
        texts = redis_texts(stack)
        held.signal(signal.SIGCONT)
        if kind == "rabbitmq":
            texts += asyncio.run(amqp_texts(stack, QueueKind.STEPS))
        assert any("execute_plan" in text for text in texts)
        assert any('"outcome"' in text for text in texts)
        for text in texts:
            assert_is_plain(text)
        assert held.wait().is_success
        lost.signal()
        lost.wait()
        for text in redis_texts(stack):
            assert_is_plain(text)


# --- TLS, end to end ---


@pytest.mark.timeout(400)  # it may be the one that starts a RabbitMQ
def test_a_job_over_tls(tmp_path: Path) -> None:
    """With RabbitMQ as broker and Redis as backend, both of which demand a client certificate."""
    files = certificates()
    ssl_options = {
        "ca_certs": files.ca,
        "certfile": files.client,
        "keyfile": files.client_key,
        "cert_reqs": "CERT_REQUIRED",
    }
    with open_stack("redis", tmp_path) as stack:
        broker, backend = tls_options("rabbitmq"), tls_options("redis")
        source = {
            "key_prefix": broker.key_prefix,
            "broker_use_ssl": ssl_options,
            "redis_backend_use_ssl": ssl_options,
        }
        config = {"broker": broker.url, "backend": backend.url, "config_source": source}
        unknown = {**source, "broker_use_ssl": {**ssl_options, "ca_certs": files.other_ca}}
        denied = stack.worker(settings=stack.settings_file(**{**config, "config_source": unknown}))
        file = stack.settings_file(**config)
        stack.worker(settings=file).await_ready()
        assert stack.run("diamond", **config).is_success
        assert "amqps://" not in stack.cli("worker", "list", "-y", str(file))
        assert denied.wait() == 1
        assert "its certificate cannot be trusted" in denied.log
        assert "Traceback" not in denied.log
