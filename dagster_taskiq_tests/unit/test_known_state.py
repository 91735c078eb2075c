"""What is cut out for one step, of the known state and of the plan, gives it the same as the whole.

A missing part is silent: a fan-in gets [1] instead of [1, 2] and succeeds. So random plans with
fan-in, optional outputs, dynamic map and collect, and retries are executed step by step, each
step once with the whole state by a plan that Dagster builds for it, and once with the cut state by
the plan that is taken out of the whole one. What it sees and what it logs is compared.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast
from unittest.mock import patch

import pytest
from dagster import (
    DagsterEvent,
    DagsterInstance,
    DagsterRun,
    DynamicOut,
    DynamicOutput,
    In,
    IOManager,
    IOManagerDefinition,
    JobDefinition,
    OpDefinition,
    Out,
    Output,
    RetryRequested,
    job,
)
from dagster._core.definitions.job_base import InMemoryJob
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dagster_taskiq._dagster.names import (
    ActiveExecution,
    ExecutionPlan,
    ExecutionStep,
    KnownExecutionState,
    RetryMode,
    create_execution_plan,
    execute_plan_iterator,
    pack_value,
    unpack_value,
)
from dagster_taskiq._dagster.replay import cut_known_state
from dagster_taskiq.execution.step_plans import RunPlan


@dataclass(frozen=True)
class Node:
    """One op of a random plan.

    Attributes:
        kind: ``value``, ``optional`` (of two outputs, one or none is there), ``dynamic`` or
            ``mapped`` (a dynamic op, an op mapped over it, and one that collects).
        upstream: numbers that choose among the values there are so far.
        as_list: whether they come as one fan-in, or each by itself.
        retries: how often it asks for a retry before it does its work.
        size: how many dynamic outputs there are, or which optional one is.
    """

    kind: str
    upstream: tuple[int, ...]
    as_list: bool
    retries: int
    size: int


NODES = st.builds(
    Node,
    kind=st.sampled_from(["value", "value", "optional", "dynamic", "mapped"]),
    upstream=st.lists(st.integers(0, 99), max_size=3).map(tuple),
    as_list=st.booleans(),
    retries=st.sampled_from([0, 0, 0, 1, 2]),
    size=st.integers(0, 3),
)


class Memory(IOManager):
    """Keeps values in this process."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], Any] = {}

    def handle_output(self, context: Any, obj: Any) -> None:
        self.values[tuple(context.get_identifier())] = obj

    def load_input(self, context: Any) -> Any:
        return self.values[tuple(context.upstream_output.get_identifier())]


class Plan:
    """A job of random ops, which note what they see."""

    def __init__(self, nodes: list[Node]) -> None:
        self.seen: dict[str, Any] = {}
        self._nodes = nodes
        resources = {"io_manager": IOManagerDefinition.hardcoded_io_manager(Memory())}
        self.job: JobDefinition = job(name="random_job", resource_defs=resources)(self._compose)

    def _compose(self) -> None:
        values: list[Any] = []
        for number, node in enumerate(self._nodes):
            chosen = [values[index % len(values)] for index in node.upstream if values]
            # Dagster takes an output only once for one fan-in
            chosen = list({id(value): value for value in chosen}.values())
            arguments = [chosen] if node.as_list and chosen else chosen
            outputs = self._op(f"op{number}", node, len(arguments))(*arguments)
            if node.kind == "optional":
                values += [outputs.yes, outputs.no]
            elif node.kind == "value":
                values.append(outputs)
            else:
                mapped = outputs
                if node.kind == "mapped":
                    value = Node("value", (), False, node.retries, 0)
                    mapped = outputs.map(self._op(f"map{number}", value, 1))
                collect = Node("value", (), False, 0, 0)
                values.append(self._op(f"collect{number}", collect, 1)(mapped.collect()))

    def _op(self, name: str, node: Node, inputs: int) -> OpDefinition:
        def compute(context, values: dict[str, Any]) -> Iterator[Any]:  # type: ignore[no-untyped-def]
            self.seen[context.get_step_execution_context().step.key] = (
                copy.deepcopy(values),
                context.retry_number,
            )
            if context.retry_number < node.retries:
                raise RetryRequested(max_retries=node.retries)
            value = [name, context.get_step_execution_context().step.key, values]
            if node.kind == "optional":
                if node.size < 2:
                    yield Output(value, ("yes", "no")[node.size])
            elif node.kind == "value":
                yield Output(value)
            else:
                for index in range(node.size):
                    yield DynamicOutput([index, value], mapping_key=f"key{index}")

        outs: dict[str, Any] = {"result": Out()}
        if node.kind == "optional":
            outs = {"yes": Out(is_required=False), "no": Out(is_required=False)}
        elif node.kind != "value":
            outs = {"result": DynamicOut()}
        return OpDefinition(
            compute_fn=compute,
            name=name,
            ins={f"in{index}": In() for index in range(inputs)},
            outs=outs,
        )


def execute_step(
    plan: Plan, instance: DagsterInstance, run: DagsterRun, key: str, of_step: ExecutionPlan
) -> tuple[Any, list[DagsterEvent]]:
    """What the step sees, and its events."""
    plan.seen.clear()
    in_memory = InMemoryJob(plan.job)
    events = list(
        execute_plan_iterator(
            execution_plan=of_step,
            job=in_memory,
            dagster_run=run,
            instance=instance,
            retry_mode=RetryMode.ENABLED.for_inner_plan(),
        )
    )
    assert list(plan.seen) == [key], "the step has not been executed"
    return plan.seen[key], events


def steps_of(active: ActiveExecution) -> Iterator[ExecutionStep]:
    """The steps in an order in which they can be executed, until there is none left."""
    while True:
        for skipped in active.get_steps_to_skip():
            active.mark_skipped(skipped.key)
        for abandoned in active.get_steps_to_abandon():
            active.mark_abandoned(abandoned.key)
        steps = active.get_steps_to_execute()
        yield from steps
        # ``is_complete`` forgets the steps of a dynamic output that has just come
        if not steps and active.is_complete:
            return


def comparable(event: DagsterEvent) -> str:
    """What does not differ between two executions of a step: process ids and durations do."""
    message = re.sub(r"\d[\d.hms]*", "N", event.message)  # a duration is 9.5ms, 1.2s, 1m3s or 1h4m
    return str((event.event_type_value, event.step_handle, message))


@pytest.fixture(scope="module")
def instance() -> Iterator[DagsterInstance]:
    """One that stores no events, since the tests take them from the execution itself."""
    with (
        DagsterInstance.ephemeral() as ephemeral,
        patch.object(ephemeral, "handle_new_event"),
    ):
        yield ephemeral


#: A plan with everything that a state is cut for: fan-ins, of whose values one is missing; dynamic
#: steps, of which one yields nothing; retries.
EVERYTHING = [
    Node("optional", (), False, 1, 1),
    Node("value", (), False, 0, 0),
    Node("mapped", (2,), False, 1, 2),
    Node("dynamic", (0, 1), True, 0, 2),
    Node("value", (1, 2, 3), True, 2, 0),
    Node("value", (0, 2, 3), True, 0, 0),
    Node("mapped", (), False, 0, 0),
]


@settings(max_examples=6, derandomize=True, suppress_health_check=list(HealthCheck))
@example(EVERYTHING)
@given(st.lists(NODES, min_size=1, max_size=6))
def test_the_cut_state_gives_a_step_the_same_inputs(
    instance: DagsterInstance, nodes: list[Node]
) -> None:
    """And the same number of its attempt, for every step of random plans."""
    plan = Plan(nodes)
    run = instance.create_run_for_job(plan.job)
    in_memory = InMemoryJob(plan.job)
    # as a child keeps it, without a state
    run_plan = RunPlan({}, cast("Any", in_memory), {}, create_execution_plan(in_memory, {}))
    whole_plan = create_execution_plan(in_memory, {})
    with ActiveExecution(whole_plan, retry_mode=RetryMode.ENABLED) as active:
        for step in steps_of(active):
            whole = active.get_known_state()
            # as it travels
            cut = unpack_value(
                pack_value(cut_known_state(active, step)), as_type=KnownExecutionState
            )
            whole_plan_of_step = create_execution_plan(
                in_memory, {}, step_keys_to_execute=[step.key], known_state=whole
            )
            expected, told = execute_step(plan, instance, run, step.key, whole_plan_of_step)
            of_step = run_plan.of_step(step.key, cut)
            seen, events = execute_step(plan, instance, run, step.key, of_step)
            assert seen == expected
            assert [comparable(it) for it in events] == [comparable(it) for it in told]
            for event in events:
                if event.step_key == step.key:
                    active.handle_event(event)


def test_a_message_does_not_grow_with_the_plan(instance: DagsterInstance) -> None:
    """What a step of a chain carries is the same for a chain of any length."""

    def sizes(length: int) -> list[int]:
        plan = Plan(
            [
                Node("value", (number - 1,) if number else (), False, 1, 0)
                for number in range(length)
            ]
        )
        in_memory = InMemoryJob(plan.job)
        whole_plan = create_execution_plan(in_memory, {})
        run_plan = RunPlan({}, cast("Any", in_memory), {}, create_execution_plan(in_memory, {}))
        found = []
        run = instance.create_run_for_job(plan.job)
        with ActiveExecution(whole_plan, retry_mode=RetryMode.ENABLED) as active:
            for step in steps_of(active):
                cut = cut_known_state(active, step)
                found.append(len(cut.ready_outputs) + len(cut.previous_retry_attempts))
                of_step = run_plan.of_step(step.key, cut)
                assert len(of_step.step_dict) <= 2
                _, events = execute_step(plan, instance, run, step.key, of_step)
                for event in events:
                    if event.step_key == step.key:
                        active.handle_event(event)
        return found

    assert max(sizes(3)) == max(sizes(8)) == 2


def test_a_message_does_not_grow_with_a_dynamic_map(instance: DagsterInstance) -> None:
    """Neither that of a mapped step nor that of one beside it; that of the collecting one does."""
    size = 50
    nodes = [Node("mapped", (), False, 0, size), Node("value", (0,), False, 0, 0)]
    plan = Plan(nodes)
    in_memory = InMemoryJob(plan.job)
    carried = {}
    with ActiveExecution(create_execution_plan(in_memory, {}), RetryMode.ENABLED) as active:
        run = instance.create_run_for_job(plan.job)
        run_plan = RunPlan({}, cast("Any", in_memory), {}, create_execution_plan(in_memory, {}))
        for step in steps_of(active):
            cut = cut_known_state(active, step)
            carried[step.key] = len(str(pack_value(cut)))
            _, events = execute_step(plan, instance, run, step.key, run_plan.of_step(step.key, cut))
            for event in events:
                if event.step_key == step.key:
                    active.handle_event(event)
    mapped = {carried[f"map0[key{index}]"] for index in range(size)}
    assert max(*mapped, carried["op1"]) < 1000
    assert carried["collect0"] > 20 * size
