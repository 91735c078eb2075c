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


async def watch_code(directory: Path, on_change: Callable[[], None]) -> None:
    """Call back after changes of Python files below a directory, until cancelled."""
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()
    observer = Observer()

    def note() -> None:
        loop.call_soon_threadsafe(changed.set)

    observer.schedule(_Handler(note), str(directory), recursive=True)
    await asyncio.to_thread(observer.start)  # it walks the whole tree
    try:
        while True:
            await changed.wait()
            while changed.is_set():
                changed.clear()
                await asyncio.sleep(QUIET_SECONDS)
            on_change()
    finally:
        observer.stop()


class _Handler(FileSystemEventHandler):
    """Runs in the observer's thread."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change

    def on_any_event(self, event: FileSystemEvent) -> None:
        paths = (event.src_path, event.dest_path)
        is_code = any(str(path).endswith(".py") for path in paths if path)
        if event.event_type in _CHANGES and is_code and not event.is_directory:
            self._on_change()
