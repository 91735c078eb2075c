"""How long servers that are away or refuse are borne, with a clock that only the test moves."""

from __future__ import annotations

import pytest

from dagster_taskiq.errors import RefusedByServerError, UnreachableServerError
from dagster_taskiq.servers.patience import Patience

AWAY = UnreachableServerError("redis://one", "Cannot reach redis://one.")
OTHER = UnreachableServerError("redis://two", "Cannot reach redis://two.")
REFUSED = RefusedByServerError("redis://one", "redis://one refuses the credentials.")
FINAL = RefusedByServerError("redis://one", "redis://one refused a command.", is_final=True)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_begins_waits_for_a_server_that_is_away_for_the_time_that_is_set() -> None:
    clock = Clock()
    patience = Patience(300, now=clock)
    assert patience.note("open", AWAY)  # which is news once
    clock.now = 299
    assert not patience.note("open", AWAY)
    clock.now = 300
    with pytest.raises(UnreachableServerError, match=r"stayed so for 300 s \(server_patience"):
        patience.note("open", AWAY)


def test_no_patience_is_to_fail_at_once_with_the_servers_own_words() -> None:
    with pytest.raises(UnreachableServerError) as caught:
        Patience(0).note("open", AWAY)
    assert caught.value is AWAY


def test_what_begins_bears_no_refusal() -> None:
    """It is most likely a mistake, which its author wants to see now."""
    with pytest.raises(RefusedByServerError):
        Patience(300).note("open", REFUSED)


def test_what_has_worked_bears_absence_without_end_and_a_refusal_for_the_time_that_is_set() -> None:
    clock = Clock()
    patience = Patience(300, now=clock)
    patience.worked("open")
    assert patience.note("send", AWAY)
    clock.now = 10_000
    assert not patience.note("send", AWAY)
    patience.worked("send")
    assert patience.note("send", REFUSED)
    clock.now = 10_299
    assert not patience.note("send", REFUSED)
    clock.now = 10_300
    with pytest.raises(RefusedByServerError, match="stayed so"):
        patience.note("send", REFUSED)


def test_a_final_refusal_is_never_borne() -> None:
    with pytest.raises(RefusedByServerError) as caught:
        Patience(300, has_worked=True).note("send", FINAL)
    assert caught.value is FINAL


def test_an_outage_is_news_once_for_each_server_until_what_failed_works() -> None:
    """A backend that answers does not end the outage of the broker, nor is that told again."""
    patience = Patience(300, has_worked=True)
    assert patience.note("send", AWAY)
    assert patience.note("look", OTHER)
    patience.worked("look")
    assert patience.is_waiting
    assert not patience.note("send", AWAY)
    assert not patience.note("look", AWAY)
    patience.worked("send")
    assert not patience.is_waiting
    assert patience.note("send", AWAY)
