"""What tests share that play with slots and real children."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from typing import Any

from dagster_taskiq.execution.arrivals import Arrival
from dagster_taskiq.execution.code_locations import code_location
from dagster_taskiq.messages.envelope import TaskName
from dagster_taskiq.messages.results import Place, TaskResult
from dagster_taskiq.worker.child_messages import Execute, Executed
from dagster_taskiq.worker.slot_base import ChildDied, Slot

#: How long a scenario may take, in seconds.
SECONDS = 90.0

#: What orders name as the place of a task; the child puts its own pid there.
PLACE = Place("w@h", "id", "h", 1, 1)


def play(scenario: Coroutine[Any, Any, None]) -> None:
    """Run a scenario to its end."""
    asyncio.run(asyncio.wait_for(scenario, SECONDS))


async def until(condition: Callable[[], object]) -> None:
    """Wait for something, while the event loop goes on."""

    def wait() -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.005)

    await asyncio.to_thread(wait)


def order(payload: dict[str, Any], run_id: str = "") -> Execute:
    """To execute a step with a payload."""
    return Execute(
        TaskName.EXECUTE_PLAN,
        json.dumps(payload),
        PLACE,
        Arrival("q", 1),
        code_location(payload),
        run_id=run_id,
    )


async def result_of(
    slot: Slot, payload: dict[str, Any], run_id: str = ""
) -> TaskResult | ChildDied:
    """What a slot makes of a step with a payload."""
    answer = await slot.run(order(payload, run_id), lambda _: None)
    if isinstance(answer, ChildDied):
        return answer
    assert isinstance(answer, Executed)
    return TaskResult.from_bytes(answer.result.encode())
