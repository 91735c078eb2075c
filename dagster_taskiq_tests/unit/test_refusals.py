"""Refusals: all are counted, and a flood of them does not fill the log."""

from __future__ import annotations

import logging

import pytest

from dagster_taskiq.errors import MalformedTaskError, UntrustedError
from dagster_taskiq.messages.refusals import Refusals


def test_a_flood_is_counted_and_logged_a_few_times(caplog: pytest.LogCaptureFixture) -> None:
    """The first of each kind is said at once, with its reason."""
    refusals = Refusals("redis://host")
    with caplog.at_level(logging.ERROR):
        for number in range(1234):
            refusals.note("a message", UntrustedError(f"reason {number}"))
        refusals.note("a message", MalformedTaskError("another reason"))
    assert refusals.count == 1235
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "Refused a message from redis://host: reason 0."
    assert lines[-2].endswith("reason 999. (1000 of this kind so far)")
    assert lines[-1] == "Refused a message from redis://host: another reason."
    assert len(lines) == 5
