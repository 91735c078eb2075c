"""The traffic of a crowd of workers on a Redis of its own, through the product's own code.

A simulation says what the server does for such a crowd. It does not say how fast the workers are:
all of them share this machine's cores, so look at ``generator_lag_p99_ms`` first. Where that is
large the figures are of an overloaded simulation, and latencies are its own.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

import redis

from benchmarks.processes import DidNotEndError, FailedError
from benchmarks.scale import crowd_process
from benchmarks.scale.crowd import Crowd, Share
from benchmarks.scale.records import crowd_figures
from benchmarks.scale.redis_stats import RedisStats
from dagster_taskiq.servers.kinds import ServerOptions

#: How long the crowd may take to connect and to have all its slots busy, for each worker and at
#: least.
_START_SECONDS_PER_WORKER = 0.6
_START_SECONDS = 60.0

#: How long a process may take to answer, and to end by itself.
_ANSWER_SECONDS = 60.0
_END_SECONDS = 30.0

_ENDED = "A process of the simulation has ended; see above."

#: How often to ask how many slots are busy, and how long to let the crowd come to rest then.
_LOOK_SECONDS = 0.25
_SETTLE_SECONDS = 2.0


def simulate(crowd: Crowd, options: ServerOptions) -> dict[str, Any]:
    """Put a crowd on a server and watch it.

    Returns:
        what was simulated, and the figures; see the module's text for what they are worth.

    Raises:
        FailedError: a process of the simulation has ended.
        DidNotEndError: the crowd was not at work in time: it is too large for this machine.
    """
    with ExitStack() as resources:
        client = resources.enter_context(redis.Redis.from_url(options.url))
        processes = [resources.enter_context(_started(share)) for share in crowd.shares(options)]
        _await_work(crowd, processes)
        for process in processes:
            process.ask("begin")
        before = RedisStats.look(client)
        time.sleep(crowd.seconds)
        after = RedisStats.look(client)
        records = [process.ask("report") for process in processes]
        return {
            **asdict(crowd),
            **after.figures_since(before),
            **crowd_figures(records, after.at_seconds - before.at_seconds),
        }


def _await_work(crowd: Crowd, processes: Sequence[_Process]) -> None:
    limit = _START_SECONDS + _START_SECONDS_PER_WORKER * crowd.workers
    deadline = time.monotonic() + limit
    first = 1 if crowd.busy_slots else 0  # what no run has sent or opened cannot be claimed
    for group in (processes[:first], processes[first:]):
        for process in group:
            process.say("start")
        for process in group:
            process.hear(deadline - time.monotonic())
    # the last ones of short steps are never all there at once
    while sum(process.ask("busy") for process in processes) < 0.9 * crowd.busy_slots:
        if time.monotonic() > deadline:
            raise DidNotEndError("Not all slots of the simulation were busy", limit)
        time.sleep(_LOOK_SECONDS)
    time.sleep(_SETTLE_SECONDS)


class _Process:
    """The simulation's end of a process of it."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def say(self, word: str) -> None:
        """Say a word; see ``crowd_process``."""
        try:
            self._pipe.send(word)
        except OSError:
            raise FailedError(_ENDED) from None

    def ask(self, word: str) -> Any:
        """Say a word and wait for the answer."""
        self.say(word)
        return self.hear(_ANSWER_SECONDS)

    def hear(self, limit_seconds: float) -> Any:
        """Wait for the answer to a word."""
        if not self._pipe.poll(max(0.0, limit_seconds)):
            raise DidNotEndError("A process of the simulation did not answer", limit_seconds)
        try:
            return self._pipe.recv()
        except EOFError:
            raise FailedError(_ENDED) from None


@contextmanager
def _started(share: Share) -> Iterator[_Process]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([crowd_process.__name__])  # seconds of each process otherwise
    ours, theirs = context.Pipe()
    process = context.Process(target=crowd_process.crowd_main, args=(theirs, share), daemon=True)
    process.start()
    theirs.close()
    try:
        yield _Process(ours)
    finally:
        try:
            ours.send("stop")
        except OSError:
            pass  # it has ended
        process.join(_END_SECONDS)
        process.kill()
        process.join()
        ours.close()
