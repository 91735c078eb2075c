"""What a listener holds for other workers goes back, also when it is told to stop meanwhile."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from dagster_taskiq.brokers.parking import Parking

SECONDS = 30.0


def test_a_listener_that_is_cancelled_while_it_gives_back_ends_when_it_has() -> None:
    """A server's client may lose the cancellation, and the listener would look again for ever."""
    begun, answered = asyncio.Event(), asyncio.Event()
    released: list[int] = []

    async def release(number: int) -> None:
        begun.set()
        with suppress(asyncio.CancelledError):
            await answered.wait()
        released.append(number)

    async def test() -> None:
        parking = Parking()
        for number in range(3):
            parking.put(lambda number=number: release(number), "run")
        looking = asyncio.create_task(parking.look_away())
        await begun.wait()
        looking.cancel()
        answered.set()
        await asyncio.wait({looking}, timeout=SECONDS)
        assert looking.cancelled()
        assert sorted(released) == [0, 1, 2]
        assert parking.is_empty

    asyncio.run(test())
