"""``IndexedExecution`` beside Dagster's ``ActiveExecution``, on random plans, in lockstep.

Both are asked and told the same, in an order in which a loop might, and after each call all that
they keep is the same: also the order of the steps, which decides what is executed first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any, cast
from unittest.mock import patch

import pytest
from dagster import (
    DagsterEvent,
    DagsterEventType,
    DynamicOut,
    Failure,
    In,
    Nothing,
    OpDefinition,
    Out,
    job,
)
from dagster._core.definitions.job_base import InMemoryJob
from dagster._core.execution.plan import active as active_module
from dagster._core.execution.plan.objects import (
    ErrorSource,
    StepFailureData,
    StepRetryData,
    StepSuccessData,
)
from dagster._core.execution.plan.outputs import StepOutputData, StepOutputHandle
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dagster_taskiq._dagster.indexed_execution import IndexedExecution
from dagster_taskiq._dagster.names import (
    ActiveExecution,
    ExecutionPlan,
    ExecutionStep,
    InstanceConcurrencyContext,
    RetryMode,
    create_execution_plan,
    plain_error,
)
from dagster_taskiq._dagster.replay import put_in_flight


@dataclass(frozen=True)
class Node:
    """One op of a random job.

    Attributes:
        kind: ``value``, ``optional`` (two outputs, of which any may be there), ``dynamic`` (with an
            op that collects), ``mapped`` (the same, with a chain of two ops mapped between) or
            ``maybe`` (as mapped, with a dynamic output that is not required).
        upstream: numbers that choose among the values there are so far.
        as_list: whether they come as one fan-in, or each by itself.
        only_order: whether it reads nothing of them.
        pool: of Dagster; empty for none.
        tag: the value of the tag by which steps are limited.
        priority: higher first.
    """

    kind: str
    upstream: tuple[int, ...] = ()
    as_list: bool = False
    only_order: bool = False
    pool: str = ""
    tag: str = "a"
    priority: int = 0


NODES = st.builds(
    Node,
    kind=st.sampled_from(["value", "value", "value", "optional", "dynamic", "mapped", "maybe"]),
    upstream=st.lists(st.integers(0, 99), max_size=4).map(tuple),
    as_list=st.booleans(),
    only_order=st.sampled_from([False, False, True]),
    pool=st.sampled_from(["", "", "p", "q"]),
    tag=st.sampled_from(["a", "b"]),
    priority=st.integers(-1, 1),
)


@dataclass(frozen=True)
class Limits:
    """How a run is limited; the names are those of ``ActiveExecution``."""

    max_concurrent: int | None = None
    per_tag: int | None = None
    pool_slots: int = 1
    retry_mode: RetryMode = RetryMode.ENABLED


LIMITS = st.builds(
    Limits,
    max_concurrent=st.sampled_from([None, None, 1, 2]),
    per_tag=st.sampled_from([None, None, 1]),
    pool_slots=st.integers(1, 3),
    retry_mode=st.sampled_from([RetryMode.ENABLED, RetryMode.ENABLED, RetryMode.DEFERRED]),
)


def never(_context, _inputs: dict[str, Any]) -> Iterator[Any]:  # type: ignore[no-untyped-def]
    """What an op does here: nothing is executed."""
    raise AssertionError
    yield


def op_of(name: str, node: Node, inputs: int, outs: dict[str, Any]) -> OpDefinition:
    kind = In(Nothing) if node.only_order else In()
    return OpDefinition(
        compute_fn=never,
        name=name,
        ins={f"in{index}": kind for index in range(inputs)},
        outs=outs,
        tags={"kind": node.tag, "dagster/priority": str(node.priority)},
        pool=node.pool or None,
    )


def compose(nodes: list[Node]) -> None:
    """The graph of the ops."""
    values: list[Any] = []
    for number, node in enumerate(nodes):
        chosen = [values[index % len(values)] for index in node.upstream if values]
        chosen = list({id(value): value for value in chosen}.values())
        arguments = [chosen] if node.as_list and chosen else chosen
        outs: dict[str, Any] = {"result": Out()}
        if node.kind == "optional":
            outs = {"yes": Out(is_required=False), "no": Out(is_required=False)}
        elif node.kind != "value":
            outs = {"result": DynamicOut(is_required=node.kind != "maybe")}
        outputs = op_of(f"op{number}", node, len(arguments), outs)(*arguments)
        if node.kind == "optional":
            values += [outputs.yes, outputs.no]
        elif node.kind == "value":
            values.append(outputs)
        else:
            plain = {"result": Out()}
            mapped = outputs
            for step in range(0 if node.kind == "dynamic" else 2):
                mapped = mapped.map(op_of(f"map{number}_{step}", node, 1, plain))
            values.append(op_of(f"collect{number}", node, 1, plain)(mapped.collect()))


class Pools:
    """Stands in for Dagster's pools: so many slots each, without a database."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._held: dict[str, str] = {}
        self._pending: dict[str, None] = {}

    def claim(self, pool: str, step_key: str, _priority: int = 0) -> bool:
        if list(self._held.values()).count(pool) >= self._slots:
            self._pending[step_key] = None
            return False
        self._pending.pop(step_key, None)
        self._held[step_key] = pool
        return True

    def free_step(self, step_key: str) -> None:
        self._held.pop(step_key, None)

    def pending_claim_steps(self) -> list[str]:
        return list(self._pending)

    def has_pending_claims(self) -> bool:
        return bool(self._pending)


#: All that says where the steps of a run are.
STATE = [
    "_pending",
    "_executable",
    "_pending_skip",
    "_pending_retry",
    "_pending_abandon",
    "_waiting_to_retry",
    "_in_flight",
    "_success",
    "_failed",
    "_skipped",
    "_abandoned",
    "_skipped_deps",
    "_step_outputs",
    "_gathering_dynamic_outputs",
    "_completed_dynamic_outputs",
    "_new_dynamic_mappings",
    "_unknown_state",
]


def state_of(active: ActiveExecution) -> dict[str, Any]:
    found = {name: getattr(active, name) for name in STATE}
    ordered = {name: list(it.items()) for name, it in found.items() if isinstance(it, dict)}
    known = active.get_known_state()
    return {**found, **ordered, "is_complete": active.is_complete, "known": known}


@dataclass
class Pair:
    """Dagster's own and ours, which are told the same and say the same."""

    own: ActiveExecution
    ours: IndexedExecution
    log: list[str] = field(default_factory=list)

    def both(self, name: str, call: Callable[[ActiveExecution], Any]) -> Any:
        self.log.append(name)
        expected, found = call(self.own), call(self.ours)
        assert found == expected, self.log
        assert state_of(self.ours) == state_of(self.own), self.log
        if not self.own._new_dynamic_mappings:  # which the next update looks for among all steps
            assert self._due() == self._would_be_due(), self.log
        return found

    def _due(self) -> list[str]:
        """The steps that the next update looks at."""
        assert self.ours._due is not None
        return self.ours._due.in_order()

    def _would_be_due(self) -> list[str]:
        """Those that Dagster would find among all that wait, each once."""
        own = self.own
        ended = own._success | own._skipped | own._failed | own._abandoned
        return [key for key, dependencies in own._pending.items() if dependencies <= ended]

    def keys(self, name: str) -> list[str]:
        """What a method that returns steps returns, as keys."""
        return cast(
            "list[str]",
            self.both(name, lambda it: [step.key for step in getattr(it, name)()]),
        )

    def told(self, step_key: str, kind: DagsterEventType, data: Any) -> None:
        def tell(active: ActiveExecution) -> None:
            step = active.get_step_by_key(step_key)
            active.handle_event(
                DagsterEvent(
                    kind.value, "random_job", step_handle=step.handle, event_specific_data=data
                )
            )

        self.both(f"{step_key} {kind.value}", tell)


def outputs_of(step: ExecutionStep, chance: Random) -> Iterator[StepOutputHandle]:
    """Some outputs of a step that succeeds."""
    for output in step.step_outputs:
        if output.is_dynamic:
            count = chance.choice([0, 1, 3])
            keys = chance.sample(["x", "y", "z"], count)
            yield from (StepOutputHandle(step.key, output.name, key) for key in keys)
        elif output.is_required or chance.random() < 0.5:
            yield StepOutputHandle(step.key, output.name)


def end_one(pair: Pair, chance: Random, may_retry: bool) -> None:
    """One step that is under way ends somehow."""
    key = chance.choice(sorted(pair.own._in_flight))
    error = plain_error("no", "Failure")
    word = chance.choices(["success", "failure", "again", "later", "unknown"], [8, 1, 1, 1, 0.3])[0]
    if word == "success":
        for handle in outputs_of(pair.own.get_step_by_key(key), chance):
            pair.told(key, DagsterEventType.STEP_OUTPUT, StepOutputData(handle))
        pair.told(key, DagsterEventType.STEP_SUCCESS, StepSuccessData(1.0))
    elif word == "unknown":
        pair.both(f"{key} unknown", lambda it: it.mark_unknown_state(key))
        pair.both(f"free {key}", lambda it: it._instance_concurrency_context.free_step(key))
    elif word == "failure" or not may_retry:
        data = StepFailureData(error, None, ErrorSource.USER_CODE_ERROR)
        pair.told(key, DagsterEventType.STEP_FAILURE, data)
    else:
        seconds = 5.0 if word == "later" else None
        retry = StepRetryData(error, seconds)
        pair.told(key, DagsterEventType.STEP_UP_FOR_RETRY, retry)


def go(pair: Pair, chance: Random, clock: list[float]) -> None:
    """Rounds in which steps become ready and end, until there is nothing left to do."""
    retries = 12
    for _ in range(200):
        for key in pair.keys("get_steps_to_skip"):
            pair.both(f"skip {key}", lambda it, key=key: it.mark_skipped(key))
        for key in pair.keys("get_steps_to_abandon"):
            pair.both(f"abandon {key}", lambda it, key=key: it.mark_abandoned(key))
        ready = [it for it in pair.own._executable if not pair.own.get_step_by_key(it).pool]
        if ready and chance.random() < 0.1:  # as a run that is resumed
            key = chance.choice(ready)
            pair.both(f"replay {key}", lambda it, key=key: put_in_flight(it, key))
        pair.keys("get_steps_to_execute")
        for _ in range(chance.choice([1, 1, 2])):
            if pair.own._in_flight:
                end_one(pair, chance, may_retry=retries > 0)
                retries -= 1
        clock[0] += chance.choice([0.0, 0.0, 3.0])
        is_waiting = pair.own._waiting_to_retry or pair.own._in_flight
        if pair.both("complete", lambda it: it.is_complete) and not (
            pair.own._new_dynamic_mappings or is_waiting
        ):
            return
    raise AssertionError("the run never ends")


def execution(kind: type[ActiveExecution], plan: ExecutionPlan, limits: Limits) -> ActiveExecution:
    per_tag = {"key": "kind", "value": {"applyLimitPerUniqueValue": True}, "limit": limits.per_tag}
    return kind(
        plan,
        retry_mode=limits.retry_mode,
        sort_key_fn=lambda step: -int(step.tags["dagster/priority"]),
        max_concurrent=limits.max_concurrent,
        tag_concurrency_limits=[per_tag] if limits.per_tag else [],
        instance_concurrency_context=cast("InstanceConcurrencyContext", Pools(limits.pool_slots)),
    )


EVERYTHING = [
    Node("optional", priority=1),
    Node("value", pool="p"),
    Node("mapped", (2,)),
    Node("dynamic", (0, 1), as_list=True, tag="b"),
    Node("value", (1, 2, 3), as_list=True, pool="p"),
    Node("maybe", (0, 2, 3), only_order=True),
    Node("value", (4, 5), priority=-1),
    Node("value", (0, 5, 6)),
]


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@example(EVERYTHING, Limits(), Random(1), 0)
@example(EVERYTHING, Limits(max_concurrent=2, per_tag=1), Random(2), 0)
@example(EVERYTHING, Limits(retry_mode=RetryMode.DEFERRED), Random(3), 3)
@given(
    st.lists(NODES, min_size=1, max_size=9),
    LIMITS,
    st.randoms(use_true_random=False),
    st.sampled_from([0, 0, 1, 3]),
)
def test_both_say_the_same(
    nodes: list[Node], limits: Limits, chance: Random, left_out: int
) -> None:
    """Of random plans, of which the first steps may be left out, until every step has ended."""
    in_memory = InMemoryJob(job(name="random_job")(lambda: compose(nodes)))
    # what dynamic outputs have become would be known of an earlier run
    plain = [f"op{it}" for it, node in enumerate(nodes) if node.kind in ("value", "optional")]
    every = create_execution_plan(in_memory, {}).step_keys_to_execute
    selected = [key for key in every if key not in plain[:left_out]]

    def plan() -> ExecutionPlan:
        return create_execution_plan(in_memory, {}, step_keys_to_execute=selected or None)

    clock = [1000.0]
    with patch.object(active_module.time, "time", lambda: clock[0]):
        own = execution(ActiveExecution, plan(), limits)
        ours = cast("IndexedExecution", execution(IndexedExecution, plan(), limits))
        own._context_guard = ours._context_guard = True
        go(Pair(own, ours), chance, clock)


@pytest.mark.parametrize("length", [30, 120])
def test_what_an_update_looks_at_does_not_grow_with_a_chain(length: int) -> None:
    nodes = [Node("value", (number - 1,) if number else ()) for number in range(length)]
    plan = create_execution_plan(InMemoryJob(job(name="chain")(lambda: compose(nodes))), {})
    with execution(IndexedExecution, plan, Limits()) as active:
        looked_at: list[int] = []
        update = ActiveExecution._update

        def counted(self: ActiveExecution) -> None:
            ended = self._success | self._skipped | self._failed | self._abandoned
            looked_at.append(len(self._pending) + len(ended))
            update(self)

        with patch.object(ActiveExecution, "_update", counted):
            while not active.is_complete:
                active.get_steps_to_skip()
                active.get_steps_to_abandon()
                for step in active.get_steps_to_execute():
                    active.mark_step_produced_output(StepOutputHandle(step.key, "result"))
                    active.mark_success(step.key)
    assert looked_at == [2] * (length - 1)


def test_a_failed_update_loses_no_step() -> None:
    """What Dagster raises while it decides leaves the state as it was."""
    nodes = [Node("value"), Node("value", (0,))]
    plan = create_execution_plan(InMemoryJob(job(name="two")(lambda: compose(nodes))), {})
    with execution(IndexedExecution, plan, Limits()) as active:
        (step,) = active.get_steps_to_execute()
        active.mark_step_produced_output(StepOutputHandle(step.key, "result"))
        active.mark_success(step.key)
        with (
            patch.object(ActiveExecution, "_should_skip_step", side_effect=Failure("no")),
            pytest.raises(Failure),
        ):
            active.get_steps_to_execute()
        assert active._success == {"op0"}
        (step,) = active.get_steps_to_execute()
        active.mark_success(step.key)
    assert step.key == "op1"
