"""What runs hold back, in each kind of backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dagster_taskiq.backend import Backend
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.messages.withheld_steps import Withheld, WithheldGroup
from dagster_taskiq_tests.contract.backend_bench import KINDS, LONG_LEASE, Bench, shared_bench

WITHHELD = Withheld((WithheldGroup("db", "It is full.", (("a", 1.5), ("b", 2.5))),), 7)
NOTHING = Withheld()


@pytest.fixture(params=KINDS)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    with shared_bench(request.param) as bench:
        yield bench


def open_run(bench: Bench, token: str = "one", generation: int = 0) -> None:
    bench.call(
        bench.backend.open_run(
            bench.run_id,
            generation=generation,
            token=token,
            is_resumable=True,
            lease_seconds=LONG_LEASE,
        )
    )


def tell(bench: Bench, withheld: Withheld, token: str = "one") -> bool:
    return bench.call(bench.backend.tell_withheld(bench.run_id, withheld, token=token))


def seen(bench: Bench, backend: Backend | None = None) -> Withheld:
    """What another process sees of the run."""
    runs = bench.call((backend or bench.open()).runs())
    (found,) = [run.withheld for run in runs if run.run_id == bench.run_id] or [NOTHING]
    return found


def test_it_is_known_until_it_changes_or_the_run_ends(bench: Bench) -> None:
    open_run(bench)
    assert seen(bench) == NOTHING
    assert tell(bench, WITHHELD)
    assert seen(bench) == WITHHELD
    bench.call(
        bench.backend.renew_run(
            bench.run_id, generation=0, token="one", is_resumable=True, lease_seconds=LONG_LEASE
        )
    )
    assert seen(bench) == WITHHELD
    other = Withheld(more=1)
    assert tell(bench, other)
    assert seen(bench) == other
    assert tell(bench, NOTHING)
    assert seen(bench) == NOTHING
    assert tell(bench, WITHHELD)
    bench.call(bench.backend.close_run(bench.run_id, token="one"))
    assert seen(bench) == NOTHING
    assert not tell(bench, WITHHELD)
    open_run(bench, generation=1)  # also where the same words come again
    assert seen(bench) == NOTHING


def test_it_is_that_of_the_present_loop(bench: Bench) -> None:
    """Also where a version takes over that tells nothing."""
    assert not tell(bench, WITHHELD)
    open_run(bench)
    assert tell(bench, WITHHELD)
    bench.harness.expire_loop(bench.run_id)
    assert seen(bench) == NOTHING
    assert not tell(bench, WITHHELD)
    open_run(bench, "two", generation=1)
    assert seen(bench) == NOTHING
    assert not tell(bench, NOTHING)
    assert tell(bench, WITHHELD, "two")
    assert seen(bench) == WITHHELD


def test_it_goes_with_the_servers_data(bench: Bench) -> None:
    open_run(bench)
    assert tell(bench, WITHHELD)
    bench.harness.forget()
    assert not tell(bench, WITHHELD)
    open_run(bench)
    assert seen(bench) == NOTHING
    assert tell(bench, WITHHELD)
    assert seen(bench) == WITHHELD


def test_without_the_key_it_is_not_believed(bench: Bench) -> None:
    keyed = bench.open(Signer(["k" * 32]))
    open_run(bench)
    assert tell(bench, WITHHELD)
    assert seen(bench, keyed) == NOTHING
    bench.call(keyed.tell_withheld(bench.run_id, WITHHELD, token="one"))
    assert seen(bench, keyed) == WITHHELD
