"""A worker that starts says what is wrong around it, and nothing where nothing is."""

from __future__ import annotations

import os

import pytest

from dagster_taskiq.messages.worker_records import WorkerRecord
from dagster_taskiq.worker.start_checks import warn_of_namesakes, warn_without_init


def record(name: str) -> WorkerRecord:
    return WorkerRecord("id", name, name.partition("@")[2], 4711, ("q",))


def test_two_workers_of_one_name_on_one_host_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    """With what tells them apart in the listing; the same name on another host is no matter."""
    warn_of_namesakes("w@here", [record("w@there"), record("v@here")])
    assert not caplog.text
    warn_of_namesakes("w@here", [record("w@there"), record("w@here")])
    assert "w@here" in caplog.text
    assert "4711" in caplog.text


def test_a_worker_that_is_process_1_says_that_an_init_is_missing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any other worker has somebody who reaps what steps leave behind."""
    warn_without_init()
    assert not caplog.text
    monkeypatch.setattr(os, "getpid", lambda: 1)
    warn_without_init()
    assert "init" in caplog.text
