"""The worker's end of its guard."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from pathlib import Path

from dagster_taskiq.worker import guard

logger = logging.getLogger(__name__)


class GuardClient:
    """Starts the guard and tells it which process groups to kill, and when."""

    def __init__(self) -> None:
        self._deadlines: dict[int, float | None] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe = -1

    def start(self) -> None:
        """Start the guard process."""
        reader, self._pipe = os.pipe()
        try:
            # not "-m": that would import the package, and with it Dagster
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(Path(guard.__file__))],
                stdin=reader,
                start_new_session=True,
                cwd="/",
            )
        finally:
            os.close(reader)
        for group, when in self._deadlines.items():
            self._say(f"watch {group}")
            if when is not None:
                self._say(f"deadline {group} {when}")

    @property
    def pid(self) -> int:
        """Of the guard process; 0 before ``start``."""
        return self._process.pid if self._process else 0

    async def monitor(self) -> None:
        """Replace a guard that ended; nothing is killed by a guard that is killed itself."""
        while True:
            assert self._process is not None
            code = await asyncio.to_thread(self._process.wait)
            if self._pipe < 0:
                return
            logger.warning("The guard process ended with exit code %s; starting another.", code)
            os.close(self._pipe)
            self.start()

    def watch(self, group: int) -> None:
        """A child's process group exists: kill it when the worker is gone."""
        self._deadlines[group] = None
        self._say(f"watch {group}")

    def set_deadline(self, group: int, when: float) -> None:
        """Kill the group at a time of ``guard.clock``, unless a later call moves it."""
        self._deadlines[group] = when
        self._say(f"deadline {group} {when}")

    def lift_deadline(self, group: int) -> None:
        """The group may live as long as the worker."""
        self._deadlines[group] = None
        self._say(f"lift {group}")

    def forget(self, group: int) -> None:
        """The group is gone."""
        self._deadlines.pop(group, None)
        self._say(f"forget {group}")

    def close(self) -> None:
        """End the guard; it kills what it still watches."""
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
        if self._process is not None:
            self._process.wait()

    def _say(self, line: str) -> None:
        if self._pipe < 0:
            return
        try:
            os.write(self._pipe, line.encode() + b"\n")
        except BrokenPipeError:
            pass  # it has died; `monitor` starts another, which is told everything
