"""One process of a simulation, with its share of the workers or with the runs.

The simulation and its processes speak over a pipe: a word goes in, an answer comes out.

=============  ==================================================================
word           answer
=============  ==================================================================
(none)         ``ready``, once everything is imported
``busy``       how many steps are executed now
``start``      ``ok``: the runs have begun to send, the workers have their steps
``begin``      ``ok``: what was noted so far does not count
``report``     a ``Report`` of what was noted since
``stop``       none: the process ends, as it does when the pipe is closed
=============  ==================================================================
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import resource
import signal
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import redis.utils

from benchmarks.scale.runs import SimulatedRun
from benchmarks.scale.workers import Record, SimulatedWorker
from dagster_taskiq.connections import Servers
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.servers.kinds import ServerOptions

#: How many workers connect at the same time.
_AT_ONCE = 5

#: How long to wait for their steps.
_FILL_SECONDS = 5.0

#: How often a process looks whether it gets the CPU time that it needs.
_LAG_LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Share:
    """What one process simulates.

    Attributes:
        workers, slots, step_seconds: see ``SimulatedWorker``.
        busy_slots: how many steps each worker is to have before the next ones start.
        run_ids: of all runs of the simulation.
        has_runs: whether this process has them.
        held: by worker, by task, the run of what the workers hold.
        held_by_run: how many of each run's steps that are.
        in_flight, cancel_every_seconds: of each run, see ``SimulatedRun``.
    """

    options: ServerOptions
    lease_seconds: float
    workers: int = 0
    slots: int = 0
    busy_slots: int = 0
    step_seconds: float = 60.0
    run_ids: tuple[str, ...] = ()
    has_runs: bool = False
    held: tuple[Mapping[str, str], ...] = ()
    held_by_run: int = 0
    in_flight: int = 0
    cancel_every_seconds: float | None = None

    @property
    def servers(self) -> Servers:
        """One Redis as broker and backend, without signatures."""
        return Servers(self.options, self.options, Signer((), self.options.key_prefix))


@dataclass
class Report:
    """What one process saw.

    Attributes:
        lag_seconds: by how much its event loop was late, at each look.
        cpu_seconds: that it used.
    """

    record: Record
    lag_seconds: list[float] = field(default_factory=list)
    cpu_seconds: float = 0.0
    inspections: int = 0


def crowd_main(pipe: Connection, share: Share) -> None:
    """The whole life of one process."""
    logging.basicConfig(level="ERROR")
    for name in ("dagster_taskiq", "taskiq"):  # they tell of each cancel, of each lost call
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # thousands of connections
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # redis-py asks for its own version with each connection, which takes milliseconds, and here
    # are thousands
    redis.utils.get_lib_version = functools.cache(redis.utils.get_lib_version)
    # Ctrl-C reaches all processes; the first one ends the others by their pipes
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        asyncio.run(_live(pipe, share))
    except (EOFError, BrokenPipeError):
        pass
    except BaseException:
        traceback.print_exc()
    os._exit(1)


async def _live(pipe: Connection, share: Share) -> None:
    await _Crowd(pipe, share).live()
    # at once: nothing that is left there matters to anybody, and to tidy it up takes a while
    os._exit(0)


class _Crowd:
    def __init__(self, pipe: Connection, share: Share) -> None:
        self._pipe = pipe
        self._share = share
        self._record = Record()
        self._lag_seconds: list[float] = []
        self._cpu_seconds = 0.0
        self._inspections = 0
        self._workers = [
            SimulatedWorker(
                share.servers,
                share.slots,
                share.step_seconds,
                lambda: self._record,
                share.held[number] if share.held else {},
                share.lease_seconds,
            )
            for number in range(share.workers)
        ]
        self._runs = [
            SimulatedRun(
                share.servers,
                run_id,
                share.held_by_run,
                share.in_flight,
                share.lease_seconds,
                share.cancel_every_seconds,
            )
            for run_id in (share.run_ids if share.has_runs else ())
        ]

    async def live(self) -> None:
        watch = asyncio.create_task(self._watch_lag())
        self._pipe.send("ready")
        while (word := await asyncio.to_thread(self._pipe.recv)) != "stop":
            self._pipe.send(await self._answer(word))
        watch.cancel()

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
        return any(worker.busy_slots < self._share.busy_slots for worker in workers)

    def _begin(self) -> str:
        self._record = Record()
        self._lag_seconds = []
        self._cpu_seconds = time.process_time()
        self._inspections = sum(run.inspections for run in self._runs)
        for run in self._runs:
            run.may_cancel = True
        return "ok"

    def _report(self) -> Report:
        self._record.errors += sum(run.errors for run in self._runs)
        return Report(
            self._record,
            self._lag_seconds,
            time.process_time() - self._cpu_seconds,
            sum(run.inspections for run in self._runs) - self._inspections,
        )

    async def _watch_lag(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LAG_LOOK_SECONDS
            await asyncio.sleep(_LAG_LOOK_SECONDS)
            self._lag_seconds.append(max(0.0, loop.time() - due))
