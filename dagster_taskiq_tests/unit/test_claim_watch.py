"""When a claim that is gone may be believed to be over, by the loop's own clock."""

from __future__ import annotations

import pytest

from dagster_taskiq.loop.claim_watch import ClaimWatch

LEASE_SECONDS = 60.0


def watched(*looks: tuple[float, float | None]) -> ClaimWatch:
    """A watch after looks at these times, at what was left of the lease, or None where gone."""
    watch = ClaimWatch(LEASE_SECONDS)
    for at, left_seconds in looks:
        if left_seconds is None:
            watch.miss(at, is_expired=True)
        else:
            watch.see(at, left_seconds)
    return watch


def over_at(watch: ClaimWatch) -> float:
    """The first whole second at which it is over."""
    return next(float(now) for now in range(1000) if watch.is_over(now))


@pytest.mark.parametrize(
    ("looks", "over"),
    [
        pytest.param([(100, 60), (130, 30), (155, 5), (160, None)], 160, id="a dead worker"),
        pytest.param([(100, 60), (155, 5), (158, None)], 160, id="seen gone a little early"),
        pytest.param([(100, 60), (103, None)], 163, id="deleted"),
        pytest.param([(100, 60), (103, 57), (106, 1), (109, None)], 169, id="the clock stepped"),
        pytest.param([(103, None)], 163, id="never seen held"),
        pytest.param([(100, 60), (145, 15), (161, None)], 221, id="not looked at in time"),
        pytest.param([(100, 5), (103, 60), (106, None)], 166, id="renewed after all"),
        pytest.param(
            [(100, 60), (103, 3600), (158, 5), (160, None)], 163, id="the clock went back"
        ),
        pytest.param([(100, 60), (103, None), (106, None)], 163, id="seen gone twice"),
    ],
)
def test_when_a_claim_is_over(looks: list[tuple[float, float | None]], over: float) -> None:
    """At its lease's end if its worker was overdue, else a lease after it was seen gone."""
    assert over_at(watched(*looks)) == over


def test_a_held_claim_is_never_over() -> None:
    """Whatever its lease says: the server has not let it go."""
    assert not watched((100, 1)).is_over(1000)
    assert not watched((100, None), (103, 60)).is_over(1000)


def test_a_first_claim_may_come_and_go_between_two_looks() -> None:
    """That a task has waited unclaimed for long says nothing of it."""
    watch = ClaimWatch(LEASE_SECONDS)
    for at in range(0, 600, 3):
        watch.miss(at, is_expired=False)
    watch.miss(600, is_expired=True)
    assert over_at(watch) == 660


@pytest.mark.parametrize(
    ("looks", "now", "next_look"),
    [
        pytest.param([(100, 60)], 100, 155, id="when the guard must have stopped it"),
        pytest.param([(155, 5)], 155, 160, id="when an overdue one's lease ends"),
        pytest.param([(155, 5)], 160, 160.1, id="again soon while it is still there"),
        pytest.param([(100, 60), (103, None)], 103, 163, id="when a vanished one is over"),
        pytest.param([(100, 60), (103, None)], 170, float("inf"), id="never again when it is"),
    ],
)
def test_when_to_look_again(
    looks: list[tuple[float, float | None]], now: float, next_look: float
) -> None:
    """At the moments that matter, and not in a loop without a pause."""
    assert watched(*looks).next_look_at(now) == pytest.approx(next_look)
