"""An event of asyncio that any thread may set."""

from __future__ import annotations

import asyncio
from contextlib import suppress


class RemoteEvent:
    """Made in the event loop that waits for it; ``set`` is called from any thread."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    def set(self) -> None:
        """Wake the one that waits; does nothing once its event loop is closed."""
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._event.set)

    def clear(self) -> None:
        """Forget what was set; in its own event loop."""
        self._event.clear()

    async def wait(self) -> None:
        """Return as soon as it is set."""
        await self._event.wait()
