"""The envelope: it survives the way, and whatever is no task of ours is refused."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dagster_taskiq.defaults import LONGEST_SECONDS, LONGEST_TIME_LIMIT_SECONDS, MIN_LEASE_SECONDS
from dagster_taskiq.errors import MalformedTaskError, TooLargeError, UntrustedError
from dagster_taskiq.messages.envelope import (
    PROTOCOL,
    Envelope,
    QueueKind,
    TaskName,
    physical_queue,
    run_task_id,
    step_task_id,
)
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.messages.time_limits import TimeLimits
from dagster_taskiq_tests.messages import STEP_TASK

pytestmark = pytest.mark.once

UNSIGNED, KEY = Signer(), Signer(["k" * 32])

# Python's JSON turns lone surrogates into themselves, but no server takes them
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)

#: What a sender says of itself: an address is shown, so it is plain.
ORIGIN = st.fixed_dictionaries({}) | st.fixed_dictionaries(
    {
        "state": st.just("") | TEXT,
        "backend": st.text(st.characters(codec="ascii", exclude_categories=["C"])),
        "sent_at": st.floats(0, 2**53),
    }
)

LIMIT = st.none() | st.floats(0, LONGEST_TIME_LIMIT_SECONDS)


@st.composite
def envelopes(draw: st.DrawFn) -> Envelope:
    name = draw(st.sampled_from(TaskName))
    is_step = name is TaskName.EXECUTE_PLAN
    return Envelope(
        task_id=str(draw(st.uuids())),
        name=name,
        run_id=draw(TEXT),
        step_key=draw(TEXT) if is_step else None,
        attempt=draw(st.integers(1 if is_step else 0, 2**31)),
        queue=draw(TEXT),
        priority=draw(st.integers(0, 10)),
        lease_seconds=draw(st.floats(MIN_LEASE_SECONDS, LONGEST_SECONDS)),
        cancel_grace_seconds=draw(st.floats(0, LONGEST_SECONDS)),
        epoch=draw(TEXT),
        payload=draw(TEXT),
        limits=TimeLimits(draw(LIMIT), draw(LIMIT)),
        code_location=draw(st.just("") | TEXT),
        job=draw(st.text(st.characters(codec="ascii", exclude_categories=["C"]), max_size=255)),
        **draw(ORIGIN),
    )


TASK_ID = "5f0e7c52-51e6-4b34-8f0b-0a63a7b8a8d1"

ENVELOPE = replace(STEP_TASK, task_id=TASK_ID, queue="q", payload='{"a": 1}', state="s")


def raw(envelope: Envelope, signer: Signer = UNSIGNED) -> bytes:
    """The bytes that a broker carries."""
    queue = physical_queue("p", envelope.kind, envelope.queue)
    return envelope.to_message(queue, signer).message


def with_header(header: Any, payload: str = "{}") -> bytes:
    """The bytes of a task with any header."""
    return f"{json.dumps(header)}\n{payload}".encode()


def refuse(message: Any) -> str:
    data = message if isinstance(message, bytes) else json.dumps(message).encode()
    with pytest.raises(MalformedTaskError) as caught:
        Envelope.from_bytes(data, UNSIGNED)
    return str(caught.value)


@given(envelopes())
def test_an_envelope_survives_the_way(envelope: Envelope) -> None:
    """What a worker reads is what was sent, whatever is in its texts and payload."""
    assert Envelope.from_bytes(raw(envelope), UNSIGNED) == envelope


@given(envelopes(), st.data())
def test_a_truncated_header_is_refused(envelope: Envelope, data: st.DataObject) -> None:
    """A part of it is never taken for one; a payload is checked by its child."""
    whole = raw(envelope)
    refuse(whole[: data.draw(st.integers(0, whole.index(b"\n")))])


@given(st.binary())
def test_garbage_is_refused(data: bytes) -> None:
    """No bytes raise anything else."""
    refuse(data)


@given(JSON)
def test_other_json_is_refused(value: Any) -> None:
    """JSON that is no message raises nothing else either."""
    refuse(value)


def test_deep_nesting_is_refused() -> None:
    """JSON that is too deep to read does not end the worker's receiver."""
    refuse(b"[" * 100_000)
    refuse(b'{"a":' * 10_000 + b"\n{}")


def test_only_the_header_is_parsed() -> None:
    """The payload is for a child process; a header of any size would hold up the renewals."""
    odd = replace(ENVELOPE, payload='{"a":' * 100_000)
    assert Envelope.from_bytes(raw(odd), UNSIGNED) == odd
    refuse(with_header({**ENVELOPE.header(), "more": [{}] * 50_000}))


def test_texts_are_strict_utf_8() -> None:
    """In header and payload; nothing guesses another encoding."""
    refuse(raw(ENVELOPE)[:-1] + b"\xff")
    refuse(raw(ENVELOPE).replace(b'"step"', b'"\xff\xfe"'))
    refuse(raw(ENVELOPE).decode().encode("utf-16"))
    refuse(b"\xef\xbb\xbf" + raw(ENVELOPE))


def test_a_task_that_is_too_large_is_not_sent() -> None:
    """The error names the step, the size and the setting."""
    large = replace(ENVELOPE, payload="x" * 2000)
    expected = r"^Step step of run run, attempt 1 cannot be sent: it has 2,\d+ bytes.*_bytes allows"
    with pytest.raises(TooLargeError, match=expected):
        raw(large, Signer(max_bytes=1000))
    with pytest.raises(TooLargeError):
        Envelope.from_bytes(raw(large), Signer(max_bytes=1000))


@given(st.data())
def test_a_header_with_any_other_value_never_raises_anything_else(data: st.DataObject) -> None:
    """Whatever stands in one field, the message is read or refused."""
    header = ENVELOPE.header()
    field = data.draw(st.sampled_from(sorted(header)))
    numbers = st.floats() | st.integers() | st.just(10**400)
    header[field] = data.draw(JSON | numbers | st.text(st.characters(categories=["Cs"])))
    try:
        envelope = Envelope.from_bytes(with_header(header), UNSIGNED)
    except MalformedTaskError:
        return
    assert Envelope.from_bytes(raw(envelope), UNSIGNED) == envelope


WRONG: Mapping[str, tuple[Any, ...]] = {
    "task_id": ("", "no-uuid", None, 5, ["x"]),
    "name": ("", "execute_everything", None, 5, []),
    "run_id": ("", None, 5, {}, "\ud800"),
    "step_key": ("", None, 5, [], "\udfff"),
    "attempt": (0, -1, 1.0, "1", None, True, 2**31 + 1, float("nan")),
    "queue": ("", None, 5, "\ud800"),
    "priority": (-1, 11, 5.0, "5", None, False),
    "lease_seconds": (0, 0.5, -1, float("nan"), float("inf"), 10**400, "30", None, 86401, True),
    "cancel_grace_seconds": (-0.1, float("nan"), float("inf"), 10**400, "1", None, 86401),
    "epoch": ("", None, 5, "\ud800"),
    "limits": (
        None,
        {},
        [],
        {"soft_seconds": 1},
        *(
            {"soft_seconds": value, "hard_seconds": None}
            for value in (-1, "5", float("nan"), float("inf"), 2e9, True)
        ),
        {"soft_seconds": None, "hard_seconds": None, "more": 1},
    ),
    "code_location": (None, 5, [], "\ud800"),
    "state": (5, [], "\ud800"),
    "backend": (None, 5, [], "\ud800"),
    "sent_at": (-1, "1", None, [], True, float("nan"), 10**400),
    "job": (None, 5, [], "\ud800"),
    "protocol": (0, -1, 1.5, "1", None, [], True),
}

#: What a sender of an older version does not say.
NEW = {"state", "job"}


def test_the_table_here_has_every_field() -> None:
    """A new field of the header comes with wrong values here."""
    assert set(WRONG) == set(ENVELOPE.header())


@pytest.mark.parametrize(("field", "value"), [(f, value) for f in WRONG for value in WRONG[f]])
def test_a_wrong_field_is_refused(field: str, value: Any) -> None:
    """Each field of the header is checked for its type and range."""
    refuse(with_header({**ENVELOPE.header(), field: value}))


@pytest.mark.parametrize("field", sorted(set(WRONG) - NEW))
def test_a_missing_field_is_refused(field: str) -> None:
    """No field of the header has a default, but for what a sender need not say."""
    header = ENVELOPE.header()
    del header[field]
    refuse(with_header(header))


def test_another_protocol_is_told_from_garbage() -> None:
    """Its number is read first: nothing else in such a header need be what it is here."""
    header = {"protocol": 99, "a field of a later version": 1}
    with pytest.raises(
        MalformedTaskError, match=f"of protocol 99, and this queue is of {PROTOCOL}"
    ):
        Envelope.from_bytes(with_header(header), UNSIGNED)


def test_taskiqs_own_message_is_refused() -> None:
    """Such as one that somebody has sent with a Taskiq broker, with labels that change it."""
    labels = {"ack_type": "bogus", "timeout": "abc"}
    kwargs = {"header": ENVELOPE.header(), "payload": ENVELOPE.payload}
    refuse({"task_id": TASK_ID, "task_name": "x", "labels": labels, "args": [], "kwargs": kwargs})


def test_celerys_message_is_refused() -> None:
    """A message of Celery's protocol in a queue of the same name is no task of ours."""
    refuse([[], {"execute_step_args_packed": {}}, {"callbacks": None}])


@given(TEXT, TEXT, st.integers(1, 99), TEXT, TEXT, st.integers(1, 99))
def test_task_ids_tell_attempts_apart(
    run: str, step: str, attempt: int, run2: str, step2: str, attempt2: int
) -> None:
    """The same attempt has the same id wherever it is computed, any other one another."""
    same = (run, step, attempt) == (run2, step2, attempt2)
    # a NUL is the separator; Dagster's run ids and step keys have none
    if "\0" not in run + step + run2 + step2:
        one, other = step_task_id(run, step, attempt), step_task_id(run2, step2, attempt2)
        assert (one == other) == same
        assert uuid.UUID(one).version == 5


def test_task_ids_are_stable() -> None:
    """Ids are part of the protocol: a worker of another version computes the same."""
    assert step_task_id("run", "step", 1) == "88a7157e-40dd-524a-bc32-2858337e4273"
    assert run_task_id("run", 0) == "8857cb72-e2ee-594f-b26a-f2f2c6c1a6d6"


def test_task_ids_tell_runs_and_resumed_runs_apart() -> None:
    """Each resumption is a task of its own, and no run is a step."""
    ids = [run_task_id("run", 0), run_task_id("run", 1), step_task_id("run", "", 1)]
    assert len(set(ids)) == 3


@given(TEXT, TEXT)
def test_runs_and_steps_wait_in_different_queues(prefix: str, queue: str) -> None:
    """So that runs never starve their steps; the prefix keeps Celery's queues apart."""
    steps = physical_queue(prefix, QueueKind.STEPS, queue)
    assert steps != physical_queue(prefix, QueueKind.RUNS, queue)
    assert steps.startswith(prefix)


@given(TEXT, TEXT, st.sampled_from(QueueKind), st.integers(1, 9), st.integers(1, 9))
def test_tasks_of_each_protocol_wait_in_queues_of_their_own(
    prefix: str, queue: str, kind: QueueKind, one: int, other: int
) -> None:
    """So a worker never takes what only a worker of another version can execute."""
    first = physical_queue(prefix, kind, queue, one)
    assert (first == physical_queue(prefix, kind, queue, other)) == (one == other)
    assert first.startswith(prefix)


def test_the_first_protocol_keeps_its_names() -> None:
    """Workers that were started before there was a second one go on with what waits there."""
    assert physical_queue("p", QueueKind.STEPS, "q", 1) == "p.steps.q"
    assert physical_queue("p", QueueKind.RUNS, "q", 2) == "p.runs-2.q"


def test_the_kind_follows_from_the_name() -> None:
    """Steps wait among steps, runs and resumed runs among runs."""
    assert ENVELOPE.kind is QueueKind.STEPS
    run = Envelope.from_header({**ENVELOPE.header(), "name": "execute_job", "attempt": 0}, "{}")
    assert run.kind is QueueKind.RUNS
    assert run.step_key is None


@given(envelopes())
def test_a_signed_envelope_survives_the_way(envelope: Envelope) -> None:
    """With the key, and without one, which ignores the signature."""
    for reader in (KEY, UNSIGNED):
        assert Envelope.from_bytes(raw(envelope, KEY), reader) == envelope


@given(envelopes(), st.data())
def test_no_part_of_a_signed_task_can_be_changed(envelope: Envelope, data: st.DataObject) -> None:
    """Neither what its header says nor anything in the payload."""
    sealed = raw(envelope, KEY)
    index = data.draw(st.integers(0, len(sealed) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda new: new != sealed[index]))
    with pytest.raises(UntrustedError):
        Envelope.from_bytes(sealed[:index] + bytes([byte]) + sealed[index + 1 :], KEY)


@pytest.mark.parametrize("signer", [UNSIGNED, Signer(["o" * 32])])
def test_a_task_without_our_signature_is_refused(signer: Signer) -> None:
    """Unsigned, or signed with another key; the error says which."""
    expected = "another signing_key" if signer.is_active else "it is not signed"
    with pytest.raises(UntrustedError, match=expected):
        Envelope.from_bytes(raw(ENVELOPE, signer), KEY)
