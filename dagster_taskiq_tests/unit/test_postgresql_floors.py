"""Looks that begin at floors miss nothing, but for a short time what was given back.

The queue is a model of the one in ``brokers/postgresql_functions.sql``, with a clock of its own.
"""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from dagster_taskiq.brokers import postgresql_floors
from dagster_taskiq.brokers.postgresql_floors import Floors, Row
from dagster_taskiq.defaults import MAX_PRIORITY

pytestmark = pytest.mark.once

T = TypeVar("T")

PRIORITIES = st.sampled_from([0, 5, 10])
SECONDS = st.sampled_from([0.0, 0.1, 0.3, 0.6, 3.0, 11.0])

#: A message: queue, priority, number.
Message = tuple[str, int, int]

QUEUES = ("a", "b")


def now(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of what waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]
    raise AssertionError("it waits")


class Server:
    """The queues, whoever sends to them, and looks from the front or from floors."""

    def __init__(self) -> None:
        self.seconds = 100.0
        self.looked_seconds = 1.0
        self.waiting: set[Message] = set()
        self.being_sent: list[Message] = []
        self.looks = 0
        self._number = 1

    def worker(self) -> Floors:
        """A worker that has just found that a look from the front takes long."""
        worker = Floors(self._find, lambda: self.seconds)
        worker.looked(self.looked_seconds)
        return worker

    async def _find(
        self, queues: Sequence[str], floors: Sequence[Row] | None
    ) -> tuple[Sequence[Row], float]:
        self.looks += 1
        rows = []
        for place, queue in enumerate(queues):
            row = []
            for priority in range(MAX_PRIORITY + 1):
                least = floors[place][priority] if floors else 0
                numbers = [it[2] for it in self.waiting if it[:2] == (queue, priority)]
                row.append(min((it for it in numbers if it >= least), default=self._number - 1))
            rows.append(row)
        return rows, self.looked_seconds

    def begin_to_send(self, queue: str = "a", priority: int = 5) -> Message:
        """A message has its number, and nobody sees it yet."""
        message = (queue, priority, self._number)
        self._number += 1
        self.being_sent.append(message)
        return message

    def commit(self, message: Message) -> None:
        """It is there."""
        self.being_sent.remove(message)
        self.waiting.add(message)

    def send(self, queue: str = "a", priority: int = 5) -> Message:
        message = self.begin_to_send(queue, priority)
        self.commit(message)
        return message

    def best(self, messages: set[Message], floors: Sequence[Row] | None = None) -> Message | None:
        """The first of the first queue that has one."""
        for place, queue in enumerate(QUEUES):
            rows = [
                it
                for it in messages
                if it[0] == queue and (not floors or it[2] >= floors[place][it[1]])
            ]
            if rows:
                return max(rows, key=lambda it: (it[1], -it[2]))
        return None

    def take(self, worker: Floors) -> Message | None:
        floors = now(worker.of(QUEUES))
        if floors is None:
            worker.looked(self.looked_seconds)
        taken = self.best(self.waiting, floors)
        self.waiting -= {taken}
        return taken


class Lives(RuleBasedStateMachine):
    """Messages are sent, in no time or in some, taken by two workers, and given back."""

    def __init__(self) -> None:
        super().__init__()
        self.server = Server()
        self.workers = [self.server.worker() for _ in range(2)]
        self.sent_at: dict[Message, float] = {}
        self.in_hand: list[tuple[Message, Floors]] = []
        self.given_back_at: dict[Message, float] = {}

    @rule(queue=st.sampled_from(QUEUES), priority=PRIORITIES, at_once=st.booleans())
    def send(self, queue: str, priority: int, at_once: bool) -> None:
        message = self.server.begin_to_send(queue, priority)
        self.sent_at[message] = self.server.seconds
        if at_once:
            self.server.commit(message)

    @precondition(lambda self: self.server.being_sent)
    @rule(which=st.integers(0, 9))
    def commit(self, which: int) -> None:
        self.server.commit(self.server.being_sent[which % len(self.server.being_sent)])

    @rule(seconds=SECONDS)
    def wait(self, seconds: float) -> None:
        """No sending takes as long as floors stay."""
        self.server.seconds += seconds
        for message in list(self.server.being_sent):
            if self.server.seconds - self.sent_at[message] >= postgresql_floors._RAISE_SECONDS:
                self.server.commit(message)

    @rule(which=st.integers(0, 1))
    def take(self, which: int) -> None:
        """Never a worse one than the best of those that nobody has given back lately."""
        old = self.server.seconds - postgresql_floors._LONGEST_SECONDS
        sure = {it for it in self.server.waiting if self.given_back_at.get(it, 0.0) < old}
        taken, best = self.server.take(self.workers[which]), self.server.best(sure)
        if best is not None:
            assert taken is not None
            assert self.server.best({taken, best}) == taken
        if taken is not None:
            self.in_hand.append((taken, self.workers[which]))

    @precondition(lambda self: self.in_hand)
    @rule(which=st.integers(0, 9))
    def ack(self, which: int) -> None:
        self.in_hand.pop(which % len(self.in_hand))

    @precondition(lambda self: self.in_hand)
    @rule(which=st.integers(0, 9), is_dead=st.booleans())
    def give_back(self, which: int, is_dead: bool) -> None:
        """By the worker itself, which finds it again at once, or as it has died."""
        message, worker = self.in_hand.pop(which % len(self.in_hand))
        self.server.waiting.add(message)
        self.given_back_at[message] = self.server.seconds
        if not is_dead:
            worker.doubt()
            floors = now(worker.of(QUEUES))
            assert self.server.best({message}, floors) == message

    @rule(seconds=st.sampled_from([0.001, 0.02, 1.0]))
    def load(self, seconds: float) -> None:
        """A look from the front takes so long from now on."""
        self.server.looked_seconds = seconds


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@pytest.fixture
def server() -> Server:
    return Server()


def raised(server: Server) -> Floors:
    """A worker whose floors are above all messages that are not there any more."""
    worker = server.worker()
    for _ in range(3):
        assert server.take(worker) is None
        server.seconds += 0.6
    return worker


def test_a_quick_look_from_the_front_needs_no_floors(server: Server) -> None:
    server.looked_seconds = 0.001
    assert now(server.worker().of(QUEUES)) is None


def test_floors_go_when_looks_from_the_front_are_quick_again(server: Server) -> None:
    """As after a vacuum."""
    worker = raised(server)
    assert now(worker.of(QUEUES)) is not None
    server.looked_seconds = 0.001
    server.seconds += postgresql_floors._LONGEST_SECONDS
    assert now(worker.of(QUEUES)) is None


def test_what_a_dead_worker_had_is_found_by_the_next_look_from_the_front(server: Server) -> None:
    """Floors are raised in between, from the last ones on."""
    worker, message = server.worker(), server.send()
    assert server.take(worker) == message
    for _ in range(4):
        server.seconds += 0.6
        server.send()
        assert server.take(worker) is not None
    server.waiting.add(message)
    missed = 0
    while server.take(worker) is None:
        missed += 1
        server.seconds += 0.6
    assert 0 < missed * 0.6 <= postgresql_floors._LONGEST_SECONDS


def test_what_is_being_sent_is_not_passed_over(server: Server) -> None:
    """A look sees only what was sent after it; it raises floors to what the one before has seen."""
    worker = raised(server)
    early, late = server.begin_to_send(), server.send()
    assert server.take(worker) == late
    server.commit(early)
    assert server.take(worker) == early


@pytest.mark.parametrize("before", [0.05, 0.6])
@pytest.mark.parametrize("pauses", [(0.0, 0.0), (0.1, 0.39), (0.4, 0.05)])
def test_looks_that_follow_each_other_pass_over_nothing(
    server: Server, before: float, pauses: Sequence[float]
) -> None:
    """Where something was given back, the next look comes at once; a message is sent for longer."""
    worker = raised(server)
    server.send()
    assert server.take(worker) is not None
    server.seconds += before
    early = server.begin_to_send()
    for pause in pauses:
        server.send()
        worker.doubt()
        assert server.take(worker) is not None
        server.seconds += pause
    server.send()
    assert server.take(worker) is not None
    server.commit(early)
    assert server.take(worker) == early


def test_floors_are_not_looked_for_with_each_take(server: Server) -> None:
    worker = raised(server)
    looks = []
    for _ in range(20):
        before = server.looks
        server.take(worker)
        looks.append(server.looks - before)
        server.seconds += 0.1
    assert set(looks) == {0, 1}
    assert sum(looks) <= 5
