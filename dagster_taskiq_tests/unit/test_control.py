"""Orders to workers: a worker believes each one once, in time, and only its own."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dagster_taskiq.defaults import CONTROL_AGE_SECONDS
from dagster_taskiq.errors import UntrustedError
from dagster_taskiq.messages.control import (
    OrderReader,
    cancel_order,
    refuses,
    worker_order,
)
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.messages.worker_records import WorkerRecord

pytestmark = pytest.mark.once

KEY, OTHER = Signer(["k" * 32]), Signer(["o" * 32])

W = WorkerRecord("w", "w@h", "h", 1, ("q",))


#: No bytes of a JSON object, which a worker without a key reads as an order, of an unknown kind.
GARBAGE = st.one_of(
    st.binary().filter(lambda data: not data.strip().startswith(b"{")),
    st.recursive(st.none() | st.text() | st.integers(), st.lists).map(json.dumps),
)


class Clock:
    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


def test_an_order_is_obeyed_once() -> None:
    """A second copy is a replay."""
    reader = OrderReader(KEY, "w", "w@h")
    order = worker_order(KEY, W, "terminate")
    assert reader.read(order)["kind"] == "terminate"
    with pytest.raises(UntrustedError, match="replay"):
        reader.read(order)
    assert reader.read(worker_order(KEY, W, "terminate"))["kind"] == "terminate"


@pytest.mark.parametrize("offset", [-1, 1])
def test_an_old_order_is_refused(offset: int) -> None:
    """Also one from the future, which could be kept for later: clocks may differ a little."""
    clock = Clock()
    reader = OrderReader(KEY, "w", "w@h", clock)
    old, new = worker_order(KEY, W, "terminate"), worker_order(KEY, W, "terminate")
    clock.now += offset * (CONTROL_AGE_SECONDS - 5)
    assert reader.read(new)
    clock.now += offset * 10
    with pytest.raises(UntrustedError, match="clock"):
        reader.read(old)


@pytest.mark.parametrize("signer", [KEY, Signer()])
@pytest.mark.parametrize(("worker_id", "name"), [("other", "w@h"), ("w", "other@h")])
def test_an_order_is_for_one_worker(signer: Signer, worker_id: str, name: str) -> None:
    """It stops nobody else, copied into another mailbox or sent there by a record that lies."""
    reader = OrderReader(signer, worker_id, name)
    with pytest.raises(UntrustedError, match="for worker 'w@h' with the id 'w'"):
        reader.read(worker_order(signer, W, "terminate"))


def test_an_order_does_not_count_again_when_the_clock_goes_back() -> None:
    """However long after it: it is remembered by its number, not by its age."""
    clock = Clock()
    reader = OrderReader(KEY, "w", "w@h", clock)
    began = clock.now
    order = worker_order(KEY, W, "terminate")
    reader.read(order)
    clock.now += 3 * CONTROL_AGE_SECONDS
    with pytest.raises(UntrustedError, match="clock"):
        reader.read(order)
    clock.now = began
    with pytest.raises(UntrustedError, match="replay"):
        reader.read(order)


def test_a_cancel_is_for_one_task() -> None:
    """In whichever mailbox, and in the record of the run as often as it is found."""
    reader = OrderReader(KEY, "w", "w@h")
    order = cancel_order(KEY, "task", "enough")
    for _ in range(2):
        reader.check_cancel("task", order)
    with pytest.raises(UntrustedError):
        reader.check_cancel("other", order)
    assert reader.read(order)["task_id"] == "task"
    changed = order.replace('"task"', '"other"')
    with pytest.raises(UntrustedError):
        reader.read(changed)
    with pytest.raises(UntrustedError):
        reader.check_cancel("w", worker_order(KEY, W, "terminate"))


@pytest.mark.parametrize("sender", [OTHER, Signer()])
def test_another_key_or_none_orders_nothing(sender: Signer) -> None:
    """By either way."""
    reader = OrderReader(KEY, "w", "w@h")
    with pytest.raises(UntrustedError):
        reader.read(worker_order(sender, W, "terminate"))
    with pytest.raises(UntrustedError):
        reader.check_cancel("task", cancel_order(sender, "task", ""))


@given(GARBAGE)
def test_garbage_is_refused(data: Any) -> None:
    """It never raises anything else, with a key or without: the worker must go on."""
    for signer in (KEY, Signer()):
        with pytest.raises(UntrustedError):
            OrderReader(signer, "w", "w@h").read(data)
    with pytest.raises(UntrustedError):
        OrderReader(KEY, "w", "w@h").check_cancel("task", data)


def test_deep_nesting_is_refused() -> None:
    """Nor does what is too deep to read."""
    with pytest.raises(UntrustedError):
        OrderReader(KEY, "w", "w@h").read(b'{"a":' * 100_000)


def test_without_a_key_every_order_counts() -> None:
    """Signed or not, as often as it comes."""
    reader = OrderReader(Signer(), "w", "w@h")
    for sender in (KEY, Signer()):
        order = worker_order(sender, W, "terminate")
        assert [reader.read(order)["kind"] for _ in range(2)] == ["terminate"] * 2
    reader.check_cancel("task", "enough")


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 3 * CONTROL_AGE_SECONDS))))
def test_no_order_is_ever_obeyed_twice(deliveries: list[tuple[int, float]]) -> None:
    """Whenever its copies come: it is remembered for as long as its time would let it through."""
    clock = Clock()
    reader = OrderReader(KEY, "w", "w@h", clock)
    orders = [worker_order(KEY, W, "terminate") for _ in range(6)]
    obeyed: list[int] = []
    start = clock.now
    for number, after in sorted(deliveries, key=lambda it: it[1]):
        clock.now = start + after
        try:
            reader.read(orders[number])
        except UntrustedError:
            continue
        obeyed.append(number)
        assert after <= CONTROL_AGE_SECONDS + 1
    assert len(obeyed) == len(set(obeyed))


def worker(name: str, signer: Signer, *queues: str) -> WorkerRecord:
    return WorkerRecord(name, name, "host", 1, queues, slots=1, key_ids=signer.key_ids)


def test_who_refuses_what_is_said_in_words() -> None:
    """Which worker, why, and what to set."""
    keyed = worker("a@h", KEY, "q")
    assert refuses(KEY, keyed) == refuses(KEY, worker("b@h", Signer())) == ""
    assert refuses(Signer(), keyed) == (
        "worker a@h refuses it, since it is not signed. Set the same 'signing_key' or "
        "DAGSTER_TASKIQ_SIGNING_KEY on both sides."
    )
    assert "another signing_key" in refuses(OTHER, keyed)
