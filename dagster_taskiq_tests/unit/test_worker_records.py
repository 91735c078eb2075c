"""Workers' records: whose they are, and that a bad one affects nothing but itself."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dagster_taskiq.messages.signing import Purpose, Signer
from dagster_taskiq.messages.worker_records import (
    MAX_RECORD_AGE_SECONDS,
    MAX_RUNNING,
    RunningTask,
    WorkerRecord,
    read_record,
    readable_records,
    readable_running,
    write_record,
    write_running,
)

KEY, OTHER, NONE = Signer(["k" * 32]), Signer(["o" * 32]), Signer()

#: When a test reads, unless it says otherwise.
NOW = 1_700_000_000.0

RECORD = WorkerRecord(
    "id", "w@h", "h", 7, ("a", "b"), slots=2, started_at=1.5, broker="redis://h", sent_at=NOW
)


TASK = RunningTask("t", "run", "step", 1, "a", 1.5)


def changed(**values: Any) -> bytes:
    """The unsigned record with other values."""
    return json.dumps({**asdict(RECORD), **values}).encode()


def test_a_record_is_trusted_with_the_key_only() -> None:
    """Without one all are; what is not signed as it must be can still be shown."""
    for writer in (KEY, OTHER, NONE):
        data = write_record(writer, RECORD)
        assert read_record(NONE, "id", data, NOW) == RECORD
        assert read_record(KEY, "id", data, NOW) == replace(RECORD, is_trusted=writer is KEY)


def test_no_record_says_of_itself_that_it_is_trusted() -> None:
    assert not read_record(KEY, "id", changed(is_trusted=True), NOW).is_trusted


@pytest.mark.parametrize("direction", [1, -1], ids=["old", "of the future"])
def test_a_signed_record_is_trusted_for_some_minutes(direction: int) -> None:
    """Somebody may keep that of a dead worker; clocks may differ. Without a key no time counts."""
    data = write_record(KEY, RECORD)
    now = NOW + direction * MAX_RECORD_AGE_SECONDS
    assert read_record(KEY, "id", data, now) == RECORD
    outdated = replace(RECORD, is_trusted=False, is_outdated=True)
    assert read_record(KEY, "id", data, now + direction) == outdated
    assert read_record(NONE, "id", data, now + direction) == RECORD
    unsigned = read_record(KEY, "id", changed(), now + direction)
    assert unsigned == replace(RECORD, is_trusted=False)


def test_a_signed_record_without_a_time_is_not_trusted() -> None:
    values = {key: value for key, value in asdict(RECORD).items() if key != "sent_at"}
    data = KEY.seal(Purpose.WORKER, "id", json.dumps(values).encode())
    assert read_record(KEY, "id", data, NOW).is_outdated


def test_a_record_is_of_one_worker() -> None:
    """Copied to the key of another one, or with another id in it, it is none."""
    for signer in (KEY, NONE):
        with pytest.raises(ValueError, match="of another worker, 'id'"):
            read_record(signer, "other", write_record(signer, RECORD), NOW)


def test_texts_of_a_record_can_be_shown() -> None:
    """No escape sequence, no line break, nothing without end, whatever the writer put there."""
    odd = "a\x1b[2J\r\nb\u202e\x9b" + "x" * 10_000
    for field in ("name", "host", "state", "version", "broker", "python", "dagster", "storage"):
        text = getattr(read_record(KEY, "id", changed(**{field: odd}), NOW), field)
        assert text.isprintable()
        assert len(text) <= 255
    (queue,) = read_record(KEY, "id", changed(queues=[odd]), NOW).queues
    assert queue.isprintable()
    assert len(read_record(KEY, "id", changed(queues=["q"] * 9999), NOW).queues) <= 1000


def test_what_workers_execute_is_told() -> None:
    """At most so much of it, safe to show, and only what is signed by the worker that it is of."""
    tasks = [RunningTask(f"t{n}", "run", "step", 1, "a", 1.5) for n in range(MAX_RUNNING + 1)]
    odd = [replace(tasks[0], step_key="a\x1b[2J" + "\N{SNOWMAN}" * 9999)]
    stored = {
        "one": write_running(KEY, "one", tasks),
        "odd": write_running(KEY, "odd", odd),
        "forged": write_running(OTHER, "forged", tasks),
        "another's": write_running(KEY, "one", tasks),
        "a record": write_record(KEY, replace(RECORD, worker_id="a record")),
    }
    *told, shown = readable_running(KEY, stored)
    assert told == tasks[:MAX_RUNNING]
    assert shown.step_key.isprintable()
    assert len(shown.step_key) <= 255


@pytest.mark.parametrize(
    "value", ["q", None, [1], {}, [{}], [{"task_id": "t"}], [{**asdict(TASK), "attempt": "1"}]]
)
def test_what_names_no_tasks_is_left_out(value: object) -> None:
    stored = {"bad": json.dumps({"running": value}).encode(), "none": b"\xff", "list": b"[]"}
    assert readable_running(NONE, {**stored, "good": write_running(NONE, "good", [TASK])}) == [TASK]


def test_another_version_may_have_other_fields() -> None:
    """More of them, or fewer of those with a default."""
    values = {key: value for key, value in asdict(RECORD).items() if key != "protocol"}
    data = json.dumps({**values, "of tomorrow": [1]}).encode()
    assert read_record(NONE, "id", data, NOW).name == "w@h"
    old = {key: asdict(RECORD)[key] for key in ("worker_id", "name", "host", "pid", "queues")}
    read = read_record(NONE, "id", json.dumps(old).encode(), NOW)
    assert (read.done, read.memory_bytes, read.storage, read.dagster) == (0, 0, "", "")


def test_a_record_that_cannot_be_read_keeps_no_other_from_being_seen() -> None:
    """Who asks is told of it."""
    second = replace(RECORD, worker_id="other", name="a@h")
    stored = {
        "id": write_record(NONE, RECORD),
        "bad": b"[]",
        "other": write_record(NONE, second),
    }
    noted: list[str] = []
    found = readable_records(NONE, stored, lambda worker_id, _: noted.append(worker_id))
    assert (found, noted) == ([second, RECORD], ["bad"])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"\xff",
        b"{}",
        b"[" * 100_000,
        b" " * 100_000,
        *(changed(**{field: bad}) for field in ("name", "host", "state") for bad in (None, 5, [])),
        *(changed(**{field: bad}) for field in ("pid", "slots") for bad in ("1", None, -1, True)),
        *(changed(queues=bad) for bad in ("q", None, [1], {})),
        *(
            changed(**{field: bad})
            for field in ("started_at", "sent_at")
            for bad in ("1", None, float("nan"), 10**400)
        ),
    ],
    ids=lambda data: data[:20].decode(errors="replace"),
)
def test_what_is_no_record_is_refused(data: bytes) -> None:
    """With one kind of error, so that its reader shows the others."""
    for signer in (KEY, NONE):
        with pytest.raises(ValueError, match="it"):
            read_record(signer, "id", data, NOW)


@given(st.binary())
def test_garbage_is_refused(data: bytes) -> None:
    """No bytes raise anything else."""
    with pytest.raises(ValueError, match="it"):
        read_record(KEY, "id", data, NOW)
