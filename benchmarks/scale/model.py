"""What a cluster needs of each server, computed from the figures; pure arithmetic.

Everything is taken as linear in what causes it: a step, a renewal of a claim, a worker, a run. The
one exception is what a run reads of the list of workers, which is linear in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from dagster_taskiq.defaults import (
    CLOSED_RECORD_EXPIRES_SECONDS,
    DATABASE_IDLE_SECONDS,
    LEASE_SECONDS,
    RECONCILE_SECONDS,
    RENEWALS_PER_LEASE,
)

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Cluster:
    """A cluster whose slots are all busy all the time.

    Attributes:
        slots: of all workers, for steps.
        step_seconds: how long a step takes.
        slots_per_worker: as ``-c``.
        slots_per_run: how many steps of one run are executed at a time.
    """

    slots: int
    step_seconds: float
    slots_per_worker: int = 8
    slots_per_run: int = 100
    lease_seconds: float = LEASE_SECONDS

    @property
    def steps_per_second(self) -> float:
        """That begin and end."""
        return self.slots / self.step_seconds

    @property
    def workers(self) -> int:
        """Workers that it takes."""
        return -(-self.slots // self.slots_per_worker)

    @property
    def runs(self) -> int:
        """Runs at a time."""
        return -(-self.slots // self.slots_per_run)

    @property
    def claims_renewed_per_second(self) -> float:
        """A claim for each busy slot, renewed every sixth of its lease."""
        return self.slots * RENEWALS_PER_LEASE / self.lease_seconds

    @property
    def workers_listed_per_second(self) -> float:
        """Each run with a step that waits reads the list of workers at each reconciliation."""
        return self.workers * self.runs / RECONCILE_SECONDS


class Resource(Enum):
    """What may saturate, with its unit."""

    LOOP_CPU = "one run's loop: steps/s"
    REDIS_CPU = "Redis: CPU, cores"
    REDIS_CONNECTIONS = "Redis: connections"
    REDIS_MEMORY = "Redis: memory, GiB"
    REDIS_NETWORK = "Redis: in and out, MB/s"
    POSTGRES_CONNECTIONS = "PostgreSQL: connections"
    POSTGRES_CPU = "PostgreSQL: CPU, cores"
    POSTGRES_WRITES = "PostgreSQL: WAL, MB/s"
    RABBITMQ_CPU = "RabbitMQ: CPU, cores"
    RABBITMQ_CONNECTIONS = "RabbitMQ: connections"
    WORKER_FILES = "one worker: open files"
    SLOT_CPU = "one slot: our and Dagster's CPU, cores"


#: What there is of each before somebody changes a setting or buys something: defaults of the
#: servers, one core where a server uses one, and else a middling machine (8 cores, 8 GiB for
#: Redis, 1 GbE, a disk that takes 100 MB/s).
LIMITS: Mapping[Resource, float] = {
    Resource.LOOP_CPU: 0.0,  # measured, see ``limits``
    Resource.REDIS_CPU: 1.0,
    Resource.REDIS_CONNECTIONS: 10_000,
    Resource.REDIS_MEMORY: 8.0,
    Resource.REDIS_NETWORK: 125.0,
    Resource.POSTGRES_CONNECTIONS: 97,  # max_connections 100 without the superuser's three
    Resource.POSTGRES_CPU: 8.0,
    Resource.POSTGRES_WRITES: 100.0,
    Resource.RABBITMQ_CPU: 8.0,
    Resource.RABBITMQ_CONNECTIONS: 32_000,  # file handles of its systemd unit, less its own
    Resource.WORKER_FILES: 1024,
    Resource.SLOT_CPU: 1.0,
}


def limits(figures: Figures) -> dict[Resource, float]:
    """``LIMITS`` with those that are measured."""
    return {**LIMITS, Resource.LOOP_CPU: 1 / figures["step"]["loop_cpu_seconds"]}


def needs(cluster: Cluster, figures: Figures, lease: Figures) -> dict[Resource, float]:
    """What a cluster needs of each resource.

    Args:
        figures: of one contender, as ``measure`` returns them.
        lease: what ``lease_costs`` has made of the simulations.
    """
    step, worker, slot = figures["step"], figures["worker"], figures["slot"]
    run = figures["idle_run"]
    found = {
        Resource.LOOP_CPU: cluster.steps_per_second / cluster.runs,
        **_redis_needs(cluster, figures, lease),
        Resource.POSTGRES_CONNECTIONS: _postgres_connections(cluster, figures),
        Resource.POSTGRES_CPU: cluster.steps_per_second * step["postgres_cpu_seconds"],
        Resource.POSTGRES_WRITES: cluster.steps_per_second * step["postgres_wal_bytes"] / 1e6,
        Resource.WORKER_FILES: worker["worker_files"]
        + cluster.slots_per_worker * slot["worker_files"],
        Resource.SLOT_CPU: (step["child_cpu_seconds"] + step["worker_cpu_seconds"])
        / cluster.step_seconds,
    }
    if "amqp_cpu_seconds" in step:
        idle = figures["idle_worker"]["amqp_cpu_seconds_per_s"]
        found[Resource.RABBITMQ_CPU] = (
            cluster.steps_per_second * step["amqp_cpu_seconds"] + cluster.workers * idle
        )
        # a worker with both kinds of slots has a connection for each kind
        found[Resource.RABBITMQ_CONNECTIONS] = (
            cluster.workers * 2 * worker["amqp_connections"]
            + cluster.runs * run["amqp_connections"]
        )
    return found


def _redis_needs(cluster: Cluster, figures: Figures, lease: Figures) -> dict[Resource, float]:
    step, run = figures["step"], figures["idle_run"]
    causes = {
        "renewed_claim": cluster.claims_renewed_per_second,
        "worker_second": cluster.workers,
        "listed_worker": cluster.workers_listed_per_second,
    }
    cpu = sum(count * lease[cause]["cpu_seconds"] for cause, count in causes.items())
    traffic = sum(count * lease[cause]["bytes"] for cause, count in causes.items())
    step_bytes = step["redis_input_bytes"] + step["redis_output_bytes"]
    kept = cluster.steps_per_second * CLOSED_RECORD_EXPIRES_SECONDS * step["record_bytes"]
    clients = cluster.workers * lease["connections_per_worker"]
    connections = clients + cluster.runs * run["redis_connections"]
    buffers = connections * lease["bytes_per_connection"]
    return {
        Resource.REDIS_CPU: cpu + cluster.steps_per_second * step["redis_cpu_seconds"],
        Resource.REDIS_NETWORK: (traffic + cluster.steps_per_second * step_bytes) / 1e6,
        Resource.REDIS_CONNECTIONS: connections,
        Resource.REDIS_MEMORY: (kept + buffers) / 2**30,
    }


def _postgres_connections(cluster: Cluster, figures: Figures) -> float:
    """What is open at a time, on average, of steps that say nothing but that they begin and end.

    A slot's connection is open while a step begins and while it ends, when the next one begins
    there, and is closed a while later; a run's is used with each step that ends.
    """
    nothing_seconds: float = figures["step"]["wall_seconds"] * figures["idle_worker"]["slots"]
    of_slot = min(1.0, (nothing_seconds + DATABASE_IDLE_SECONDS) / cluster.step_seconds)
    of_run = min(1.0, DATABASE_IDLE_SECONDS * cluster.steps_per_second / cluster.runs)
    return cluster.slots * of_slot + cluster.runs * of_run


def lease_costs(simulations: Sequence[Figures]) -> dict[str, Any]:
    """What leases and lists cost the Redis, from three simulations of one size.

    Args:
        simulations: of an idle crowd; of one with busy slots; and of one whose runs have steps
            that wait, too.
    """
    idle, busy, listing = simulations
    workers = idle["workers"]
    listed = listing["inspections_per_s"] * listing["workers"]

    def cost(more: Figures, less: Figures, count: float) -> dict[str, float]:
        cpu = (more["cpu_percent"] - less["cpu_percent"]) / 100
        traffic = sum(
            more[name] - less[name] for name in ("input_bytes_per_s", "output_bytes_per_s")
        )
        return {"cpu_seconds": max(0.0, cpu / count), "bytes": max(0.0, traffic / count)}

    nothing = dict.fromkeys(("cpu_percent", "input_bytes_per_s", "output_bytes_per_s"), 0.0)
    return {
        "worker_second": cost(idle, nothing, workers),
        "renewed_claim": cost(busy, idle, busy["claims_renewed_per_s"]),
        "listed_worker": cost(listing, busy, listed),
        # an idle worker waits for steps, a busy one renews claims
        "connections_per_worker": max(idle["connections"], busy["connections"]) / workers,
        "bytes_per_connection": busy["client_memory_bytes"] / busy["connections"],
    }


def shares(cluster: Cluster, figures: Figures, lease: Figures) -> dict[Resource, float]:
    """How much of each limit a cluster needs, the most first: that resource saturates first."""
    limit = limits(figures)
    found = {it: need / limit[it] for it, need in needs(cluster, figures, lease).items()}
    return dict(sorted(found.items(), key=lambda item: item[1], reverse=True))
