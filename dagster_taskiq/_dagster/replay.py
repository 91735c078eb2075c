"""The state of a run's steps: what Dagster's ``ActiveExecution`` keeps, read, cut and replayed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from dagster import DagsterEvent, DagsterEventType, DagsterInstance
from dagster._core.events.log import EventLogEntry
from dagster._core.execution.plan.active import ActiveExecution
from dagster._core.execution.plan.handle import ResolvedFromDynamicStepHandle, StepHandle
from dagster._core.execution.plan.inputs import FromMultipleSources
from dagster._core.execution.plan.instance_concurrency_context import InstanceConcurrencyContext
from dagster._core.execution.plan.outputs import StepOutputHandle
from dagster._core.execution.plan.state import KnownExecutionState
from dagster._core.execution.plan.step import (
    ExecutionStep,
)
from dagster._core.storage.tags import GLOBAL_CONCURRENCY_TAG

_OF_OUTCOME = {
    kind.value
    for kind in (
        DagsterEventType.STEP_OUTPUT,
        DagsterEventType.STEP_SUCCESS,
        DagsterEventType.STEP_FAILURE,
        DagsterEventType.STEP_UP_FOR_RETRY,
        DagsterEventType.RESOURCE_INIT_FAILURE,
    )
}


def withheld_steps(active: ActiveExecution) -> list[str]:
    """Keys of the steps that are ready and that the run's own limits hold back."""
    pending = set(_pending_claims(active))
    return [key for key in active._executable if key not in pending]


def steps_by_pool(active: ActiveExecution) -> dict[str, list[str]]:
    """Keys of the steps that are ready and wait for a slot of a pool, by its name."""
    found: dict[str, list[str]] = {}
    for key in _pending_claims(active):
        if pool := pool_of(active.get_step_by_key(key)):
            found.setdefault(pool, []).append(key)
    return found


def _pending_claims(active: ActiveExecution) -> list[str]:
    concurrency = active._instance_concurrency_context
    return concurrency.pending_claim_steps() if concurrency is not None else []


def pool_holders(instance: DagsterInstance, pool: str) -> tuple[int, list[tuple[str, str]]]:
    """How many slots a pool has, and run id and step key of each that is taken."""
    info = instance.event_log_storage.get_concurrency_info(pool)
    return info.slot_count, [(slot.run_id, slot.step_key) for slot in info.claimed_slots]


def is_in_flight(active: ActiveExecution, step_key: str) -> bool:
    """Whether the step was handed out for execution and has not reached an end."""
    return step_key in active._in_flight


def seconds_to_next_ready(active: ActiveExecution) -> float | None:
    """Time until a delayed retry is due or a pool may be asked again; None when none waits.

    ``ActiveExecution.sleep_interval`` is not used: for pools it can say 0 during a long wait.
    """
    now = time.time()
    times = list(active._waiting_to_retry.values())
    concurrency = active._instance_concurrency_context
    if concurrency is not None and concurrency.has_pending_claims():
        times += concurrency._pending_timeouts.values()
    return max(0.0, min(times) - now) if times else None


def cut_known_state(active: ActiveExecution, step: ExecutionStep) -> KnownExecutionState:
    """What one step reads of the known state, so that a message does not grow with the plan.

    ``ready_outputs`` is read for the step's own upstream outputs only, of the attempts only its own
    count, and of the dynamic mappings those that its plan is resolved by: the key of a step
    that is mapped is in its name, one that collects needs all.
    """
    plan_state = active._plan.known_state
    upstream = {
        handle
        for step_input in step.step_inputs
        for handle in step_input.get_step_output_handle_dependencies()
    }
    attempts = active.retry_state.get_attempt_count(step.key)
    # not ``get_known_state``, which checks the type of every output that the run has by now
    return KnownExecutionState(
        previous_retry_attempts={step.key: attempts} if attempts else {},
        dynamic_mappings=dict(active._completed_dynamic_outputs) if _collects(step) else {},
        ready_outputs=active._step_outputs & upstream,
        step_output_versions=plan_state.step_output_versions,
        parent_state=plan_state.parent_state,
    )


def _collects(step: ExecutionStep) -> bool:
    """Whether an input of the step is made of all that dynamic outputs have become, maybe none."""
    sources = [it.source for it in step.step_inputs if isinstance(it.source, FromMultipleSources)]
    handles = [source.step_output_handle_dependencies for source in sources]
    return any(not found or any(map(_is_dynamic, found)) for found in handles)


def _is_dynamic(output: StepOutputHandle) -> bool:
    handle = StepHandle.parse_from_key(output.step_key)
    return output.mapping_key is not None or isinstance(handle, ResolvedFromDynamicStepHandle)


def is_end_of_attempt(event: DagsterEvent) -> bool:
    """Whether the event says how an attempt of a step ended."""
    return event.is_step_success or event.is_step_failure or event.is_step_up_for_retry


def is_of_outcome(event: DagsterEvent) -> bool:
    """Whether the event says what came of an attempt: an output, its end, or why it has none.

    These are all that ``ActiveExecution`` and the end of a run depend on.
    """
    return event.event_type_value in _OF_OUTCOME


@dataclass(frozen=True)
class Replayed:
    """What a replay of a run's log has found.

    Attributes:
        sent: keys of the steps that were sent and have not come to an end.
        ended: keys of the others of which an attempt has ended.
        retries: how many attempts of a step, by key, asked for another one.
        failures: the failures of the steps that have failed, in their order.
    """

    sent: tuple[str, ...]
    ended: tuple[str, ...]
    retries: Mapping[str, int]
    failures: tuple[DagsterEvent, ...]


def replay_log(
    active: ActiveExecution,
    entries: Iterable[EventLogEntry],
    is_sent: Callable[[DagsterEvent], bool],
) -> Replayed:
    """Bring a new ``ActiveExecution`` to where the one of the run's former process was.

    ``ActiveExecution.rebuild_from_events`` cannot: it raises on skipped steps and delayed retries,
    asks for pool slots that others hold by now, and gives an unfinished dynamic step its keys
    twice. Here an attempt's outputs count once its end is in the log, and ends of attempts that
    were already over (of a worker that had been given up) count for nothing.

    Args:
        active: just made.
        entries: of the run's log about its steps, in their order.
        is_sent: whether an event says that its step was sent.
    """
    outputs: dict[str, list[DagsterEvent]] = {}
    sent: dict[str, None] = {}
    retries: dict[str, int] = {}
    failures: list[DagsterEvent] = []
    for entry in entries:
        event = entry.get_dagster_event()
        key = event.step_key or ""
        if is_sent(event):
            sent[key] = None
            outputs.pop(key, None)
        elif event.is_successful_output:
            outputs.setdefault(key, []).append(event)
        elif event.is_step_skipped:
            _replay_skip(active, key)
        elif is_end_of_attempt(event):
            made = outputs.pop(key, [])
            if key in sent and put_in_flight(active, key):
                del sent[key]
                retries[key] = retries.get(key, 0) + event.is_step_up_for_retry
                for known in (*made, event):
                    active.handle_event(known)
                _date_retry(active, event, entry.timestamp)
                if event.is_step_failure:
                    failures.append(event)
    in_flight = tuple(key for key in sent if put_in_flight(active, key))
    ended = tuple(key for key in retries if key not in in_flight)
    return Replayed(in_flight, ended, retries, tuple(failures))


def put_in_flight(active: ActiveExecution, step_key: str) -> bool:
    """Take a step as handed out, without asking limits or pools; False if it is not ready."""
    active._update()
    if step_key in active._in_flight:
        return True
    if step_key in active._executable:
        active._executable.remove(step_key)
    elif step_key in active._waiting_to_retry:
        del active._waiting_to_retry[step_key]
    else:
        return False
    active._in_flight.add(step_key)
    active._prep_for_dynamic_outputs(active.get_step_by_key(step_key))
    return True


def _replay_skip(active: ActiveExecution, step_key: str) -> None:
    active._update()
    if step_key in active._pending_skip:
        active._pending_skip.remove(step_key)
        active._in_flight.add(step_key)
        active._skip_for_dynamic_outputs(active.get_step_by_key(step_key))
        active.mark_skipped(step_key)


def _date_retry(active: ActiveExecution, event: DagsterEvent, timestamp: float) -> None:
    """A delay counts from when the attempt failed, not from its replay."""
    if event.is_step_up_for_retry and event.step_key in active._waiting_to_retry:
        delay = event.step_retry_data.seconds_to_wait or 0
        active._waiting_to_retry[event.step_key] = timestamp + delay


def hold_pool_slot(concurrency: InstanceConcurrencyContext, step: ExecutionStep) -> None:
    """Take over the pool slot that a step was given by the run's former process."""
    if pool_of(step) is not None:
        concurrency._claims.add(step.key)


def free_pool_slot(concurrency: InstanceConcurrencyContext, step: ExecutionStep) -> None:
    """Give back the pool slot of a step that may have ended while its run had no process."""
    hold_pool_slot(concurrency, step)
    concurrency.free_step(step.key)


def pool_of(step: ExecutionStep) -> str | None:
    """The concurrency pool of a step, by itself or by the tag of former releases."""
    return step.pool or (step.tags or {}).get(GLOBAL_CONCURRENCY_TAG)
