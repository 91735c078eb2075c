"""The simulation of ``benchmarks/scale``, and its search for the knee, small and short."""

from __future__ import annotations

import pytest

from benchmarks.scale.crowd import Crowd
from benchmarks.scale.replay import find_knee
from benchmarks.scale.simulation import simulate
from dagster_taskiq_tests.servers import private_redis


@pytest.mark.timeout(170)
@pytest.mark.parametrize("step_seconds", [0.5, None], ids=["steps end", "steps are held"])
def test_a_small_crowd(step_seconds: float | None) -> None:
    """Its claims are renewed, none is lost, its steps end, and an order to cancel arrives."""
    crowd = Crowd(
        workers=5,
        slots=2,
        runs=2,
        waiting=1,
        lease_seconds=3.0,
        step_seconds=step_seconds,
        seconds=2.0,
        processes=1,
    )
    with private_redis() as server:
        figures = simulate(crowd, server.options)
    assert (figures["lost_claims"], figures["errors"]) == (0, 0)
    # ten claims, each renewed every half second, while a machine with much to do may be late
    assert 5 <= figures["claims_renewed_per_s"] <= 40
    assert 0 < figures["worst_slack_share"] < 0.9  # a renewal is sent every sixth of a lease
    assert (figures["steps_per_s"] > 2) is (step_seconds is not None)
    assert figures["cancels"] > 0
    assert figures["requests_per_s"] > 10
    # of each worker: a wait for orders, one for runs, and its calls; of each run: a wait and calls
    assert figures["connections"] >= 5 * 3 + 2 * 2


def test_the_knee_is_where_a_level_is_not_carried() -> None:
    """Each level asks for more than the one before, and the last one is too much."""
    with private_redis() as server:
        levels = list(
            find_knee(
                server.options, workers=5, slots=2, first_lease_seconds=0.01, level_seconds=0.2
            )
        )
    offered = [level["offered_claims_per_s"] for level in levels]
    assert offered == sorted(offered)
    assert [level["is_saturated"] for level in levels[:-1]] == [False] * (len(levels) - 1)
    assert levels[-1]["is_saturated"]
    assert all(level["lost_claims"] == 0 for level in levels)
