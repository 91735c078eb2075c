"""What tests share that play with slots and real children."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from dagster_taskiq.messages.results import Place

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
