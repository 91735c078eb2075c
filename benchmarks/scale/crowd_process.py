"""One process of a simulation, with its share of the workers or with the runs.

The simulation and its processes speak over a pipe: a word goes in, an answer comes out.

=============  ==================================================================
word           answer
=============  ==================================================================
``busy``       how many steps are executed now
``start``      ``ok``: the runs have begun to send, the workers have their steps
``begin``      ``ok``: what was noted so far does not count
``report``     a ``Record`` of what was noted since
``stop``       none: the process ends, as it does when the pipe is closed
=============  ==================================================================
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import signal
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import redis.utils

from benchmarks.processes import allow_connections
from benchmarks.scale.crowd import Share
from benchmarks.scale.records import Record
from benchmarks.scale.runs import SimulatedRun
from benchmarks.scale.workers import SimulatedWorker

#: How many workers connect at the same time.
_AT_ONCE = 5

#: How long to wait for their steps.
_FILL_SECONDS = 5.0

#: How often a process looks whether it gets the CPU time that it needs.
_LAG_LOOK_SECONDS = 0.05


def crowd_main(pipe: Connection, share: Share) -> None:
    """The whole life of one process."""
    logging.basicConfig(level="ERROR")
    for name in ("dagster_taskiq", "taskiq"):  # they tell of each cancel, of each lost call
        logging.getLogger(name).setLevel(logging.CRITICAL)
    allow_connections()
    # redis-py asks for its own version with each connection, which takes milliseconds, and here
    # are thousands
    redis.utils.get_lib_version = functools.cache(redis.utils.get_lib_version)
    # Ctrl-C reaches all processes; the first one ends the others by their pipes
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        asyncio.run(_Crowd(pipe, share).live())
    except (EOFError, BrokenPipeError):
        pass
    except BaseException:
        traceback.print_exc()
    os._exit(1)


class _Crowd:
    def __init__(self, pipe: Connection, share: Share) -> None:
        self._pipe = pipe
        self._share = share
        self._record = Record()
        self._began_cpu_seconds = 0.0
        self._workers = [
            SimulatedWorker(share, number, lambda: self._record) for number in share.workers
        ]
        run_ids = () if share.workers else share.run_ids
        self._runs = [SimulatedRun(share, run_id) for run_id in run_ids]

    async def live(self) -> None:
        watch = asyncio.create_task(self._watch_lag())
        while (word := await asyncio.to_thread(self._pipe.recv)) != "stop":
            self._pipe.send(await self._answer(word))
        watch.cancel()
        # at once: nothing that is left here matters to anybody, and to tidy it up takes a while
        os._exit(0)

    async def _answer(self, word: str) -> Any:
        for worker in self._workers:
            worker.check()
        if word == "start":
            return await self._start()
        if word == "busy":
            return sum(worker.busy_slots for worker in self._workers)
        return self._begin() if word == "begin" else self._report()

    async def _start(self) -> str:
        """Start the runs, or the workers a few at a time.

        The next ones start when the last ones have their steps: workers whose first steps came at
        one moment would renew at one moment ever after, and nobody must wait for an answer for
        longer than a server may take only because this process has too much to do.
        """
        for run in self._runs:
            run.start()
        for run in self._runs:
            await asyncio.to_thread(run.is_open.wait)
        for first in range(0, len(self._workers), _AT_ONCE):
            batch = self._workers[first : first + _AT_ONCE]
            await asyncio.gather(*(worker.start() for worker in batch))
            deadline = time.monotonic() + _FILL_SECONDS
            # workers have no event for it, and this is no part of what is simulated
            while time.monotonic() < deadline and self._has_idle(batch):  # noqa: ASYNC110
                await asyncio.sleep(_LAG_LOOK_SECONDS)
        return "ok"

    def _has_idle(self, workers: Sequence[SimulatedWorker]) -> bool:
        return any(it.busy_slots < self._share.crowd.busy_slots_each for it in workers)

    def _begin(self) -> str:
        self._record = Record()
        self._began_cpu_seconds = time.process_time()
        for run in self._runs:
            run.begin()
        return "ok"

    def _report(self) -> Record:
        self._record.errors += sum(run.errors for run in self._runs)
        self._record.inspections = sum(run.inspections for run in self._runs)
        self._record.cpu_seconds = time.process_time() - self._began_cpu_seconds
        return self._record

    async def _watch_lag(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LAG_LOOK_SECONDS
            await asyncio.sleep(_LAG_LOOK_SECONDS)
            self._record.lag_seconds.append(max(0.0, loop.time() - due))
