"""Renewing a lease in time, also where a server does not answer.

A connection on which packets vanish says nothing until it times out, which takes longer than what
is left of a short lease, and a server may just be slow. So the next try does not wait for the one
before, and any that is answered counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine

from dagster_taskiq.aio.loop_thread import end_tasks
from dagster_taskiq.defaults import RENEWALS_PER_LEASE

#: A try that has a rival is given up when it is this many pauses old, which is a whole lease.
_LONGEST_PAUSES = RENEWALS_PER_LEASE


async def keep_renewing(
    renew: Callable[[], Coroutine[object, object, bool]],
    pause_seconds: Callable[[], float | None],
    changed: Callable[[], Awaitable[object]],
) -> None:
    """Begin a renewal after every pause, and twice as often while one fails or is not answered.

    Args:
        renew: one try; whether it succeeded. Its errors are raised here. Several may be under
            way, and they may end in any order.
        pause_seconds: between two tries; None while there is nothing to renew.
        changed: waits until ``pause_seconds`` may say something else.
    """
    loop = asyncio.get_running_loop()
    begun_at, is_away = loop.time(), False
    tries: set[asyncio.Task[bool]] = set()
    try:
        while True:
            pause = pause_seconds()
            left = None
            if pause is None:
                begun_at = loop.time()
            else:
                # the end of an outage must be seen before the lease's time is up
                pause_now = pause / 2 if is_away or tries else pause
                left = begun_at + pause_now - loop.time()
                if left <= 0:
                    begun_at = loop.time()
                    task = asyncio.create_task(renew())
                    loop.call_later(_LONGEST_PAUSES * pause, task.cancel)
                    tries.add(task)
                    continue
            await _first_of(tries, changed, left)
            if pause is None:
                begun_at = loop.time()
            for task in [task for task in tries if task.done()]:
                tries.discard(task)
                is_away = task.cancelled() or not task.result()
    finally:
        await end_tasks(tries)


async def _first_of(
    tries: set[asyncio.Task[bool]],
    changed: Callable[[], Awaitable[object]],
    timeout_seconds: float | None,
) -> None:
    change = asyncio.ensure_future(changed())
    try:
        await asyncio.wait(
            {*tries, change}, timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED
        )
    finally:
        change.cancel()
