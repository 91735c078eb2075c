"""What the checks look at: gathered once, so that each check only judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dagster_taskiq._dagster.instance_facts import InstanceFacts
from dagster_taskiq._dagster.job_facts import IoManager, JobFacts
from dagster_taskiq.config.settings import Settings
from dagster_taskiq.connections import Servers
from dagster_taskiq.doctor.probe import Probe
from dagster_taskiq.messages.worker_records import WorkerRecord
from dagster_taskiq.overview import QueueView, ServerView


@dataclass(frozen=True)
class Versions:
    """Of what executes steps, here."""

    package: str
    protocol: int
    dagster: str
    python: str


@dataclass(frozen=True)
class Evidence:
    """All that the checks look at. What could not be gathered is a problem, in a sentence.

    Attributes:
        settings: of ``-y`` and the environment.
        host: this one.
        now: when it was gathered; seconds since the epoch.
        versions: here.
        home: what DAGSTER_HOME says; empty where it is not set.
        instance, instance_problem: as its dagster.yaml sets it.
        storage: the fingerprint of its storage; empty where it is not known.
        servers, servers_problem: what the settings mean.
        server_views: how they answer.
        workers, lost_workers: as they are listed; None where the backend does not answer.
        queues: None where one of the servers does not answer.
        facts: of servers, by ``broker``, ``backend`` and ``instance``, Dagster's own database.
        fact_problems: of those that do not tell.
        facts_at: when the server's facts were read, for clocks; seconds since the epoch.
        probes: through the queues on which workers listen.
        jobs, jobs_problem: of the module of ``-m``, those with our executor; None without it.
    """

    settings: Settings
    host: str
    now: float
    versions: Versions
    home: str = ""
    instance: InstanceFacts | None = None
    instance_problem: str = ""
    storage: str = ""
    servers: Servers | None = None
    servers_problem: str = ""
    server_views: Sequence[ServerView] = ()
    workers: Sequence[WorkerRecord] | None = None
    lost_workers: Sequence[WorkerRecord] = ()
    queues: Sequence[QueueView] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    fact_problems: Mapping[str, str] = field(default_factory=dict)
    facts_at: Mapping[str, float] = field(default_factory=dict)
    probes: Sequence[Probe] = ()
    jobs: Sequence[JobFacts] | None = None
    jobs_problem: str = ""

    @property
    def live_workers(self) -> list[WorkerRecord]:
        """The workers that count: without those whose records are outdated."""
        return [it for it in self.workers or () if not it.is_outdated]

    @property
    def io_managers(self) -> list[IoManager]:
        """Those of the jobs."""
        return [it for job in self.jobs or () for it in job.io_managers]

    @property
    def hosts(self) -> list[str]:
        """Where workers live, by name."""
        return sorted({it.host for it in self.live_workers})
