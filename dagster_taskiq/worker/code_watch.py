"""Notices that code has changed, for ``--reload``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer

#: An editor or a checkout changes several files at once; act when it has been quiet for so long.
QUIET_SECONDS = 0.3

_CHANGES = ("created", "deleted", "modified", "moved")


class CodeWatch:
    """Watches the Python files below a directory.

    Args:
        directory: the topmost.
        on_change: called in the event loop, some time after the last of several changes.
    """

    def __init__(self, directory: Path, on_change: Callable[[], None]) -> None:
        self._directory = directory
        self._on_change = on_change
        self._changed = asyncio.Event()
        self._observer = Observer()

    async def start(self) -> None:
        """Notice changes from now on."""
        loop = asyncio.get_running_loop()

        def note() -> None:
            loop.call_soon_threadsafe(self._changed.set)

        self._observer.schedule(_Handler(note), str(self._directory), recursive=True)
        await asyncio.to_thread(self._observer.start)  # it walks the whole tree

    async def run(self) -> None:
        """Call back after changes, until cancelled."""
        while True:
            await self._changed.wait()
            while self._changed.is_set():
                self._changed.clear()
                await asyncio.sleep(QUIET_SECONDS)
            self._on_change()

    def stop(self) -> None:
        """Watch no more."""
        self._observer.stop()


class _Handler(FileSystemEventHandler):
    """Runs in the observer's thread."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change

    def on_any_event(self, event: FileSystemEvent) -> None:
        paths = (event.src_path, event.dest_path)
        is_code = any(str(path).endswith(".py") for path in paths if path)
        if event.event_type in _CHANGES and is_code and not event.is_directory:
            self._on_change()
