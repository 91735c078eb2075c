"""How large a simulation is, and which share of it each of its processes has."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dagster_taskiq.connections import Servers
from dagster_taskiq.messages.envelope import step_task_id
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.servers.kinds import ServerOptions

#: How long the simulation's workers and runs wait for an answer: that their processes have no time
#: for them is no fault of the server.
_PATIENCE_SECONDS = 60.0


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
        return round(self.workers * self.slots * self.busy_share) if self.runs else 0

    @property
    def busy_slots_each(self) -> int:
        """Of each worker."""
        return int(self.slots * self.busy_share) if self.runs else 0

    @property
    def steps_by_run(self) -> int:
        """Steps of each run that have a slot."""
        return -(-self.busy_slots // self.runs)

    def shares(self, options: ServerOptions) -> list[Share]:
        """The share of each process; that of the runs, if there are any, comes first."""
        patient = replace(options, connect_timeout_seconds=_PATIENCE_SECONDS)
        run_ids = tuple(str(uuid.uuid4()) for _ in range(self.runs if self.busy_slots else 0))
        parts = min(self.processes, self.workers)
        bounds = [self.workers * index // parts for index in range(parts + 1)]
        of_workers = [range(*pair) for pair in itertools.pairwise(bounds)]
        of_all = [range(0), *of_workers] if run_ids else of_workers
        return [Share(self, patient, run_ids, workers) for workers in of_all]


#: The crowds of the page, by name.
_HELD = Crowd(step_seconds=None)
CROWDS: Mapping[str, Crowd] = {
    "idle": replace(_HELD, busy_share=0.0, runs=0),
    "busy": _HELD,
    "listing": replace(_HELD, waiting=5),
    "working": Crowd(waiting=5),
}

#: Of the workers, since each step costs the simulation more than all else does.
WORKING_SHARE = 0.25


@dataclass(frozen=True)
class Share:
    """What one process simulates.

    Attributes:
        run_ids: of all runs of the simulation.
        workers: numbers of the workers that the process has; if there are none, it has the runs.
    """

    crowd: Crowd
    options: ServerOptions
    run_ids: tuple[str, ...]
    workers: range

    @property
    def servers(self) -> Servers:
        """One Redis as broker and backend, without signatures."""
        return Servers(self.options, self.options, Signer((), self.options.key_prefix))

    def held_by(self, worker: int) -> dict[str, str]:
        """By task, its run: the steps that a worker holds from its beginning and never ends."""
        if self.crowd.step_seconds is not None or not self.run_ids:
            return {}
        busy, runs = self.crowd.busy_slots_each, len(self.run_ids)
        numbers = range(worker * busy, (worker + 1) * busy)
        # step by step to each run in turn
        places = [(self.run_ids[it % runs], it // runs) for it in numbers]
        return {task_id_of(run_id, number): run_id for run_id, number in places}


def task_id_of(run_id: str, number: int) -> str:
    """The id of a run's step, counted from 0."""
    return step_task_id(run_id, f"step_{number}", 1)
