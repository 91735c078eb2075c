"""Every backend gives the same answers as the one in memory, whatever happens to a run's tasks.

So what a server's own language says of a task's life is compared with the functions of ``life``.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dagster_taskiq.backend import Claim
from dagster_taskiq.errors import SupersededLoopError
from dagster_taskiq.messages.attempt_ends import EndOutcome, HistoryBatch, counters_of
from dagster_taskiq.messages.results import Place
from dagster_taskiq.messages.withheld_steps import Withheld
from dagster_taskiq_tests.contract.backend_bench import (
    KINDS,
    LONG_LEASE,
    Bench,
    Kind,
    an_end,
    shared_bench,
)


class Side:
    """One of the two servers, with the views of three loops: two of one number, and a later one."""

    LOOPS = ((0, "one"), (0, "another"), (1, "later"))

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.loops = [bench.open() for _ in self.LOOPS]
        self.epochs: list[str] = []

    def begin(self, run_id: str) -> None:
        """Another example."""
        self.bench.harness.forget()
        self.bench.run_id = run_id
        self.epochs = []
        self.see()

    def see(self, epoch: str | None = None) -> int:
        """How many epochs there have been, with the present one."""
        found = epoch or self.bench.call(self.bench.backend.epoch())
        if found not in self.epochs:
            self.epochs.append(found)
        return self.epochs.index(found)

    def loop(self, which: int, what: str, is_resumable: bool) -> object:
        (generation, token), backend = self.LOOPS[which], self.loops[which]
        run_id = self.bench.run_id
        if what == "close":
            return self.bench.call(backend.close_run(run_id, token=token))
        words: dict[str, Any] = {"generation": generation, "token": token}
        words |= {"is_resumable": is_resumable, "lease_seconds": LONG_LEASE}
        if what == "renew":
            epoch = self.bench.call(backend.renew_run(run_id, **words))
            return epoch and self.see(epoch)
        try:
            return self.see(self.bench.call(backend.open_run(run_id, **words)))
        except SupersededLoopError as error:
            return str(error)

    def withhold(self, which: int, withheld: Withheld) -> bool:
        token, backend = self.LOOPS[which][1], self.loops[which]
        return self.bench.call(backend.tell_withheld(self.bench.run_id, withheld, token=token))

    def claim_of(self, worker: int, epochs_ago: int = 0, task: str = "task") -> Claim:
        name = f"w{worker}"
        epoch = self.epochs[max(0, len(self.epochs) - 1 - epochs_ago)]
        place = Place(name, name, "host", 1, 1)
        return Claim(self.bench.run_id, self.bench.run_id + task, name, LONG_LEASE, epoch, place)

    def work(self, what: str, claim: Claim) -> object:
        return self.renew(claim) if what == "renew" else getattr(self.bench, what)(claim)

    def renew(self, claim: Claim) -> object:
        renewal = self.bench.renew(claim)
        return replace(renewal, epoch=str(self.see(renewal.epoch)))

    def add_history(self, batch: HistoryBatch) -> None:
        self.bench.call(self.bench.backend.add_history(batch))

    def report(self) -> object:
        """All that can be seen of the run, its task, and what has ended."""
        claim, bench = self.claim_of(0), self.bench
        epoch, reports = bench.call(bench.backend.inspect(bench.run_id, [claim.task_id]))
        (task,) = reports.values()
        known = (self.see(epoch), task.state, task.place, task.lease_left_seconds > 0)
        listed = [
            (
                run.has_loop,
                run.is_resumable,
                {key: it.state for key, it in run.tasks.items()},
                run.withheld,
            )
            for run in bench.call(bench.backend.runs())
        ]
        renewed = self.renew(self.claim_of(0, task="no task"))
        history = bench.call(bench.backend.ended(2)), bench.call(bench.backend.counts())
        return known, listed, bench.read(claim.task_id), renewed, history


#: On each server: they take their time.
EXAMPLES = 8

WORKERS = st.integers(0, 1)


class Lockstep(RuleBasedStateMachine):
    """Whatever is done to both servers, they give the same answers and know the same."""

    sides: Sequence[Side]

    def __init__(self) -> None:
        super().__init__()
        self.opened: set[int] = set()
        self.snapshots: Sequence[Any] = ()
        self.is_back = False
        run_id = uuid.uuid4().hex
        for side in self.sides:
            side.begin(run_id)

    def both(self, call: Callable[[Side], object]) -> None:
        real, memory = [call(side) for side in self.sides]
        assert real == memory

    @initialize(is_resumable=st.booleans())
    def open(self, is_resumable: bool) -> None:
        self.loop(0, "open", is_resumable)

    @rule(
        which=st.sampled_from([0, 0, 1, 2]),
        what=st.sampled_from(["renew", "renew", "open", "close", "disown"]),
        is_resumable=st.booleans(),
    )
    def loop(self, which: int, what: str, is_resumable: bool) -> None:
        if what == "disown":
            self.both(lambda side: side.bench.disown_run())
            return
        what = what if which in self.opened else "open"
        self.both(lambda side: side.loop(which, what, is_resumable))
        self.opened = self.opened - {which} if what == "close" else self.opened | {which}

    @rule(which=st.sampled_from([0, 0, 1, 2]), count=st.integers(0, 2))
    def withhold(self, which: int, count: int) -> None:
        self.both(lambda side: side.withhold(which, Withheld(more=count)))

    @rule(
        worker=WORKERS,
        epochs_ago=st.integers(0, 1),
        needs_live_run=st.booleans(),
        until_begun=st.booleans(),
    )
    def claim(self, worker: int, epochs_ago: int, needs_live_run: bool, until_begun: bool) -> None:
        self.both(
            lambda side: side.bench.claim(
                side.claim_of(worker, epochs_ago),
                needs_live_run=needs_live_run,
                until_begun=until_begun,
            )
        )

    @rule(
        worker=WORKERS,
        epochs_ago=st.integers(0, 1),
        what=st.sampled_from(["renew", "complete", "refuse", "begin", "release", "expire"]),
    )
    def work(self, worker: int, epochs_ago: int, what: str) -> None:
        self.both(lambda side: side.work(what, side.claim_of(worker, epochs_ago)))

    @rule(what=st.sampled_from(["cancel", "condemn", "reopen", "reopen", "forget_results"]))
    def judge(self, what: str) -> None:
        self.both(lambda side: getattr(side.bench, what)(side.claim_of(0).task_id))

    @rule(number=st.integers(0, 3), outcome=st.sampled_from(EndOutcome))
    def add_history(self, number: int, outcome: EndOutcome) -> None:
        end = an_end(uuid.uuid4().hex, outcome, is_retried=number == 1)
        counts = dict.fromkeys(counters_of(end), number)
        batch = HistoryBatch([end], counts, batch_id=f"batch {number}")
        self.both(lambda side: side.add_history(batch))

    @rule(what=st.sampled_from(["forget", "restart", "remember", "go back", "loop", "collect"]))
    def server(self, what: str) -> None:
        if what == "remember":
            self.snapshots = [side.bench.harness.snapshot() for side in self.sides]
        elif what == "loop":
            self.both(lambda side: side.bench.harness.expire_loop(side.bench.run_id))
        elif what == "collect":
            self.collect()
        elif what != "go back":
            self.both(lambda side: getattr(side.bench.harness, what)())
        elif self.snapshots:
            for side, snapshot in zip(self.sides, self.snapshots, strict=True):
                side.bench.harness.restore(snapshot)
            self.is_back = True

    def collect(self) -> None:
        """What arrives; a server that has gone back may deliver again what it had, or lose it."""
        found = [(side.bench.results(0), side.bench.control("w0", 0)) for side in self.sides]
        assert self.is_back or found[0] == found[1]
        self.is_back = False

    @invariant()
    def they_know_the_same(self) -> None:
        self.both(Side.report)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "memory"])
def test_a_server_says_the_same_as_the_functions(kind: Kind) -> None:
    """Of runs and tasks, through all lives of the server."""
    with shared_bench(kind) as bench, shared_bench("memory") as memory:
        machine = type("LockstepHere", (Lockstep,), {"sides": [Side(bench), Side(memory)]})
        case = machine.TestCase  # type: ignore[attr-defined]
        case.settings = settings(
            max_examples=EXAMPLES,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        case("runTest").debug()
