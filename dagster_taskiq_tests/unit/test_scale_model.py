"""The arithmetic of docs/scaling.md, and that the page has the tables of its figures."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scale.amqp_counts import AmqpCounts
from benchmarks.scale.counters import difference
from benchmarks.scale.model import Cluster, Resource, lease_costs, limits, needs, shares
from benchmarks.scale.redis_stats import RedisStats
from benchmarks.scale.tables import render

FIGURES: dict[str, Any] = {
    "step": {
        "loop_cpu_seconds": 0.01,
        "worker_cpu_seconds": 0.005,
        "child_cpu_seconds": 0.045,
        "redis_cpu_seconds": 0.001,
        "redis_input_bytes": 9_000,
        "redis_output_bytes": 1_000,
        "record_bytes": 100,
        "postgres_cpu_seconds": 0.02,
        "postgres_wal_bytes": 20_000,
        "wall_seconds": 0.5,
    },
    "slot": {"worker_files": 3.0},
    "worker": {"worker_files": 14.0, "amqp_connections": 1.0},
    "idle_worker": {"slots": 2, "amqp_cpu_seconds_per_s": 0.001},
    "idle_run": {"redis_connections": 3.0, "amqp_connections": 1.0},
}

LEASE = {
    "worker_second": {"cpu_seconds": 0.0001, "bytes": 200},
    "renewed_claim": {"cpu_seconds": 0.00005, "bytes": 2_000},
    "listed_worker": {"cpu_seconds": 0.000001, "bytes": 500},
    "connections_per_worker": 5.0,
    "bytes_per_connection": 1024,
}


def simulation(**values: float) -> dict[str, float]:
    nothing = {
        "workers": 1000,
        "connections": 5000,
        "client_memory_bytes": 5000 * 1024,
        "claims_renewed_per_s": 0,
        "inspections_per_s": 0,
        "cpu_percent": 0,
        "input_bytes_per_s": 0,
        "output_bytes_per_s": 0,
    }
    return {**nothing, **values}


def test_a_cluster_is_counted_in_steps_workers_runs_and_renewals() -> None:
    """1,000 busy slots with steps of 10 s: 100 steps/s; each claim is renewed every 5 s."""
    cluster = Cluster(1_000, 10, slots_per_worker=8, slots_per_run=300)
    assert (cluster.steps_per_second, cluster.workers, cluster.runs) == (100, 125, 4)
    assert cluster.claims_renewed_per_second == pytest.approx(200)
    assert cluster.workers_listed_per_second == pytest.approx(125 * 4 / 3)


def test_what_redis_needs_is_the_sum_of_its_causes() -> None:
    """Renewals, workers, lists and steps, each with its own cost."""
    cluster = Cluster(1_000, 10, slots_per_worker=10, slots_per_run=500)
    found = needs(cluster, FIGURES, LEASE)
    cpu = 200 * 0.00005 + 100 * 0.0001 + 2 * 100 / 3 * 0.000001 + 100 * 0.001
    traffic = 200 * 2_000 + 100 * 200 + 2 * 100 / 3 * 500 + 100 * 10_000
    assert found[Resource.REDIS_CPU] == pytest.approx(cpu)
    assert found[Resource.REDIS_NETWORK] == pytest.approx(traffic / 1e6)
    assert found[Resource.REDIS_CONNECTIONS] == 100 * 5 + 2 * 3
    kept = 100 * 3600 * 100 + 506 * 1024
    assert found[Resource.REDIS_MEMORY] == pytest.approx(kept / 2**30)


def test_what_the_other_resources_need() -> None:
    """A run's loop by its own steps, PostgreSQL by all of them, files by the slots of a worker."""
    cluster = Cluster(1_000, 10, slots_per_worker=10, slots_per_run=500)
    found = needs(cluster, FIGURES, LEASE)
    assert found[Resource.LOOP_CPU] == 50
    assert limits(FIGURES)[Resource.LOOP_CPU] == pytest.approx(100)
    assert found[Resource.POSTGRES_CPU] == pytest.approx(2)
    assert found[Resource.POSTGRES_WRITES] == pytest.approx(2)
    assert found[Resource.POSTGRES_CONNECTIONS] == pytest.approx(1_000 * 0.3 + 2)
    assert found[Resource.WORKER_FILES] == 14 + 10 * 3
    assert found[Resource.SLOT_CPU] == pytest.approx(0.005)
    assert Resource.RABBITMQ_CPU not in found


@pytest.mark.parametrize(
    ("step_seconds", "of_slot", "of_run"),
    [(0.5, 1, 1), (3, 1, 1), (60, 0.05, 1), (600, 0.005, 0.5)],
)
def test_a_connection_is_open_for_a_while_after_its_last_use(
    step_seconds: float, of_slot: float, of_run: float
) -> None:
    """2 s, and the second that a step takes on one of two slots; 150 slots of a run end a step."""
    found = needs(Cluster(1_500, step_seconds, slots_per_run=150), FIGURES, LEASE)
    expected = 1_500 * of_slot + 10 * of_run
    assert found[Resource.POSTGRES_CONNECTIONS] == pytest.approx(expected)


def test_rabbitmq_counts_where_it_carries_the_steps() -> None:
    """A worker has a connection for its steps and one for runs."""
    figures = {**FIGURES, "step": {**FIGURES["step"], "amqp_cpu_seconds": 0.002}}
    found = needs(Cluster(800, 10, slots_per_run=400), figures, LEASE)
    assert found[Resource.RABBITMQ_CPU] == pytest.approx(80 * 0.002 + 100 * 0.001)
    assert found[Resource.RABBITMQ_CONNECTIONS] == 100 * 2 + 2


def test_the_costs_of_leases_are_differences_of_simulations() -> None:
    """What idle workers cost is in none of the others' figures."""
    found = lease_costs(
        [
            simulation(cpu_percent=10, input_bytes_per_s=100_000),
            simulation(cpu_percent=26, input_bytes_per_s=3_300_000, claims_renewed_per_s=1_600),
            simulation(cpu_percent=33, input_bytes_per_s=7_300_000, inspections_per_s=7),
        ]
    )
    assert found["worker_second"] == pytest.approx({"cpu_seconds": 0.0001, "bytes": 100})
    assert found["renewed_claim"] == pytest.approx({"cpu_seconds": 0.0001, "bytes": 2_000})
    assert found["listed_worker"]["cpu_seconds"] == pytest.approx(0.07 / 7_000)
    assert (found["connections_per_worker"], found["bytes_per_connection"]) == (5, 1024)


def test_what_is_used_most_comes_first() -> None:
    """1,010 connections where there are 97 is far more than 10 of 8 cores."""
    (first, share), *others = shares(Cluster(1_000, 2), FIGURES, LEASE).items()
    assert first is Resource.POSTGRES_CONNECTIONS
    assert share == pytest.approx(1_010 / 97)
    assert [it for _, it in others] == sorted((it for _, it in others), reverse=True)


def test_redis_counts_are_differences() -> None:
    """Scripts are counted by whichever command calls them."""
    info: dict[str, Any] = {
        "total_commands_processed": 10,
        "total_reads_processed": 4,
        "cmdstat_eval": {"calls": 1},
        "cmdstat_evalsha": {"calls": 2},
        "total_net_input_bytes": 100,
        "total_net_output_bytes": 50,
        "used_cpu_user": 1.0,
        "used_cpu_sys": 0.5,
        "connected_clients": 3,
        "used_memory": 1000,
    }
    before = RedisStats({**info, "redis_version": "7"}, 1.0)
    after = RedisStats({**before.info, "cmdstat_eval": {"calls": 5}, "used_cpu_sys": 1.5}, 3.0)
    figures = after.figures_since(before)
    assert figures["script_calls_per_s"] == pytest.approx(2)
    assert figures["cpu_percent"] == pytest.approx(50)
    assert (figures["server"], figures["connections"]) == ("Redis 7", 3)
    assert difference(after.counts, before.counts)["script_calls"] == 4


def method_frame(number: int) -> bytes:
    return struct.pack(">BHIHHB", 1, 1, 5, 60, number, 0) + b"\xce"


def test_amqp_frames_are_counted_however_they_are_cut() -> None:
    """The protocol's header, a publish with its message, and the server's confirmation."""
    counts = AmqpCounts()
    to_server, from_server = counts.make_reader(True), counts.make_reader(False)
    header = struct.pack(">BHIHHQH", 2, 1, 14, 60, 0, 3, 0) + b"\xce"
    body = struct.pack(">BHI", 3, 1, 3) + b"abc\xce"
    stream = b"AMQP\x00\x00\x09\x01" + method_frame(40) + header + body
    for index in range(len(stream)):
        to_server(stream[index : index + 1])
    from_server(method_frame(80))
    to_server(method_frame(80))
    assert dict(counts.counts) == {
        "input_bytes": len(stream) + len(method_frame(80)),
        "output_bytes": len(method_frame(80)),
        "frames": 5,
        "publish": 1,
        "body_bytes": 3,
        "confirm": 1,
        "ack": 1,
    }


def test_figures_are_read_from_a_file(tmp_path: Path) -> None:
    """Tables that the figures do not suffice for are left out."""
    machine = {
        "processor": "p",
        "cores": 2,
        "memory_gib": 4,
        "python": "3",
        "began": "2026-11-26T00:00:00+00:00",
        "load_average": 0.0,
        "versions": {"dagster": "1"},
    }
    assert set(render({"machine": machine})) == {"machine"}
