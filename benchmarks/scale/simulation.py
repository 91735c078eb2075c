"""The traffic of a crowd of workers on a Redis of its own, through the product's own code.

A simulation says what the server does for such a crowd. It does not say how fast the workers are:
all of them share this machine's cores, so look at ``generator_lag_p99_ms`` first. Where that is
large the figures are of an overloaded simulation, and latencies are its own.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import redis

from benchmarks.processes import DidNotEndError, FailedError
from benchmarks.scale.crowd import Report, Share, crowd_main
from benchmarks.scale.redis_stats import RedisStats
from benchmarks.scale.runs import task_id_of
from dagster_taskiq.servers.kinds import ServerOptions

#: How long the crowd may take to connect and to have all its slots busy, for each worker and at
#: least.
_START_SECONDS_PER_WORKER = 0.6
_START_SECONDS = 60.0

#: How long a process may take to answer, and to end by itself.
_ANSWER_SECONDS = 60.0
_END_SECONDS = 30.0

#: How often to ask how many slots are busy, and how long to let the crowd come to rest then.
_LOOK_SECONDS = 0.25
_SETTLE_SECONDS = 2.0

#: How long the simulation's workers and runs wait for an answer: that this process has no time
#: for them is no fault of the server.
_PATIENCE_SECONDS = 60.0

#: Orders to cancel a second, of all runs together.
_CANCELS_PER_SECOND = 2.0


@dataclass(frozen=True)
class Crowd:
    """What is simulated.

    Attributes:
        workers: each with a station of steps and one of runs.
        slots: for steps, of each worker.
        busy_share: of the slots; 0 is an idle crowd, without runs.
        runs: among which the steps are divided.
        waiting: steps of each run that no slot is free for. With one or more of them a run asks
            for the list of workers at each reconciliation.
        lease_seconds: of claims and runs.
        step_seconds: how long a step takes; None is for ever: workers hold their steps from the
            beginning, and no broker carries them.
        seconds: how long the server is watched.
        processes: for the workers; the runs have another one.
    """

    workers: int = 1000
    slots: int = 8
    busy_share: float = 1.0
    runs: int = 20
    waiting: int = 0
    lease_seconds: float = 30.0
    step_seconds: float | None = 60.0
    seconds: float = 60.0
    processes: int = 2

    @property
    def busy_slots(self) -> int:
        """Of the whole crowd."""
        return round(self.workers * self.slots * self.busy_share)

    def shares(self, options: ServerOptions) -> list[Share]:
        """What each process has to simulate; the runs' process is the first."""
        patient = replace(options, connect_timeout_seconds=_PATIENCE_SECONDS)
        runs = self.runs if self.busy_slots else 0
        common = Share(
            patient,
            self.lease_seconds,
            run_ids=tuple(str(uuid.uuid4()) for _ in range(runs)),
            slots=self.slots,
            step_seconds=self.step_seconds or 0.0,
        )
        held = self._held(common.run_ids)
        counts = _divided(self.workers, min(self.processes, self.workers))
        shares = [self._runs_share(common)] if runs else []
        for index, count in enumerate(counts):
            first = sum(counts[:index])
            shares.append(
                replace(
                    common,
                    workers=count,
                    busy_slots=int(self.slots * self.busy_share) if runs else 0,
                    held=tuple(held[first : first + count]),
                )
            )
        return shares

    def _runs_share(self, common: Share) -> Share:
        by_run = -(-self.busy_slots // self.runs)
        return replace(
            common,
            has_runs=True,
            held_by_run=by_run if self.step_seconds is None else 0,
            in_flight=by_run + self.waiting,
            cancel_every_seconds=self.runs / _CANCELS_PER_SECOND,
        )

    def _held(self, run_ids: Sequence[str]) -> list[dict[str, str]]:
        """By worker, by task, its run: of steps that are held from the beginning."""
        if self.step_seconds is not None or not run_ids:
            return []
        busy = int(self.slots * self.busy_share)
        held = []
        for worker in range(self.workers):
            numbers = range(worker * busy, (worker + 1) * busy)
            # step by step to each run in turn
            places = [(run_ids[it % len(run_ids)], it // len(run_ids)) for it in numbers]
            held.append({task_id_of(run_id, number): run_id for run_id, number in places})
        return held


def _divided(count: int, parts: int) -> list[int]:
    return [count // parts + (index < count % parts) for index in range(parts)]


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
        reports = [process.ask("report") for process in processes]
        return {
            **asdict(crowd),
            **_server_figures(before, after),
            **_crowd_figures(reports, after.at_seconds - before.at_seconds),
        }


def _await_work(crowd: Crowd, processes: Sequence[_Process]) -> None:
    limit = _START_SECONDS + _START_SECONDS_PER_WORKER * crowd.workers
    deadline = time.monotonic() + limit
    for process in processes:
        process.expect("ready", deadline)
    if crowd.busy_slots and crowd.runs:
        # what no run has sent or opened cannot be claimed
        processes[0].say("start")
        processes[0].expect("ok", deadline)
        processes = processes[1:]
    for process in processes:
        process.say("start")
    for process in processes:
        process.expect("ok", deadline)
    # the last ones of short steps are never all there at once
    enough = 0.9 * crowd.busy_slots if crowd.runs else 0
    while sum(process.ask("busy") for process in processes) < enough:
        if time.monotonic() > deadline:
            raise DidNotEndError("Not all slots of the simulation were busy", limit)
        time.sleep(_LOOK_SECONDS)
    time.sleep(_SETTLE_SECONDS)


class _Process:
    """The simulation's end of a process of it."""

    def __init__(self, pipe: Connection, process: SpawnProcess) -> None:
        self._pipe = pipe
        self._process = process

    def expect(self, word: str, deadline: float) -> None:
        """Wait until it says so."""
        answer = self._receive(max(0.0, deadline - time.monotonic()))
        assert answer == word

    def say(self, word: str) -> None:
        """Say a word, whose answer is to be expected."""
        self._pipe.send(word)

    def ask(self, word: str) -> Any:
        """Say a word and wait for the answer."""
        self.say(word)
        return self._receive(_ANSWER_SECONDS)

    def _receive(self, limit_seconds: float) -> Any:
        if not self._pipe.poll(limit_seconds):
            raise DidNotEndError("A process of the simulation did not answer", limit_seconds)
        try:
            return self._pipe.recv()
        except EOFError:
            raise FailedError("A process of the simulation has ended; see above.") from None


@contextmanager
def _started(share: Share) -> Iterator[_Process]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=crowd_main, args=(theirs, share), daemon=True)
    process.start()
    theirs.close()
    try:
        yield _Process(ours, process)
    finally:
        try:
            ours.send("stop")
        except OSError:
            pass  # it has ended
        process.join(_END_SECONDS)
        process.kill()
        process.join()
        ours.close()


# --- figures ------------------------------------------------------------------------------------

_RATES = ("commands", "requests", "script_calls", "input_bytes", "output_bytes")


def _server_figures(before: RedisStats, after: RedisStats) -> dict[str, Any]:
    rates = after.rates(before)
    return {
        "server": after.server,
        **{f"{name}_per_s": rates[name] for name in _RATES},
        "cpu_percent": 100 * rates["cpu_seconds"],
        "connections": after.info["connected_clients"],
        "memory_bytes": after.info["used_memory"],
        "client_memory_bytes": after.info.get("mem_clients_normal", 0),
    }


def _crowd_figures(reports: Sequence[Report], seconds: float) -> dict[str, float | None]:
    records = [report.record for report in reports]
    renewals = [it for record in records for it in record.renewal_seconds]
    cancels = [it for record in records for it in record.cancel_seconds]
    lags = [it for report in reports for it in report.lag_seconds]
    renewed = sum(record.claims_renewed for record in records)
    return {
        "renewals_per_s": len(renewals) / seconds,
        "claims_renewed_per_s": renewed / seconds,
        **_milliseconds("renewal", renewals),
        "worst_slack_share": min(r.worst_slack_share for r in records) if renewed else None,
        "lost_claims": sum(record.lost for record in records),
        "errors": sum(record.errors for record in records),
        "cancels": len(cancels),
        **_milliseconds("cancel", cancels),
        "steps_per_s": sum(record.steps for record in records) / seconds,
        "inspections_per_s": sum(report.inspections for report in reports) / seconds,
        **_milliseconds("generator_lag", lags),
        "generator_cpu_percent": 100 * sum(r.cpu_seconds for r in reports) / seconds,
    }


def _milliseconds(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    """Median, 99th percentile and maximum; None where there is nothing."""
    if not seconds:
        return {f"{name}_{which}_ms": None for which in ("p50", "p99", "max")}
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {
        f"{name}_p50_ms": 1000 * statistics.median(ordered),
        f"{name}_p99_ms": 1000 * p99,
        f"{name}_max_ms": 1000 * ordered[-1],
    }
