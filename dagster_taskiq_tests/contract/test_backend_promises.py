"""The promises across the lives of a server: who may execute a task, whatever is forgotten.

Several workers and the loops of one run deal with several tasks, while the server is flushed,
restarted and put back to an older state, and while loops and workers come and go. The
model is no copy of the backend: it follows what workers and loops do by their own rules (a worker
starts only what it was granted and stops when it is told; a loop judges only after a lease of
watching, by the log) and checks what must come of it.

Time passes by a rule: a lease's length in which some renew and the others are dead, as their
guards see to.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from dagster_taskiq.backend import Backend, Claim, ClaimAnswer, TaskState
from dagster_taskiq_tests.contract.backend_bench import KINDS, Bench, Kind, shared_bench

TASKS = 2

#: How often at most the run is opened in one example.
LOOPS = 6

#: What becomes of a copy that is sent: it waits, is claimed at once, or is even begun.
TAKE = st.sampled_from(["wait", "claim", "start"])


@dataclass
class Log:
    """What Dagster's log says of one attempt, and what its loop has made of it.

    Attributes:
        starts: how often it was begun; more than once is what must not be.
        has_ended: whether its end is in the log.
        is_over: whether a loop has its result or has given it up.
        was_cancelled: whether a cancel said that it does not run and never will.
        starts_at_cancel: how often it had been begun then.
    """

    starts: int = 0
    has_ended: bool = False
    is_over: bool = False
    was_cancelled: bool = False
    starts_at_cancel: int = 0


@dataclass
class Loop:
    """One loop of the run, and what it believes.

    Attributes:
        epoch: the last that it was told.
        is_steady: whether it has watched that epoch for a lease.
        sent_in: the epoch in which each task was first sent, or last after a verdict.
    """

    generation: int
    token: str
    epoch: str
    is_steady: bool
    sent_in: dict[int, str] = field(default_factory=dict)

    def see(self, epoch: str) -> None:
        """Told by the backend."""
        if epoch != self.epoch:
            self.epoch, self.is_steady = epoch, False


@dataclass
class Execution:
    """A claim that was granted, as its worker sees it.

    Attributes:
        is_alive: whether worker and child live, and may begin or go on.
        has_started: whether the child has begun.
        is_told: whether it was told to stop.
    """

    number: int
    claim: Claim
    is_alive: bool = True
    has_started: bool = False
    is_told: bool = False


class Promises(RuleBasedStateMachine):
    """See the module.

    Attributes:
        speakers: the loops' own views of the server, since each knows its loop.
    """

    bench: Bench
    speakers: Sequence[Backend]

    def __init__(self) -> None:
        super().__init__()
        self.bench = type(self).bench
        self.bench.harness.forget()  # the former example
        self.bench.run_id = uuid.uuid4().hex
        self.ids = [uuid.uuid4().hex for _ in range(TASKS)]
        self.logs = [Log() for _ in self.ids]
        self.executions: list[Execution] = []
        self.messages: list[tuple[int, str]] = []
        self.loops: list[Loop] = []
        self.sent: set[int] = set()
        self.snapshot: Any = None

    # --- loops ---

    @initialize(is_resumable=st.booleans())
    def begin(self, is_resumable: bool) -> None:
        self.is_resumable = is_resumable
        self._open(0, is_steady=True)

    def _open(self, generation: int, *, is_steady: bool) -> None:
        token = f"loop-{generation}"
        self.bench.backend = self.speakers[generation]
        epoch = self.bench.open_run(
            generation=generation, token=token, is_resumable=self.is_resumable
        )
        self.loops.append(Loop(generation, token, epoch, is_steady))

    @precondition(lambda self: len(self.loops) < 4 and self.loops[-1].generation + 1 < LOOPS)
    @rule()
    def resume(self) -> None:
        """Another process takes over; the former one does not know yet, or is frozen."""
        self._open(self.loops[-1].generation + 1, is_steady=False)
        # the log says what was sent, not in which epoch
        self.loops[-1].sent_in = dict.fromkeys(self.sent, "unknown")

    @rule(which=st.integers(0, 3))
    def renew_run(self, which: int) -> None:
        """A loop that was taken over is told so, and ends; the newest one never is."""
        loop = self.loops[which % len(self.loops)]
        self.bench.backend = self.speakers[loop.generation]
        epoch = self.bench.renew_run(loop.token)
        if epoch is None:
            assert loop is not self.loops[-1], "the newest loop was refused"
            self.loops.remove(loop)
        else:
            loop.see(epoch)

    @rule(which=st.integers(0, 3), number=st.integers(0, TASKS - 1), take=TAKE)
    def send(self, which: int, number: int, take: str) -> None:
        """For the first time; or again, when nobody could say whether it had arrived."""
        loop, log = self.loops[which % len(self.loops)], self.logs[number]
        if log.is_over or log.was_cancelled:
            return
        if number not in loop.sent_in and (number in self.sent or loop is not self.loops[-1]):
            return  # the log says so; and a former loop makes no step ready that it has not sent
        self.sent.add(number)
        epoch = loop.sent_in.setdefault(number, loop.epoch)
        self._publish(number, epoch, take)

    def _publish(self, number: int, epoch: str, take: str) -> None:
        """A copy in the queue, which perhaps a worker takes at once."""
        self.messages.append((number, epoch))
        if take != "wait":
            self._claim(number, epoch)
        if take == "start":
            for execution in self._executing(number):
                self._start(execution)

    @rule(which=st.integers(0, 3), number=st.integers(0, TASKS - 1), take=TAKE)
    def judge(self, which: int, number: int, take: str) -> None:
        """By the log, and only what nobody holds after a lease of watching."""
        loop, log = self.loops[which % len(self.loops)], self.logs[number]
        if number not in loop.sent_in or log.is_over or log.was_cancelled:
            return
        task_id = self.ids[number]
        epoch, reports = self.bench.call(self.bench.backend.inspect(self.bench.run_id, [task_id]))
        loop.see(epoch)
        state = reports[task_id].state
        if state is TaskState.CLAIMED or not loop.is_steady:
            return
        if state is TaskState.DONE:
            log.is_over = True  # it fetches the result, or what the log has of it
            return
        if not log.has_ended and not log.starts and state is not TaskState.LOST:
            if state is not TaskState.CANCELLED and self.bench.reopen(task_id):
                loop.sent_in[number] = epoch
                self._publish(number, epoch, take)
            return
        if self.bench.condemn(task_id) or log.has_ended:
            log.is_over = True
            assert not self._executing(number), "given up while it was executed"

    @rule(which=st.integers(0, 3), number=st.integers(0, TASKS - 1))
    def cancel(self, which: int, number: int) -> None:
        """What is cancelled does not run and never will: the word of a server that is known."""
        loop, log = self.loops[which % len(self.loops)], self.logs[number]
        (state,) = self.bench.cancel(self.ids[number])
        loop.see(self.bench.call(self.bench.backend.inspect(self.bench.run_id, []))[0])
        if state is TaskState.CANCELLED and loop.is_steady and not log.was_cancelled:
            log.was_cancelled, log.starts_at_cancel = True, log.starts
            assert not self._executing(number), "called cancelled while it was executed"

    @rule()
    def collect(self) -> None:
        """Results arrive."""
        for task_id in self.bench.read(*self.ids):
            log = self.logs[self.ids.index(task_id)]
            assert log.has_ended
            log.is_over = True

    # --- workers ---

    @precondition(lambda self: self.messages)
    @rule(data=st.data())
    def claim(self, data: st.DataObject) -> None:
        """Of any copy that was ever sent: brokers deliver again what was acked too late."""
        self._claim(*data.draw(st.sampled_from(list(dict.fromkeys(self.messages)))))

    def _claim(self, number: int, epoch: str) -> None:
        log = self.logs[number]
        claim = replace(self.bench.new_claim(self.ids[number]), epoch=epoch)
        answer = self.bench.claim(claim)
        if answer is not ClaimAnswer.GRANTED:
            return
        assert not self._executing(number), "granted while another one holds it"
        assert not log.starts, "granted again though it had started"
        assert not log.was_cancelled, "granted after its cancel"
        assert not log.is_over, "granted after its end"
        self.executions.append(Execution(number, claim))

    def _executing(self, number: int) -> list[Execution]:
        return [it for it in self.executions if it.number == number and it.is_alive]

    @precondition(lambda self: any(it.is_alive for it in self.executions))
    @rule(data=st.data(), what=st.sampled_from(["start", "finish", "die", "renew"]))
    def work(self, data: st.DataObject, what: str) -> None:
        """Something happens to a live worker's task."""
        living = [it for it in self.executions if it.is_alive]
        execution = data.draw(st.sampled_from(living))
        getattr(self, f"_{what}")(execution)

    def _start(self, execution: Execution) -> None:
        if not execution.has_started and not execution.is_told:
            execution.has_started = True
            self.logs[execution.number].starts += 1

    def _finish(self, execution: Execution) -> None:
        """Its end is in the log before its result is stored; only a holder's is."""
        log = self.logs[execution.number]
        log.has_ended |= execution.has_started
        stored = self.bench.complete(execution.claim)
        execution.is_alive = False
        if stored:
            log.has_ended = True
            assert not self._executing(execution.number)

    def _die(self, execution: Execution) -> None:
        """Its claim stays until its lease ends."""
        execution.is_alive = False

    def _renew(self, execution: Execution) -> None:
        renewal = self.bench.renew(execution.claim)
        if not renewal.is_held:
            execution.is_alive = False
        elif renewal.cancel_order is not None:
            execution.is_told = True

    # --- time and the server ---

    @rule(renewing=st.integers(0, 7))
    def a_lease_passes(self, renewing: int) -> None:
        """Some workers renew; the others' guards kill, and then their claims end."""
        for position, execution in enumerate(it for it in self.executions if it.is_alive):
            if renewing >> (position % 3) & 1:
                self._renew(execution)
            else:
                execution.is_alive = False
        alive = [it.claim.place for it in self.executions if it.is_alive]
        _, reports = self.bench.call(self.bench.backend.inspect(self.bench.run_id, self.ids))
        for task_id, report in reports.items():
            if report.place and report.place not in alive:
                self.bench.expire(self.bench.new_claim(task_id))
        for loop in list(self.loops):
            loop.is_steady = True  # unless it is told otherwise
            self.renew_run(self.loops.index(loop))

    @rule()
    def the_loops_lease_ends(self) -> None:
        """No step is granted until it is back."""
        self.bench.harness.expire_loop(self.bench.run_id)
        for number, epoch in dict.fromkeys(self.messages):
            claim = replace(self.bench.new_claim(self.ids[number]), epoch=epoch)
            assert self.bench.claim(claim) is not ClaimAnswer.GRANTED

    @rule()
    def remember(self) -> None:
        """The server writes a snapshot."""
        self.snapshot = self.bench.harness.snapshot()

    @rule(how=st.sampled_from(["flush", "restart", "go back"]), who=st.integers(0, 4))
    def a_new_life(self, how: str, who: int) -> None:
        """The server is emptied, or restarts with its data, or with older data."""
        harness = self.bench.harness
        if how == "restart":
            harness.restart()
        elif how == "go back" and self.snapshot is not None:
            harness.restore(self.snapshot)
        else:
            harness.forget()
        if who < 4:
            self.renew_run(who)

    # --- what must hold ---

    @invariant()
    def at_most_one_executes(self) -> None:
        for number, log in enumerate(self.logs):
            assert len(self._executing(number)) <= 1
            assert log.starts <= 1, "an attempt was executed twice"

    @invariant()
    def what_was_cancelled_does_not_start(self) -> None:
        for log in self.logs:
            assert not log.was_cancelled or log.starts == log.starts_at_cancel


#: How many examples there are: on a server they take their time.
EXAMPLES: Mapping[Kind, int] = {"memory": 100, "redis": 10, "valkey": 10, "postgres": 10}


@pytest.mark.parametrize("kind", KINDS)
def test_promises_hold_across_the_servers_lives(kind: Kind) -> None:
    """An attempt is granted to one worker at a time and started once, whatever is forgotten."""
    with shared_bench(kind) as bench:
        speakers = [bench.open() for _ in range(LOOPS)]
        parts = {"bench": bench, "speakers": speakers}
        machine = type("PromisesOnThisServer", (Promises,), parts)
        case = machine.TestCase  # type: ignore[attr-defined]
        case.settings = settings(
            max_examples=EXAMPLES[kind],
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        case("runTest").debug()
