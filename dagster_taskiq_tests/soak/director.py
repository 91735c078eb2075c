"""The director of a soak: it keeps runs and workers going, and has faults strike."""

from __future__ import annotations

import json
import logging
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dagster_taskiq_tests.acceptance.harness import Note, Stack, WorkerProcess, is_running, until
from dagster_taskiq_tests.proxy import Mode, Proxy
from dagster_taskiq_tests.soak.runs import MONITORING_SECONDS, POOL_SLOT_SECONDS, Runs, SoakRun
from dagster_taskiq_tests.soak.stack import Kind, Server

logger = logging.getLogger("soak")

WORKERS = 3
SLOTS = 2

#: How many runs there are at once.
RUNS = 5

#: Seconds between two faults, on average.
FAULT_SECONDS = 4.0

#: How long three workers may take to start on a machine that has much else to do.
START_SECONDS = 180.0

#: How long the last runs may take, with everybody healthy.
PATIENCE_SECONDS = 240.0

#: What one slot of a worker is: a step's and a run's.
CHILDREN = 2 * SLOTS


@dataclass
class SoakWorker:
    """A worker, and what was done to it.

    Attributes:
        is_doomed: whether it was killed, or told to stop.
        is_harmed: whether something happened to it that a drain must not be judged after.
        thaws_at: when it goes on, if it is frozen; monotonic seconds.
        fds: how many file descriptors it had when it was ready.
    """

    process: WorkerProcess
    is_doomed: bool = False
    is_drained: bool = False
    is_harmed: bool = False
    thaws_at: float | None = None
    fds: Counter[str] | None = None

    @property
    def pid(self) -> int:
        """Of the worker itself."""
        return self.process.pid

    @property
    def has_ended(self) -> bool:
        """Whether its process is gone."""
        return self.process.process.poll() is not None

    @property
    def is_ready(self) -> bool:
        """Whether it takes tasks, and nothing is wrong with it that we know of."""
        alive = not self.has_ended and not self.is_doomed and self.thaws_at is None
        return alive and "is ready" in self.process.log


class Director:
    """One soak.

    Args:
        kind: of the broker.
        stack, other_home, server, database: see ``open_soak_stack``.
        seed: of everything that is left to chance.
    """

    def __init__(
        self,
        kind: Kind,
        stack: Stack,
        other_home: Path,
        server: Server,
        database: Proxy,
        seed: int,
    ) -> None:
        self.kind = kind
        self.stack = stack
        self.server = server
        self.database = database
        self.random = random.Random(f"{seed}/faults")
        self.runs = Runs(stack, other_home, seed)
        self.workers: list[SoakWorker] = []
        self.faults: Counter[str] = Counter()
        self.problems: list[str] = []
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._trace_offset = 0
        self._notes: list[Note] = []
        self._started_at = time.monotonic()
        self._settings = stack.settings_file()

    # --- the clock ---

    def play(
        self,
        seconds: float,
        faults: dict[str, Callable[[Director], str | None]],
        fault_seconds: float,
    ) -> None:
        """Runs and faults for so long."""
        for _ in range(WORKERS):
            self.start_worker()
        until(self._are_all_ready, "all workers are ready", START_SECONDS)
        self.runs.start_monitoring()
        ends_at = time.monotonic() + seconds
        next_fault = time.monotonic() + fault_seconds
        while time.monotonic() < ends_at:
            self._keep_going()
            if len(self.runs.look()) < RUNS:
                # Dagster's own way to the instance, which comes before ours, does not wait for it
                self.runs.start_one(may_be_own=self.database.mode is Mode.PASS)
            if time.monotonic() >= next_fault:
                self._strike(faults)
                next_fault = time.monotonic() + self.random.uniform(0.5, 1.5) * fault_seconds
            time.sleep(0.1)

    def calm_down(self) -> list[SoakRun]:
        """No more faults: wait for the last runs; those that have not ended in time."""
        self.say("no more faults")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (left := self.runs.look()) and time.monotonic() < deadline:
            self._keep_going()
            time.sleep(0.2)
        while self._later:
            self._keep_going()
            time.sleep(0.1)
        until(self._are_all_ready, "all workers are ready", START_SECONDS)
        time.sleep(POOL_SLOT_SECONDS + 2 * MONITORING_SECONDS)
        self.runs.stop_monitoring()
        return left

    def _are_all_ready(self) -> bool:
        self._keep_going()
        return sum(worker.is_ready for worker in self.workers) == WORKERS

    def _keep_going(self) -> None:
        now = time.monotonic()
        due = [action for when, action in self._later if when <= now]
        self._later = [item for item in self._later if item[0] > now]
        for action in due:
            action()
        for worker in self.workers:
            if worker.has_ended and not worker.is_doomed:
                worker.is_doomed = True
                code = worker.process.process.poll()
                self.problems.append(f"{worker.process.name} ended by itself with {code}")
                self.start_worker()
            elif worker.fds is None and worker.is_ready:
                worker.fds = descriptors(worker.pid)

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        """Do something in a while."""
        self._later.append((time.monotonic() + seconds, action))

    def _strike(self, faults: dict[str, Callable[[Director], str | None]]) -> None:
        """One fault, of those that can happen now."""
        names = list(faults)
        self.random.shuffle(names)
        for name in names:
            what = faults[name](self)
            if what is not None:
                self.faults[name] += 1
                self.say(f"{name}: {what}")
                return

    def say(self, text: str) -> None:
        """A line of the journal, which tells what happened when."""
        line = {"at": round(time.monotonic() - self._started_at, 2), "time": time.time()}
        with (self.stack.directory / "journal").open("a") as journal:
            journal.write(json.dumps({**line, "what": text}) + "\n")
        logger.info("%6.1f %s", line["at"], text)

    # --- workers ---

    def start_worker(self) -> SoakWorker:
        """One more worker."""
        name = f"worker-{len(self.workers) + 1}"
        process = self.stack.worker(name=name, slots=SLOTS, settings=self._settings, is_fresh=True)
        worker = SoakWorker(process)
        self.workers.append(worker)
        return worker

    def ready_workers(self) -> list[SoakWorker]:
        """Those that faults may choose from."""
        return [worker for worker in self.workers if worker.is_ready]

    def close(self) -> None:
        """Leave nothing frozen and no thread behind, whatever has happened."""
        self.runs.stop_monitoring()
        for worker in self.workers:
            if worker.thaws_at is not None and not worker.has_ended:
                worker.process.process.send_signal(signal.SIGCONT)

    # --- what runs where ---

    def notes(self) -> list[Note]:
        """The trace so far, read on from where it was read to."""
        path = self.stack.directory / "trace"
        if path.exists():
            with path.open("rb") as trace:
                trace.seek(self._trace_offset)
                data = trace.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._trace_offset += len(whole)
            self._notes += [Note.of(json.loads(line)) for line in whole.splitlines()]
        return self._notes

    def busy_pids(self) -> list[int]:
        """Children that execute a step now."""
        last: dict[int, Note] = {note.pid: note for note in self.notes()}
        busy = (pid for pid, note in last.items() if note.kind in ("start", "tick", "child"))
        return [pid for pid in busy if is_running(pid)]


def descriptors(pid: int) -> Counter[str]:
    """What kinds of files a process has open."""
    kinds: Counter[str] = Counter()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            kinds[str(link.readlink()).partition(":")[0]] += 1
        except OSError:
            continue  # it was open for us to list it
    return kinds
