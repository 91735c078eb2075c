"""What one step, one worker and one run cost, counted on real ones with servers of their own.

A figure per step is the difference between a large and a small run over the difference of their
steps, so what a run costs once is not in it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import psutil
import redis

from benchmarks.contenders import CONTENDERS, Contender, Namespace
from benchmarks.lab import Lab, Plan, open_lab
from benchmarks.measures import SETTLE_SECONDS, warm_up_job, warm_worker
from benchmarks.namespace import needed, own_redis
from benchmarks.processes import Looks, cpu_seconds, pss_mib, tree
from benchmarks.scale.amqp_counts import AmqpCounts
from benchmarks.scale.counters import CONNECTIONS, Servers, children_of, difference, session
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq_tests.proxy import proxied
from dagster_taskiq_tests.servers import private_postgres, private_rabbitmq

#: Between two looks at the number of PostgreSQL's connections.
_CONNECTIONS_LOOK_SECONDS = 0.2

#: The worker, the larger of the two runs, and how long idle processes are watched.
PLAN = Plan(steps=420, slots=2, limit_seconds=300.0, window_seconds=15.0)

#: Steps of the smaller run.
SMALL_STEPS = 20

#: Slots of the second worker beyond those of the first, to tell what a slot needs.
MORE_SLOTS = 4


@contextmanager
def own_servers(contender: Contender) -> Iterator[tuple[Servers, Namespace]]:
    """PostgreSQL, Redis and perhaps RabbitMQ for the measurement alone.

    Raises:
        FailedError: one of them cannot be started here.
    """
    with ExitStack() as resources:
        redis_options = resources.enter_context(own_redis())
        postgres = resources.enter_context(needed(private_postgres()))
        servers = Servers(redis_options.url, postgres.url, postgres.process.pid)
        if contender.broker != "rabbitmq":
            yield servers, Namespace(postgres.url, redis_options, None)
            return
        node = resources.enter_context(needed(private_rabbitmq()))
        counts = AmqpCounts()
        tap = resources.enter_context(proxied(node.url, counts.make_reader))
        servers = replace(servers, rabbitmq_pid=node.process.pid, amqp=counts, tap=tap)
        yield servers, Namespace(postgres.url, redis_options, ServerOptions(tap.url))


def measure(name: str) -> dict[str, Any]:
    """All figures of one contender, in groups by what they are of.

    Raises:
        FailedError: a worker or run has failed, or did not end in time.
    """
    contender = CONTENDERS[name]
    larger = replace(PLAN, slots=PLAN.slots + MORE_SLOTS)
    waiting_job = f"sleep_1_{round((2 * PLAN.window_seconds + 60) * 1000)}"
    sizes = [f"parallel_{steps}" for steps in (SMALL_STEPS, PLAN.steps)]
    jobs = [warm_up_job(PLAN), warm_up_job(larger), *sizes, waiting_job]
    with own_servers(contender) as (servers, space):
        with open_lab(contender, space, jobs) as lab:
            warm_worker(lab, PLAN)
            place = _Place(lab, servers)
            figures = place.measure_steps()
            few = place.measure_idle_worker(PLAN.slots)
            figures["idle_run"] = place.measure_idle_run(waiting_job, few)
        with open_lab(contender, space, jobs) as lab:
            warm_worker(lab, larger)
            many = _Place(lab, servers).measure_idle_worker(larger.slots)
    held = ("postgres_connections", "redis_connections", "amqp_connections", "worker_files", "mib")
    figures["slot"] = {key: (many[key] - few[key]) / MORE_SLOTS for key in held}
    figures["worker"] = {key: few[key] - PLAN.slots * figures["slot"][key] for key in held}
    figures["idle_worker"] = few
    return figures


@dataclass(frozen=True)
class _Place:
    """A lab whose worker is watched."""

    lab: Lab
    servers: Servers

    def measure_steps(self) -> dict[str, Any]:
        """``step``: of one step; ``run``: of the small run; ``peak``: the most while steps ran."""
        with _result_sizes(self.servers.redis_url) as results:
            self._run(SMALL_STEPS)  # not counted: the look at results takes time
        small, _ = self._run(SMALL_STEPS)
        large, peak = self._run(PLAN.steps)
        steps = PLAN.steps - SMALL_STEPS
        step = {key: (large[key] - small.get(key, 0.0)) / steps for key in large}
        step["result_bytes"] = statistics.mean(results) if results else 0.0
        return {"step": step, "run": small, "peak": {"postgres_connections": peak}}

    def _run(self, steps: int) -> tuple[dict[str, float], float]:
        """What happened in a run, and how many connections PostgreSQL had at most."""
        before = self._look()
        # one connection for all looks, since each new one would be counted
        with session(self.servers.postgres_url) as ask:
            cpu = Looks(lambda pid: cpu_seconds([psutil.Process(pid)]))
            connections = Looks(
                lambda _: ask(CONNECTIONS)["connections"], _CONNECTIONS_LOOK_SECONDS
            )
            run = self.lab.run(f"parallel_{steps}", PLAN, watch=(cpu, connections))
        happened = difference(self._look(), before)
        happened["loop_cpu_seconds"] = cpu.most
        happened["record_bytes"] = self.servers.record_bytes(run.record.dagster_run.run_id)
        happened["wall_seconds"] = run.seconds
        return happened, connections.most

    def _look(self) -> dict[str, float]:
        processes = self.lab.worker_processes()
        return {
            **self.servers.count(),
            "worker_cpu_seconds": cpu_seconds(processes[:1]),
            "child_cpu_seconds": cpu_seconds(children_of(processes)),
        }

    def measure_idle_worker(self, slots: int) -> dict[str, float]:
        """What a worker whose slots have all had a step costs per second, and holds."""
        time.sleep(SETTLE_SECONDS)
        processes = self.lab.worker_processes()
        return {
            **self._watch(processes),
            **self.servers.connections(),
            "slots": slots,
            "worker_files": processes[0].num_fds(),
            "child_files": max(child.num_fds() for child in children_of(processes)),
            "mib": pss_mib(processes),
        }

    def measure_idle_run(self, job: str, worker: dict[str, float]) -> dict[str, float]:
        """What a run that waits for its one step costs per second beyond the worker's own."""
        run = self.lab.start_run(job, PLAN)
        time.sleep(SETTLE_SECONDS)
        both = {**self._watch(tree(run)), **self.servers.connections()}
        more = {key: value - worker.get(key, 0.0) for key, value in both.items()}
        return {**more, "cpu_percent": both["cpu_percent"], "mib": pss_mib(tree(run))}

    def _watch(self, processes: Sequence[psutil.Process]) -> dict[str, float]:
        before, used, began = self.servers.count(), cpu_seconds(processes), time.monotonic()
        time.sleep(PLAN.window_seconds)
        used = cpu_seconds(processes) - used
        happened = difference(self.servers.count(), before)
        seconds = time.monotonic() - began
        rates = {f"{key}_per_s": value / seconds for key, value in happened.items()}
        return {**rates, "cpu_percent": 100 * used / PLAN.window_seconds}


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
