"""Pauses of queues in each kind of backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dagster_taskiq.messages.queue_pauses import QueuePause
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq_tests.contract.backend_bench import KINDS, Bench, shared_bench

PAUSE = QueuePause("etl", "the warehouse is migrated", 1.5, "host-a")


@pytest.fixture(scope="module", params=KINDS)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    with shared_bench(request.param) as bench:
        yield bench


def test_a_pause_holds_for_all_until_it_is_ended(bench: Bench) -> None:
    other = bench.open()
    assert bench.call(other.paused_queues()) == {}
    bench.call(bench.backend.pause_queue(QueuePause("etl", "first", 1.0, "host-b")))
    bench.call(bench.backend.pause_queue(PAUSE))
    assert bench.call(other.paused_queues()) == {"etl": PAUSE}
    assert bench.call(other.resume_queue("etl"))
    assert not bench.call(bench.backend.resume_queue("etl"))
    assert bench.call(bench.backend.paused_queues()) == {}


def test_a_pause_without_the_key_is_not_believed(bench: Bench) -> None:
    keyed = bench.open(Signer(["k" * 32]))
    bench.call(bench.backend.pause_queue(PAUSE))
    assert bench.call(keyed.paused_queues()) == {}
    bench.call(keyed.pause_queue(PAUSE))
    assert bench.call(keyed.paused_queues()) == {"etl": PAUSE}
    assert bench.call(bench.backend.resume_queue("etl"))
