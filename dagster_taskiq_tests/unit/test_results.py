"""Results travel as JSON, and what is none is said to be none."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dagster_taskiq.errors import MalformedResultError
from dagster_taskiq.messages.refusals import Refusals
from dagster_taskiq.messages.results import NOWHERE, Outcome, Place, TaskResult, read_result
from dagster_taskiq.messages.signing import Signer

pytestmark = pytest.mark.once

PLACE = Place("w@h", "id", "h", 7, 1)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)

NAMES = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=100)

RESULTS = st.builds(
    TaskResult,
    outcome=st.sampled_from(Outcome),
    place=st.builds(Place, NAMES, st.text(), NAMES, st.integers(), st.integers()),
    events=st.lists(st.text()).map(tuple),
    error=st.none() | st.dictionaries(st.text(), JSON),
    reason=NAMES,
    exit_code=st.none() | st.integers(),
    is_cancelled=st.booleans(),
    started_at=st.none() | st.floats(allow_nan=False, allow_infinity=False),
)

KEY = Signer(["k" * 32])


@given(RESULTS)
def test_a_result_survives_the_way(result: TaskResult) -> None:
    """What is read is what was written, whatever is in its texts."""
    assert TaskResult.from_bytes(result.to_bytes()) == result


@given(RESULTS, st.data())
@example(TaskResult(Outcome.FINISHED, NOWHERE, events=("",)), None)
def test_a_truncated_result_is_malformed(result: TaskResult, data: st.DataObject | None) -> None:
    """A part of a result is never taken for one."""
    whole = result.to_bytes()
    part = whole[: data.draw(st.integers(0, len(whole) - 1)) if data else -1]
    with pytest.raises(MalformedResultError):
        TaskResult.from_bytes(part)


@given(st.binary())
def test_garbage_is_malformed(data: bytes) -> None:
    """No bytes raise anything else."""
    with pytest.raises(MalformedResultError):
        TaskResult.from_bytes(data)


@given(JSON)
def test_other_json_is_malformed(value: Any) -> None:
    """JSON that is no result raises nothing else either."""
    with pytest.raises(MalformedResultError):
        TaskResult.from_bytes(json.dumps(value).encode())


@pytest.mark.parametrize(
    "change",
    [
        {"outcome": "unheard-of"},
        {"outcome": None},
        {"outcome": []},
        {"place": None},
        {"place": {}},
        {"place": {"worker": "w"}},
        {"place": []},
        {"events": None},
        {"events": 5},
        {"events": [5]},
        {"events": [-1]},
        {"events": [0.0]},
        {"events": [True]},
        {"events": ["x"]},
        {"events": [10**30]},
        {"error": "text"},
        {"reason": 5},
        {"place": {**vars(PLACE), "worker": {}}},
        {"place": {**vars(PLACE), "pid": "x"}},
        {"error": []},
        {"more": 1},
    ],
    ids=str,
)
def test_fields_of_the_wrong_kind_are_malformed(change: dict[str, Any]) -> None:
    """A result of another version, or of somebody else."""
    values = {**json.loads(TaskResult(Outcome.FINISHED, PLACE).to_bytes()), **change}
    with pytest.raises(MalformedResultError):
        TaskResult.from_bytes(json.dumps(values).encode())


def test_texts_are_strict_utf_8() -> None:
    """In the head and in the events; nothing guesses another encoding."""
    whole = TaskResult(Outcome.FINISHED, PLACE, events=("aé",)).to_bytes()
    assert TaskResult.from_bytes(whole).events == ("aé",)
    for data in (whole.replace("é".encode(), b"\xff\xff"), whole[:-3].decode().encode("utf-16")):
        with pytest.raises(MalformedResultError):
            TaskResult.from_bytes(data)


def test_a_huge_error_is_shortened() -> None:
    """The head of a result is parsed beside the renewal of leases, so it is never large."""
    error = {"message": "m" * 20_000, "stack": ["s" * 2**20] * 5}
    result = TaskResult.from_bytes(TaskResult(Outcome.ERROR, PLACE, error=error).to_bytes())
    assert result.error is None
    assert result.reason.startswith("m" * 10_000)
    assert "Shortened" in result.reason


def test_a_large_result_is_read_at_once() -> None:
    """Its events are cut out, not parsed: the thread that reads it renews a lease, too."""
    event = "[" + "{}," * 2**20 + "{}]"
    data = TaskResult(Outcome.FINISHED, PLACE, events=(event,) * 10).to_bytes(KEY, "task")
    began = time.perf_counter()
    result = TaskResult.from_bytes(data, KEY, "task")
    seconds = time.perf_counter() - began
    began = time.perf_counter()
    json.loads(event)
    assert seconds < 10 * (time.perf_counter() - began)
    assert result.events == (event,) * 10


def test_deep_nesting_is_malformed() -> None:
    """JSON that is too deep to read does not end the reader."""
    with pytest.raises(MalformedResultError):
        TaskResult.from_bytes(b"[" * 100_000)


@pytest.mark.parametrize("field", ["outcome", "place", "events"])
def test_a_missing_field_is_malformed(field: str) -> None:
    """The fields without a default must be there."""
    values = json.loads(TaskResult(Outcome.FINISHED, PLACE).to_bytes())
    del values[field]
    with pytest.raises(MalformedResultError):
        TaskResult.from_bytes(json.dumps(values).encode())


@given(RESULTS)
def test_a_signed_result_survives_the_way(result: TaskResult) -> None:
    """With the key, and without one, which ignores the signature."""
    data = result.to_bytes(KEY, "task")
    for reader in (KEY, Signer()):
        refusals = Refusals("here")
        assert read_result(reader, "task", data, refusals) == result
        assert refusals.count == 0


@pytest.mark.parametrize(
    ("signer", "task_id", "reason"),
    [
        (Signer(), "task", "it is not signed"),
        (Signer(["o" * 32]), "task", "another signing_key"),
        (KEY, "other", "something else"),
    ],
)
def test_a_result_of_another_key_or_task_is_refused(
    signer: Signer, task_id: str, reason: str
) -> None:
    """It becomes a death that says so, since then Dagster's log has what came of the task."""
    refusals = Refusals("here")
    data = TaskResult(Outcome.FINISHED, PLACE).to_bytes(signer, task_id)
    result = read_result(KEY, "task", data, refusals)
    assert result.outcome is Outcome.DIED
    assert result.place is NOWHERE
    assert reason in result.reason
    assert refusals.count == 1


def test_what_is_no_result_is_a_death_too() -> None:
    """With a key or without."""
    for signer in (KEY, Signer()):
        for data in (b"", b"[]", b"null", b"7", b"{" * 100_000):
            assert read_result(signer, "task", data, Refusals("here")).outcome is Outcome.DIED
