"""An event loop in a thread of its own, for synchronous code that talks to async libraries.

Connections belong to the event loop that opened them, so a process has one such thread for each
client, and everything that client does happens there.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Coroutine, Iterable
from contextlib import suppress
from typing import Any, TypeVar

from dagster_taskiq.aio.patched_library import make_executor, require_real_threads

#: How long a cancelled task may take before it is cancelled again.
_CANCEL_SECONDS = 0.2

#: Threads for what the event loop must not wait for: looking up names of hosts, mostly.
_EXECUTOR_THREADS = 4

T = TypeVar("T")


async def end_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks until all have ended; their errors are not raised.

    Once is not enough: redis-py 8 loses a cancellation that meets it while it connects, and a
    task that goes on would be awaited for ever.
    """
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        done, left = await asyncio.wait(left, timeout=_CANCEL_SECONDS)
        await asyncio.gather(*done, return_exceptions=True)


async def to_its_end(work: Awaitable[T]) -> T:
    """Do something that must not be cancelled halfway, and return what it brings.

    Who is cancelled meanwhile, however often, is so afterwards. Nor can the cancellation be lost in
    it: ``asyncio.wait_for`` of Python 3.11 drops one that meets the end of what it waits for.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):  # as of ``end_tasks``, which cancels again
                await asyncio.wait({task})
        if not task.cancelled():
            task.exception()
        raise


class LoopThread:
    """Starts the thread at once; ``stop`` ends it.

    Raises:
        PatchedLibraryError: user code has replaced Python's threads.
    """

    def __init__(self, name: str) -> None:
        require_real_threads()
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(make_executor(_EXECUTOR_THREADS))
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run it in the thread, wait, and return or raise what it does."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run it in the thread as a background task."""

        async def create() -> asyncio.Task[None]:
            return asyncio.create_task(coroutine, name=name)

        return self.call(create())

    def stop(self) -> None:
        """Cancel what still runs, then end the thread."""

        async def cancel_all() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            await end_tasks(others)
            await self._loop.shutdown_asyncgens()

        if self._loop.is_closed():
            return
        self.call(cancel_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
