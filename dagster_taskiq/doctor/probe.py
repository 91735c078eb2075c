"""A task through each queue and back, of which nothing is executed.

The task is of a run that nobody knows. Of a step without a living run a worker says so to the
backend where it would claim it, acks its message and drops it: so an answer proves the way through
broker, signature, slot and backend, and no child gets anything to do. A whole run needs no living
loop to be claimed, so its task is cancelled before it is sent: a worker that takes it finds the
tombstone and drops it. Every worker that can execute tasks of this protocol does the same.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from dagster_taskiq.backend import Backend, TaskState
from dagster_taskiq.brokers import TaskBroker
from dagster_taskiq.carrier import Carrier
from dagster_taskiq.connections import Servers
from dagster_taskiq.defaults import LEASE_SECONDS, MAX_PRIORITY
from dagster_taskiq.errors import DagsterTaskiqError
from dagster_taskiq.messages.envelope import (
    Envelope,
    QueueKind,
    TaskName,
    run_task_id,
    step_task_id,
)

#: How long an answer is waited for. An idle worker that is one of many looks every 5 s.
PROBE_SECONDS = 8.0

#: Pauses between two looks for the answer: the first, and the longest.
_FIRST_LOOK_SECONDS, _LONGEST_LOOK_SECONDS = 0.005, 0.1

_REASON = "The doctor's probe is over."

#: What stands for the step of a probe, in the log of the worker that drops it.
_STEP = "dagster-taskiq-doctor"


class Answer(str, Enum):
    """What became of a probe."""

    #: A worker took it and asked the backend for it.
    ANSWERED = "answered"
    #: A worker took it out of the queue; more is not seen of a whole run.
    TAKEN = "taken"
    #: Nobody took it in time; it was withdrawn, or will be dropped by who takes it.
    SILENT = "silent"
    #: It could not be sent, or not be followed.
    FAILED = "failed"


@dataclass(frozen=True)
class Probe:
    """A task that was sent through a queue.

    Attributes:
        kind: of the part of the queue.
        queue: as people name it.
        seconds: until the answer was seen.
        problem: why it failed, a sentence.
    """

    kind: QueueKind
    queue: str
    answer: Answer
    seconds: float = 0.0
    problem: str = ""


async def probe_queues(
    servers: Servers,
    backend: Backend,
    broker: TaskBroker,
    queues: Sequence[tuple[QueueKind, str]],
    timeout_seconds: float = PROBE_SECONDS,
) -> list[Probe]:
    """Send a probe through each part of queues, all at once; nothing raises.

    Args:
        backend, broker: on which ``startup`` was called.
        timeout_seconds: how long each is waited for.
    """
    return list(
        await asyncio.gather(
            *(
                _probe(servers, backend, broker, kind, queue, timeout_seconds)
                for kind, queue in queues
            )
        )
    )


async def _probe(
    servers: Servers,
    backend: Backend,
    broker: TaskBroker,
    kind: QueueKind,
    queue: str,
    timeout_seconds: float,
) -> Probe:
    carrier = Carrier(servers, kind, broker, backend)
    is_step = kind is QueueKind.STEPS
    try:
        envelope = await _envelope(backend, kind, queue)
        run_id, task_id = envelope.run_id, envelope.task_id
        # a message that is sealed too early would carry no identity of the backend
        message = carrier.message_of(envelope)
        tasks = {task_id: queue}
        if not is_step:
            await carrier.cancel(run_id, tasks, _REASON)

        async def is_answered() -> bool:
            if is_step:
                _, reports = await backend.inspect(run_id, [task_id])
                return reports[task_id].state is TaskState.DROPPED
            return task_id in await carrier.absent(tasks)

        began = time.monotonic()
        try:
            await carrier.send([message])
            has_answer = await _until(is_answered, timeout_seconds)
            seconds = time.monotonic() - began
        finally:
            await _tidy(carrier, backend, run_id, tasks)
    except DagsterTaskiqError as error:
        return Probe(kind, queue, Answer.FAILED, problem=str(error))
    good = Answer.ANSWERED if is_step else Answer.TAKEN
    return Probe(kind, queue, good if has_answer else Answer.SILENT, seconds)


async def _envelope(backend: Backend, kind: QueueKind, queue: str) -> Envelope:
    run_id, is_step = str(uuid.uuid4()), kind is QueueKind.STEPS
    return Envelope(
        task_id=step_task_id(run_id, _STEP, 1) if is_step else run_task_id(run_id, 0),
        name=TaskName.EXECUTE_PLAN if is_step else TaskName.EXECUTE_JOB,
        run_id=run_id,
        step_key=_STEP if is_step else None,
        attempt=1 if is_step else 0,
        queue=queue,
        priority=MAX_PRIORITY,
        lease_seconds=LEASE_SECONDS,
        cancel_grace_seconds=0,
        epoch=await backend.epoch(),
        payload="{}",
    )


async def _until(is_so: Callable[[], Awaitable[bool]], timeout_seconds: float) -> bool:
    deadline, pause = time.monotonic() + timeout_seconds, _FIRST_LOOK_SECONDS
    while not await is_so():
        if time.monotonic() >= deadline:
            return False
        await asyncio.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_LOOK_SECONDS)
    return True


async def _tidy(carrier: Carrier, backend: Backend, run_id: str, tasks: dict[str, str]) -> None:
    """Leave a tombstone that no worker gets past, and a record that goes in an hour."""
    await carrier.cancel(run_id, tasks, _REASON)
    token = uuid.uuid4().hex
    await backend.open_run(
        run_id, generation=0, token=token, is_resumable=False, lease_seconds=LEASE_SECONDS
    )
    await backend.close_run(run_id, token=token)
