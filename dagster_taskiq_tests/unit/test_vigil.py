"""For how long a server has been steady, and a thing absent, on a clock of numbers."""

from __future__ import annotations

import pytest

from dagster_taskiq.aio.vigil import AbsenceWatch, EpochWatch

FOREVER = float("inf")


@pytest.mark.parametrize(("is_complete", "seconds"), [(True, FOREVER), (False, 5.0)])
def test_the_first_epoch_is_no_trouble(is_complete: bool, seconds: float) -> None:
    """It counts from its first sight, or from ever where nothing is older than the watch."""
    watch = EpochWatch("redis://fake", is_complete=is_complete)
    assert not watch.note_epoch("first", 100.0)
    assert watch.epoch_seconds(105.0) == watch.steady_seconds(105.0) == seconds
    assert (watch.epoch, watch.trouble) == ("first", "")


@pytest.mark.parametrize("is_complete", [True, False])
def test_a_new_epoch_counts_from_its_first_sight(is_complete: bool) -> None:
    """It is a trouble, which has a sentence and a time; seen again it is nothing new."""
    watch = EpochWatch("redis://fake", is_complete=is_complete)
    watch.note_epoch("first", 100.0)
    assert watch.note_epoch("second", 110.0)
    assert not watch.note_epoch("second", 115.0)
    assert watch.epoch_seconds(120.0) == watch.steady_seconds(120.0) == 10.0
    assert watch.trouble == "redis://fake was restarted or emptied."
    assert watch.troubled_at == 110.0


def test_an_outage_leaves_the_epoch_its_age() -> None:
    """The server was away, and has forgotten nothing."""
    watch = EpochWatch("redis://fake")
    watch.note_epoch("first", 100.0)
    watch.note_trouble("Cannot reach redis://fake.", 110.0)
    watch.note_trouble("Still cannot.", 112.0)
    assert not watch.note_epoch("first", 115.0)
    assert watch.steady_seconds(120.0) == 8.0
    assert watch.epoch_seconds(120.0) == 20.0
    assert (watch.trouble, watch.troubled_at) == ("Still cannot.", 112.0)


def test_an_absence_counts_from_its_first_sight() -> None:
    watch = AbsenceWatch()
    assert watch.seconds(100.0) == 0.0
    watch.miss(100.0)
    assert watch.seconds(100.0) == 0.0
    watch.miss(110.0)
    assert watch.seconds(115.0) == 15.0


def test_an_absence_ends_when_the_thing_is_seen() -> None:
    """The next one counts from its own beginning."""
    watch = AbsenceWatch()
    watch.miss(100.0)
    watch.see()
    assert watch.seconds(110.0) == 0.0
    watch.miss(120.0)
    assert watch.seconds(125.0) == 5.0


def test_an_absence_begins_anew_in_a_new_epoch() -> None:
    """The server that misses the thing now is another one than before."""
    watch = AbsenceWatch()
    watch.miss(100.0, "first")
    watch.miss(110.0, "first")
    assert watch.seconds(115.0) == 15.0
    watch.miss(120.0, "second")
    assert watch.seconds(125.0) == 5.0
