"""The ends of attempts as they are stored: whose they are, and that a bad one affects no other."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dagster_taskiq.defaults import HISTORY_EXPIRES_SECONDS
from dagster_taskiq.messages.attempt_ends import (
    AttemptEnd,
    Counted,
    Counter,
    EndGroup,
    EndOutcome,
    counters_of,
    readable_counts,
    readable_ends,
    write_counter,
    write_end,
)
from dagster_taskiq.messages.envelope import QueueKind
from dagster_taskiq.messages.signing import Purpose, Signer

pytestmark = pytest.mark.once

KEY, OTHER, NONE = Signer(["k" * 32]), Signer(["o" * 32]), Signer()

#: When a test reads.
NOW = 1_700_000_000.0

END = AttemptEnd(
    "task",
    "run",
    "step",
    2,
    "queue",
    EndOutcome.LOST,
    NOW - 1,
    is_retried=True,
    job="job",
    worker="w@h",
    host="h",
    slot=0,
    sent_at=NOW - 3,
    started_at=NOW - 2.5,
    reason="It is gone.",
)
SHORT = AttemptEnd("short", "run", "", 0, "queue", EndOutcome.SUCCEEDED, NOW)


def read(data: bytes, signer: Signer = NONE) -> list[AttemptEnd]:
    return readable_ends(signer, [data], NOW)


def changed(**values: Any) -> bytes:
    """The unsigned end with other values."""
    return json.dumps({**json.loads(write_end(NONE, END)), **values}).encode()


@pytest.mark.parametrize("end", [END, SHORT], ids=["whole", "short"])
def test_an_end_is_believed_with_the_key_only(end: AttemptEnd) -> None:
    for writer in (KEY, OTHER, NONE):
        data = write_end(writer, end)
        assert read(data) == [end]
        assert read(data, KEY) == ([end] if writer is KEY else [])


def test_what_was_signed_for_something_else_is_no_end() -> None:
    data = KEY.seal(Purpose.WORKER, "", write_end(NONE, END))
    assert read(data, KEY) == []


def test_what_another_version_adds_or_leaves_out_does_no_harm() -> None:
    short = json.loads(write_end(NONE, SHORT))
    known = {key: it for key, it in short.items() if key not in ("job", "slot", "is_retried")}
    assert read(json.dumps({**known, "new": [1]}).encode()) == [SHORT]
    del known["run_id"]
    assert read(json.dumps(known).encode()) == []


@pytest.mark.parametrize(
    "values",
    [
        {"task_id": 1},
        {"outcome": "exploded"},
        {"outcome": []},
        {"slot": -1},
        {"slot": True},
        {"attempt": 2**60},
        {"ended_at": None},
        {"ended_at": float("nan")},
        {"started_at": "noon"},
        {"is_retried": 1},
        {"reason": ["a"]},
        {"step_key": "x" * 20_000},
    ],
    ids=str,
)
def test_what_is_no_end_is_left_out(values: dict[str, Any]) -> None:
    good = write_end(NONE, SHORT)
    assert readable_ends(NONE, [changed(**values), good, b"\xff"], NOW) == [SHORT]


def test_texts_are_safe_to_show_and_capped() -> None:
    """Whoever wrote them; and what we write is never too long to be read."""
    (end,) = read(changed(worker="w\x1b[2J", reason="a\n\n  b\u202e " + "x" * 900))
    assert end.worker == "w\ufffd[2J"
    assert end.reason.startswith("a b\ufffd xxx")
    assert len(end.reason) == 500
    long = replace(END, step_key="ä" * 5000, job="\N{SNAKE}" * 5000, reason="ü " * 9000)
    (end,) = read(write_end(NONE, long))
    assert len(end.step_key) == 255


@given(st.text(), st.text(), st.text())
def test_every_end_can_be_read(step_key: str, worker: str, reason: str) -> None:
    (end,) = read(write_end(NONE, replace(END, step_key=step_key, worker=worker, reason=reason)))
    assert (end.kind, end.outcome) == ("steps" if step_key else "runs", END.outcome)
    assert read(write_end(NONE, end)) == [end]


def test_ends_are_in_order_and_come_once() -> None:
    """The newest first, and of two copies of one that was added before the first one."""
    ends = [replace(END, task_id=str(n), ended_at=NOW - n) for n in (2, 0, 1)]
    stored = [write_end(NONE, end) for end in (*ends, ends[0])]
    assert [end.task_id for end in readable_ends(NONE, stored, NOW)] == ["0", "1", "2"]


@pytest.mark.parametrize("ago", [HISTORY_EXPIRES_SECONDS, -3600], ids=["old", "of the future"])
def test_no_end_is_shown_for_longer_than_it_is_kept(ago: float) -> None:
    """Somebody may have put it back."""
    for late, is_read in ((0, True), (1 if ago > 0 else -1, False)):
        assert bool(read(changed(ended_at=NOW - ago - late))) is is_read


def test_groups_and_counters() -> None:
    """What is tried again is kept apart, and counts as failed or lost all the same."""
    known = {
        (EndOutcome.SUCCEEDED, False): (EndGroup.SUCCEEDED, [Counted.SUCCEEDED]),
        (EndOutcome.CANCELLED, False): (EndGroup.CANCELLED, [Counted.CANCELLED]),
        (EndOutcome.FAILED, False): (EndGroup.FAILED, [Counted.FAILED]),
        (EndOutcome.FAILED, True): (EndGroup.RETRIED, [Counted.FAILED, Counted.RETRIED]),
        (EndOutcome.LOST, False): (EndGroup.FAILED, [Counted.LOST]),
        (EndOutcome.LOST, True): (EndGroup.RETRIED, [Counted.LOST, Counted.RETRIED]),
    }
    for (outcome, is_retried), (group, events) in known.items():
        end = replace(END, outcome=outcome, is_retried=is_retried)
        assert end.group is group
        assert counters_of(end) == [Counter("queue", "steps", event) for event in events]


def test_kinds_are_those_of_queues() -> None:
    assert [END.kind, SHORT.kind] == [kind.value for kind in QueueKind]


def test_counters_are_read_as_they_were_written() -> None:
    counters = [Counter('ä "', "steps", Counted.SENT), Counter("b", "runs", Counted.LOST)]
    stored = {write_counter(counter): number for number, counter in enumerate(counters)}
    assert readable_counts(stored) == {counters[0]: 0, counters[1]: 1}


@pytest.mark.parametrize(
    "name",
    [
        "",
        "{",
        "1",
        "[]",
        '["q", "steps"]',
        '["q", "cakes", "sent"]',
        '["q", "steps", "x"]',
        "[1, 2, 3]",
        "[" * 1500,
        '[["q"], "steps", "sent"]',
        '["q", ["steps"], "sent"]',
    ],
)
def test_what_is_no_counter_is_left_out(name: str) -> None:
    assert readable_counts({name: 1}) == {}
    assert readable_counts({write_counter(Counter("q", "steps", Counted.SENT)): -1}) == {}
