"""Backends for the tests of their contract: each kind of server, and what may happen to it.

A harness is a server with its accidents: leases end, data is lost or goes back in time, it restarts
or does not answer. The tests of the contract know only this, never how a server keeps its data.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from typing import Any, Literal, TypeVar

import psycopg2
import redis

from dagster_taskiq.backend import (
    Backend,
    Claim,
    ClaimAnswer,
    Renewal,
    TaskReport,
    TaskState,
    open_backend,
)
from dagster_taskiq.backend.memory import MemoryBackend, MemoryServer, MemorySnapshot
from dagster_taskiq.backend.postgresql_schema import PART
from dagster_taskiq.messages.attempt_ends import AttemptEnd, EndOutcome
from dagster_taskiq.messages.results import Place
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.messages.worker_records import WorkerRecord
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq.servers.postgresql_schema import Schema
from dagster_taskiq_tests.servers import (
    PostgresNode,
    PrivateRedis,
    crashable_postgres,
    postgres_options,
    private_redis,
    redis_options,
    valkey_options,
)

T = TypeVar("T")
Kind = Literal["memory", "redis", "valkey", "postgres"]

#: Of every kind of server, the quickest first.
KINDS: tuple[Kind, ...] = ("memory", "redis", "valkey", "postgres")

#: For what must happen, on a loaded machine.
PATIENCE_SECONDS = 20.0

#: A lease that does not end while a test runs, and one that a test waits for the end of.
LONG_LEASE = 600.0
SHORT_LEASE = 0.05


class Harness(ABC):
    """A server, or a part of one that is nobody else's."""

    @abstractmethod
    def backend(self, signer: Signer, timeout_seconds: float = 5.0) -> Backend:
        """Another process' view of it, not yet connected."""

    @abstractmethod
    def expire(self, claim: Claim) -> None:
        """End the lease of the claim on a task, as time would."""

    @abstractmethod
    def expire_loop(self, run_id: str) -> None:
        """End the lease of a run's loop, as time would."""

    @abstractmethod
    def sleep(self, seconds: float) -> None:
        """Let time pass by the server's clock."""

    @abstractmethod
    def restart(self) -> None:
        """A new life with all data."""

    @abstractmethod
    def forget(self) -> None:
        """A new life without any data."""

    @abstractmethod
    def snapshot(self) -> Any:
        """What it keeps now, for ``restore``."""

    @abstractmethod
    def restore(self, snapshot: Any) -> None:
        """A new life with older data."""


class PrivateHarness(Harness):
    """A server that is a test's own, so that it can be away."""

    @abstractmethod
    def freeze(self) -> None:
        """Answer nothing until ``thaw``."""

    @abstractmethod
    def thaw(self) -> None: ...

    @abstractmethod
    def kill(self) -> None:
        """Be gone until ``restart``."""


class MemoryHarness(PrivateHarness):
    """In this process; its time can be made to pass."""

    def __init__(self) -> None:
        self._passed_seconds = 0.0
        self.server = MemoryServer(lambda: time.monotonic() + self._passed_seconds)

    def backend(self, signer: Signer, timeout_seconds: float = 5.0) -> Backend:
        return MemoryBackend(self.server, signer)

    def expire(self, claim: Claim) -> None:
        self.server.expire_claim(claim.run_id, claim.task_id)

    def expire_loop(self, run_id: str) -> None:
        self.server.expire_loop(run_id)

    def sleep(self, seconds: float) -> None:
        self._passed_seconds += seconds

    def restart(self) -> None:
        self.server.thaw()
        self.server.restart()

    def forget(self) -> None:
        self.server.forget()

    def snapshot(self) -> MemorySnapshot:
        return self.server.snapshot()

    def restore(self, snapshot: MemorySnapshot) -> None:
        self.server.restore(snapshot)

    def freeze(self) -> None:
        self.server.freeze()

    def thaw(self) -> None:
        self.server.thaw()

    def kill(self) -> None:
        self.server.freeze()


class RedisHarness(Harness):
    """A prefix of keys on a Redis or Valkey; a new life of the server is one of the prefix."""

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self.client = redis.Redis.from_url(options.url)

    def key(self, name: str) -> str:
        return f"{self.options.key_prefix}:{name}"

    def keys(self) -> list[str]:
        """All that it keeps."""
        found = self.client.scan_iter(f"{self.options.key_prefix}:*", count=5000)
        return [key.decode() for key in found]

    def ttls(self) -> dict[str, int]:
        """Every key with its seconds to live; -1 is for ever."""
        return {key: self.client.ttl(key) for key in self.keys()}

    def backend(self, signer: Signer, timeout_seconds: float = 5.0) -> Backend:
        return open_backend(replace(self.options, connect_timeout_seconds=timeout_seconds), signer)

    def _delete(self, *keys: str) -> None:
        if keys:
            self.client.delete(*keys)

    def expire(self, claim: Claim) -> None:
        self._delete(self.key(f"claim:{claim.task_id}"))

    def expire_loop(self, run_id: str) -> None:
        self._delete(self.key(f"run:{run_id}:loop"))

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def restart(self) -> None:
        if self.client.exists(self.key("epoch")):
            self.client.hset(self.key("epoch"), "server", uuid.uuid4().hex)

    def forget(self) -> None:
        self._delete(*self.keys())

    def snapshot(self) -> Mapping[str, bytes]:
        keys = self.keys()
        with self.client.pipeline() as pipeline:
            for key in keys:
                pipeline.dump(key)
            dumps = pipeline.execute()
        return {key: dump for key, dump in zip(keys, dumps, strict=True) if dump}

    def restore(self, snapshot: Mapping[str, bytes]) -> None:
        RedisHarness.forget(self)
        with self.client.pipeline() as pipeline:
            for key, dump in snapshot.items():
                pipeline.restore(key, int(LONG_LEASE * 1000), dump)
            pipeline.execute()
        RedisHarness.restart(self)


class PostgresHarness(Harness):
    """A schema on a PostgreSQL server; a new life of the server is one of the schema."""

    #: What a snapshot has: orders and workers are not asked for across lives.
    TABLES = ("runs", "tasks", "results", "withheld", "history", "counts", "batches")

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        schema = Schema(options.key_prefix, PART)
        self.name = schema.name
        self.connection = psycopg2.connect(options.url)
        self.connection.autocommit = True
        self.execute(schema.setup())
        self.execute("SET synchronous_commit TO off")

    def execute(self, statement: str, values: Sequence[Any] | None = None) -> list[Any]:
        """The rows of a statement, in which ``{s}`` stands for the schema."""
        with self.connection.cursor() as cursor:
            cursor.execute(statement.replace("{s}", f'"{self.name}"'), values)
            return cursor.fetchall() if cursor.description else []

    def close(self) -> None:
        self.connection.close()

    def backend(self, signer: Signer, timeout_seconds: float = 5.0) -> Backend:
        return open_backend(replace(self.options, connect_timeout_seconds=timeout_seconds), signer)

    def expire(self, claim: Claim) -> None:
        self.execute(
            "UPDATE {s}.tasks SET lease_until = 'epoch' WHERE task_id = %s", [claim.task_id]
        )

    def expire_loop(self, run_id: str) -> None:
        self.execute("UPDATE {s}.runs SET lease_until = 'epoch' WHERE run_id = %s", [run_id])

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def restart(self) -> None:
        self.execute("DELETE FROM {s}.life")

    def forget(self) -> None:
        tables = [f"{{s}}.{table}" for table in (*self.TABLES, "orders", "workers")]
        self.execute(f"TRUNCATE {', '.join(tables)}")

    def snapshot(self) -> Mapping[str, list[Any]]:
        return {table: self.execute(f"SELECT * FROM {{s}}.{table}") for table in self.TABLES}

    def restore(self, snapshot: Mapping[str, list[Any]]) -> None:
        PostgresHarness.forget(self)
        for table, rows in snapshot.items():
            for row in rows:
                places = ", ".join(["%s"] * len(row))
                into = f"{{s}}.{table} OVERRIDING SYSTEM VALUE"
                self.execute(f"INSERT INTO {into} VALUES ({places})", row)


class PrivatePostgresHarness(PostgresHarness, PrivateHarness):
    """On a cluster whose new lives are real."""

    def __init__(self, node: PostgresNode, options: ServerOptions) -> None:
        super().__init__(options)
        self.node = node

    def execute(self, statement: str, values: Sequence[Any] | None = None) -> list[Any]:
        if self.connection.closed:
            self.connection = psycopg2.connect(self.options.url)
            self.connection.autocommit = True
        return super().execute(statement, values)

    def restart(self) -> None:
        if self.node.process.poll() is None:
            self.node.kill()
        self.node.restart()
        self.connection.close()

    def freeze(self) -> None:
        self.node.pause()

    def thaw(self) -> None:
        self.node.resume()

    def kill(self) -> None:
        self.node.kill()


class PrivateRedisHarness(RedisHarness, PrivateHarness):
    """A Redis or Valkey process; its new lives are real."""

    def __init__(self, server: PrivateRedis) -> None:
        super().__init__(server.options)
        self.server = server

    def restart(self) -> None:
        if self.server.process.poll() is None:
            self.server.kill()
        self.server.restart()

    def forget(self) -> None:
        self.client.flushall()

    def freeze(self) -> None:
        self.server.pause()

    def thaw(self) -> None:
        self.server.resume()

    def kill(self) -> None:
        self.server.kill()


@contextmanager
def shared_harness(kind: Kind) -> Iterator[Harness]:
    """Of the session's server of that kind, a part that is the test's own."""
    if kind == "memory":
        yield MemoryHarness()
        return
    if kind == "postgres":
        with postgres_options() as options, closing(PostgresHarness(options)) as postgres:
            yield postgres
        return
    options_of: AbstractContextManager[ServerOptions] = (
        redis_options() if kind == "redis" else valkey_options()
    )
    with options_of as options:
        harness = RedisHarness(options)
        with harness.client:
            yield harness


@contextmanager
def private_harness(kind: Kind, password: str | None = None) -> Iterator[PrivateHarness]:
    """A server of the test's own, perhaps one that asks for a password."""
    if kind == "memory":
        yield MemoryHarness()
        return
    if kind == "postgres":
        with crashable_postgres() as (node, options):
            login = f"postgres:{password}@" if password else "postgres@"
            named = replace(options, url=options.url.replace("postgres@", login))
            with closing(PrivatePostgresHarness(node, named)) as private:
                yield private
        return
    with private_redis(kind, password=password) as server:
        harness = PrivateRedisHarness(server)
        with harness.client:
            yield harness


class Bench:
    """A backend, called synchronously, with a run and its tasks."""

    def __init__(self, harness: Harness, timeout_seconds: float = 5.0) -> None:
        self.harness = harness
        self.timeout_seconds = timeout_seconds
        # not in a thread of its own: that would cost each call more than a server does
        self.loop = asyncio.new_event_loop()
        self.opened: list[Backend] = []
        try:
            self.backend = self.open()
        except BaseException:
            self.close()
            raise
        self.run_id = uuid.uuid4().hex
        self.epoch = ""
        #: What the loops of each token said when they opened the run.
        self.loops: dict[str, dict[str, Any]] = {}

    def open(self, signer: Signer | None = None) -> Backend:
        """Another process' view of the same server."""
        backend = self.harness.backend(signer or Signer(), self.timeout_seconds)
        self.opened.append(backend)
        self.call(backend.startup())
        return backend

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, 60))

    def close(self) -> None:
        try:
            for backend in self.opened:
                self.call(backend.shutdown())
        finally:
            self.loop.close()

    # --- the loop's side ---

    def open_run(
        self,
        *,
        generation: int = 0,
        token: str = "loop",
        is_resumable: bool = False,
        lease_seconds: float = LONG_LEASE,
    ) -> str:
        loop = {"generation": generation, "token": token, "is_resumable": is_resumable}
        self.loops[token] = loop
        opening = self.backend.open_run(self.run_id, **loop, lease_seconds=lease_seconds)
        self.epoch = self.call(opening)
        return self.epoch

    def renew_run(self, token: str = "loop", lease_seconds: float = LONG_LEASE) -> str | None:
        loop = self.loops[token]
        return self.call(self.backend.renew_run(self.run_id, **loop, lease_seconds=lease_seconds))

    def close_run(self, token: str = "loop") -> None:
        self.call(self.backend.close_run(self.run_id, token=token))

    def disown_run(self) -> None:
        self.call(self.backend.disown_run(self.run_id))

    def report(self, task_id: str) -> TaskReport:
        return self.call(self.backend.inspect(self.run_id, [task_id]))[1][task_id]

    def state(self, task_id: str) -> TaskState:
        return self.report(task_id).state

    def cancel(self, *task_ids: str) -> list[TaskState]:
        orders = dict.fromkeys(task_ids, "enough")
        epoch, answer = self.call(self.backend.cancel(self.run_id, orders))
        assert epoch == self.call(self.backend.epoch())
        assert list(answer) == list(task_ids)
        return list(answer.values())

    def condemn(self, task_id: str) -> bool:
        return self.call(self.backend.condemn(self.run_id, task_id))

    def reopen(self, task_id: str) -> bool:
        return self.call(self.backend.reopen(self.run_id, task_id))

    def results(self, timeout_seconds: float = PATIENCE_SECONDS) -> dict[str, bytes]:
        return self.call(self.backend.wait_for_results(self.run_id, timeout_seconds))

    def read(self, *task_ids: str) -> dict[str, bytes]:
        return self.call(self.backend.read_results(self.run_id, task_ids))

    def forget_results(self, *task_ids: str) -> None:
        self.call(self.backend.forget_results(self.run_id, task_ids))

    # --- a worker's side ---

    def new_claim(self, task_id: str | None = None, lease_seconds: float = LONG_LEASE) -> Claim:
        worker = uuid.uuid4().hex
        return Claim(
            run_id=self.run_id,
            task_id=task_id or uuid.uuid4().hex,
            token=worker,
            lease_seconds=lease_seconds,
            epoch=self.epoch,
            place=Place(f"w@{worker}", worker, "host", 42, 1),
        )

    def claim(
        self, claim: Claim, *, needs_live_run: bool = True, until_begun: bool = False
    ) -> ClaimAnswer:
        return self.call(
            self.backend.claim(claim, needs_live_run=needs_live_run, until_begun=until_begun)
        )

    def claimed(self, task_id: str | None = None, lease_seconds: float = LONG_LEASE) -> Claim:
        claim = self.new_claim(task_id, lease_seconds)
        assert self.claim(claim) is ClaimAnswer.GRANTED
        return claim

    def begin(self, claim: Claim) -> None:
        self.call(self.backend.begin(claim))

    def release(self, claim: Claim) -> None:
        self.call(self.backend.release(claim))

    def complete(self, claim: Claim, result: bytes = b"result", expires: float = 600) -> bool:
        return self.call(self.backend.complete(claim, result, expires_seconds=expires))

    def refuse(self, claim: Claim) -> bool:
        complete = self.backend.complete(claim, b"refused", expires_seconds=600, is_refused=True)
        return self.call(complete)

    def renew(self, claim: Claim) -> Renewal:
        (renewal,) = self.call(self.backend.renew([claim]))
        return renewal

    def control(self, worker_id: str, timeout_seconds: float = PATIENCE_SECONDS) -> list[bytes]:
        return self.call(self.backend.wait_for_control(worker_id, timeout_seconds))

    # --- the server ---

    def expire(self, claim: Claim) -> None:
        """End a claim's lease, as time would."""
        self.harness.expire(claim)


@contextmanager
def shared_bench(kind: Kind) -> Iterator[Bench]:
    """On a part of the session's server; no run is open."""
    with shared_harness(kind) as harness:
        bench = Bench(harness)
        try:
            yield bench
        finally:
            bench.close()


@contextmanager
def private_bench(
    kind: Kind, *, password: str | None = None, timeout_seconds: float = 5.0
) -> Iterator[tuple[PrivateHarness, Bench]]:
    """On a server of the test's own; no run is open."""
    with private_harness(kind, password) as harness:
        bench = Bench(harness, timeout_seconds)
        try:
            yield harness, bench
        finally:
            bench.close()


def an_end(task_id: str, outcome: EndOutcome = EndOutcome.FAILED, **values: Any) -> AttemptEnd:
    """An attempt of a step that has just ended."""
    whole = AttemptEnd(task_id, "run", "step", 1, "queue", outcome, time.time(), reason="It broke.")
    return replace(whole, **values)


def record(worker_id: str, **values: Any) -> WorkerRecord:
    """A worker's record."""
    whole = WorkerRecord(
        worker_id=worker_id,
        name=f"name-{worker_id}@host",
        host="host",
        pid=1,
        queues=("a", "b"),
        slots=2,
        busy_slots=1,
        run_slots=1,
        busy_run_slots=0,
        state="running",
        started_at=1.5,
        version="0",
    )
    return replace(whole, **values)
