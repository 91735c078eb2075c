"""What one step, one worker and one run cost, counted on real ones with servers of their own.

A figure per step is the difference between a large and a small run over the difference of their
steps, so what a run costs once is not in it.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
import redis

from benchmarks.contenders import CONTENDERS, Contender, Namespace
from benchmarks.lab import Lab, Plan, open_lab
from benchmarks.measures import warm_up_job
from benchmarks.processes import FailedError, cpu_seconds, pss_mib, tree
from benchmarks.scale.amqp_counts import AmqpCounts
from benchmarks.scale.counters import Servers, WorkerUse, difference, session
from benchmarks.scale.simulation import own_redis
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq_tests.proxy import proxied
from dagster_taskiq_tests.servers import private_postgres, private_rabbitmq

#: How long to let workers come to rest before they are watched.
_SETTLE_SECONDS = 3.0

#: Between two looks at the number of PostgreSQL's connections.
_CONNECTIONS_LOOK_SECONDS = 0.2

#: Slots of the second worker beyond those of the first, to tell what a slot needs.
MORE_SLOTS = 4


@dataclass(frozen=True)
class Sizes:
    """How large a measurement is.

    Attributes:
        slots: of the worker.
        small, large: steps of the two runs.
        window_seconds: how long idle processes are watched.
    """

    slots: int = 2
    small: int = 20
    large: int = 420
    window_seconds: float = 15.0
    limit_seconds: float = 300.0

    @property
    def plan(self) -> Plan:
        """For the lab."""
        return Plan(self.large, self.slots, 1, self.limit_seconds, self.window_seconds)


@contextmanager
def own_servers(contender: Contender) -> Iterator[tuple[Servers, Namespace]]:
    """PostgreSQL, Redis and perhaps RabbitMQ for the measurement alone.

    Raises:
        FailedError: one of them cannot be started here.
    """
    with ExitStack() as resources:
        redis_options = resources.enter_context(own_redis())
        try:
            postgres = resources.enter_context(private_postgres())
            if contender.broker != "rabbitmq":
                servers = Servers(redis_options.url, postgres.url, postgres.process.pid)
                yield servers, Namespace(postgres.url, redis_options, None)
                return
            node = resources.enter_context(private_rabbitmq())
        except pytest.skip.Exception as reason:
            raise FailedError(str(reason)) from None
        counts = AmqpCounts()
        tap = resources.enter_context(proxied(node.url, counts.make_reader))
        servers = Servers(
            redis_options.url,
            postgres.url,
            postgres.process.pid,
            node.process.pid,
            counts,
            tap,
        )
        yield servers, Namespace(postgres.url, redis_options, ServerOptions(tap.url))


def measure(name: str, sizes: Sizes) -> dict[str, Any]:
    """All figures of one contender, in groups by what they are of.

    Raises:
        FailedError, DidNotEndError: a worker or run has failed.
    """
    contender = CONTENDERS[name]
    pause_ms = round((2 * sizes.window_seconds + 60) * 1000)
    waiting_job = f"sleep_1_{pause_ms}"
    more = sizes.slots + MORE_SLOTS
    jobs = [
        warm_up_job(sizes.plan),
        f"sleep_{more}_500",
        f"parallel_{sizes.small}",
        f"parallel_{sizes.large}",
        waiting_job,
    ]
    with own_servers(contender) as (servers, space):
        with open_lab(contender, space, jobs) as lab:
            place = _Place(lab, servers, sizes)
            place.warm_up(sizes.slots)
            figures = place.measure_steps()
            few = place.measure_idle_worker(sizes.slots)
            figures["idle_run"] = place.measure_idle_run(waiting_job, few)
        with open_lab(contender, space, jobs) as lab:
            place = _Place(lab, servers, sizes)
            place.warm_up(more)
            many = place.measure_idle_worker(more)
    held = ("postgres_connections", "redis_connections", "amqp_connections", "worker_files", "mib")
    figures["slot"] = {key: (many[key] - few[key]) / MORE_SLOTS for key in held}
    figures["worker"] = {key: few[key] - sizes.slots * figures["slot"][key] for key in held}
    figures["idle_worker"] = few
    return figures


class _Place:
    """A lab whose worker is watched."""

    def __init__(self, lab: Lab, servers: Servers, sizes: Sizes) -> None:
        self._lab = lab
        self._servers = servers
        self._sizes = sizes

    def warm_up(self, slots: int) -> None:
        """Start the worker and have each of its slots execute a step."""
        self._lab.start_workers(slots)
        self._lab.run(f"sleep_{slots}_500", self._sizes.plan)

    def _look(self) -> dict[str, float]:
        use = WorkerUse.look(self._lab.worker_processes())
        cpu = {
            "worker_cpu_seconds": use.worker_cpu_seconds,
            "child_cpu_seconds": use.child_cpu_seconds,
        }
        return {**self._servers.count(), **cpu}

    def measure_steps(self) -> dict[str, Any]:
        """``step``: of one step; ``run``: of the small run; ``peak``: the most while steps ran."""
        with _result_sizes(self._servers.redis_url) as results:
            self._run(self._sizes.small)  # not counted: the look at results takes time
        small, _ = self._run(self._sizes.small)
        large, peak = self._run(self._sizes.large)
        steps = self._sizes.large - self._sizes.small
        step = {key: (large[key] - small.get(key, 0.0)) / steps for key in large}
        step["result_bytes"] = statistics.mean(results) if results else 0.0
        return {"step": step, "run": small, "peak": {"postgres_connections": peak}}

    def _run(self, steps: int) -> tuple[dict[str, float], int]:
        """What happened in a run, and how many connections PostgreSQL had at most."""
        used: list[float] = [0.0]

        def watch(pid: int) -> None:
            used[0] = max(used[0], cpu_seconds([psutil.Process(pid)]))

        before = self._look()
        with _peak_connections(self._servers) as peak:
            record = self._lab.run(f"parallel_{steps}", self._sizes.plan, watch=watch)
        happened = difference(self._look(), before)
        happened["loop_cpu_seconds"] = used[0]
        happened["record_bytes"] = self._servers.record_bytes(record.dagster_run.run_id)
        assert record.start_time is not None
        assert record.end_time is not None
        happened["wall_seconds"] = record.end_time - record.start_time
        return happened, max(peak)

    def measure_idle_worker(self, slots: int) -> dict[str, float]:
        """What a worker whose slots have all had a step costs per second, and holds."""
        time.sleep(_SETTLE_SECONDS)
        processes = self._lab.worker_processes()
        use = WorkerUse.look(processes)
        tap = self._servers.tap
        return {
            **self._watch(processes),
            "slots": slots,
            "postgres_connections": self._servers.postgres_connections(),
            "redis_connections": self._servers.redis_connections(),
            "amqp_connections": tap.connections if tap else 0,
            "worker_files": use.worker_files,
            "child_files": use.child_files,
            "mib": pss_mib(processes),
        }

    def measure_idle_run(self, job: str, worker: dict[str, float]) -> dict[str, float]:
        """What a run that waits for its one step costs per second beyond the worker's own."""
        run = self._lab.start_run(job, self._sizes.plan)
        time.sleep(_SETTLE_SECONDS)
        both = self._watch(tree(run))
        tap = self._servers.tap
        both["postgres_connections"] = self._servers.postgres_connections()
        both["redis_connections"] = self._servers.redis_connections()
        both["amqp_connections"] = tap.connections if tap else 0
        shared = {key: both[key] - worker.get(key, 0.0) for key in both}
        return {**shared, "cpu_percent": both["cpu_percent"], "mib": pss_mib(tree(run))}

    def _watch(self, processes: Sequence[psutil.Process]) -> dict[str, float]:
        before, used, began = self._servers.count(), cpu_seconds(processes), time.monotonic()
        time.sleep(self._sizes.window_seconds)
        used = cpu_seconds(processes) - used
        happened = difference(self._servers.count(), before)
        seconds = time.monotonic() - began
        rates = {f"{key}_per_s": value / seconds for key, value in happened.items()}
        return {**rates, "cpu_percent": 100 * used / self._sizes.window_seconds}


@contextmanager
def _peak_connections(servers: Servers) -> Iterator[list[int]]:
    """The numbers of PostgreSQL's connections that a thread sees meanwhile."""
    seen, stop = [0], threading.Event()

    def look() -> None:
        # one connection for all looks, since each new one would be counted
        with session(servers.postgres_url) as ask:
            while not stop.wait(_CONNECTIONS_LOOK_SECONDS):
                seen.append(servers.postgres_connections(ask))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


@contextmanager
def _result_sizes(url: str) -> Iterator[list[int]]:
    """The lengths of results, as far as they can be seen before they are forgotten."""
    sizes: list[int] = []
    with redis.Redis.from_url(url) as client:
        client.config_set("notify-keyspace-events", "K$")
        listener = client.pubsub(ignore_subscribe_messages=True)

        def note(message: dict[str, bytes]) -> None:
            key = message["channel"].partition(b":")[2]
            if message["data"] == b"set" and (size := client.strlen(key)):
                sizes.append(int(size))

        listener.psubscribe(**{"__keyspace@0__:*:result:*": note})
        thread = listener.run_in_thread(sleep_time=0.01, daemon=True)
        try:
            yield sizes
        finally:
            thread.stop()
            thread.join()
            listener.close()
            client.config_set("notify-keyspace-events", "")
