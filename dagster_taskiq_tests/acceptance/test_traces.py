"""A trace through real processes, from the run to the span that a step's own code makes."""

from __future__ import annotations

import json
from typing import Any

from dagster_taskiq_tests.acceptance.harness import Stack

Line = dict[str, Any]

#: Not imported here: it sets the provider of the process that imports it.
JOBS = "dagster_taskiq_tests.acceptance.trace_jobs"


def test_one_trace_through_all_processes(shared: Stack) -> None:
    """Also of an attempt that is retried; each process has exported what it had."""
    run = shared.run(f"{JOBS}:traced")
    assert run.is_success
    spans = read_spans(shared)
    assert len({span["trace"] for span in spans}) == 1
    (of_run,) = named(spans, "run traced")
    assert (of_run["parent"], of_run["status"]) == (None, "OK")
    first, second = named(spans, "step flaky")
    assert [span["parent"] for span in (first, second)] == [of_run["id"]] * 2
    assert first["status"] == "ERROR"
    assert first["reason"] == "ValueError: the first one"
    assert first["attributes"]["dagster_taskiq.is_retried"]
    assert second["status"] == "OK"
    for name in ("submit dagster", "queue dagster", "execute flaky"):
        assert [span["parent"] for span in named(spans, name)] == [first["id"], second["id"]]
    executed, own = named(spans, "execute flaky"), named(spans, "own work")
    assert [span["parent"] for span in own] == [span["id"] for span in executed]
    assert [span["status"] for span in executed] == ["ERROR", "OK"]
    # the order of things, by the clock of one host
    for attempt, waited, execution in zip(
        (first, second), named(spans, "queue dagster"), executed, strict=True
    ):
        assert attempt["start"] <= waited["start"] <= waited["end"] <= execution["start"]
        assert execution["end"] <= attempt["end"] <= of_run["end"]
    in_run = {span["pid"] for span in (of_run, first, second)}
    in_children = {span["pid"] for span in (*executed, *own)}
    assert len(in_run) == 1
    assert not in_run & in_children


def read_spans(stack: Stack) -> list[Line]:
    """Those of all processes."""
    text = (stack.directory / "spans").read_text(encoding="utf8")
    return [json.loads(line) for line in text.splitlines()]


def named(spans: list[Line], name: str) -> list[Line]:
    """In the order in which they began."""
    return sorted((span for span in spans if span["name"] == name), key=lambda it: it["start"])
