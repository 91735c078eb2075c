"""The table of the doctor's checks, in the order in which people can use their answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dagster_taskiq.doctor import instance_checks, server_checks, worker_checks
from dagster_taskiq.doctor.evidence import Evidence
from dagster_taskiq.doctor.findings import Finding, skip

#: Makes one check. Its docstring says what must be so.
Make = Callable[[Evidence], Finding]


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        make: a function of the evidence, whose name is the check's.
        warns: what it warns of, in words; empty for nothing.
        fails: what is red.
    """

    make: Make
    fails: str
    warns: str = ""

    @property
    def name(self) -> str:
        """What it is called, in the output and in JSON."""
        return self.make.__name__

    @property
    def promise(self) -> str:
        """What must be so, a sentence."""
        return (self.make.__doc__ or "").strip()

    def of(self, evidence: Evidence) -> Finding:
        """What it finds; a check that breaks says so, and keeps no other from being made."""
        try:
            return self.make(evidence)
        except Exception as error:
            return skip(f"this check has broken, {type(error).__name__}: {error}")


CHECKS = (
    Check(
        instance_checks.dagster_home,
        "not set, no directory, or a dagster.yaml that Dagster cannot use",
        "no dagster.yaml there",
    ),
    Check(server_checks.broker, "it does not answer, or refuses"),
    Check(server_checks.backend, "it does not answer, refuses, or the user lacks a right"),
    Check(worker_checks.workers, "no worker is alive", "one has vanished in the last ten minutes"),
    Check(
        worker_checks.queues,
        "tasks wait that nobody takes, or nobody listens on the default queue",
        "a queue is paused, or all workers that listen on it",
    ),
    Check(
        worker_checks.probe,
        "no worker answers within 8 s, though one with a free slot is listed",
    ),
    Check(
        worker_checks.versions,
        "another protocol, or another release of Dagster (1.11 and 1.12)",
        "another version of this package, another patch of Dagster, another release of Python",
    ),
    Check(worker_checks.keys, "other keys, keys on one side only, or an outdated record"),
    Check(
        worker_checks.worker_servers,
        "a worker gives back tasks of another backend",
        "another address of the broker, which may lead to the same server",
    ),
    Check(instance_checks.same_instance, "another host, port, database or path in dagster.yaml"),
    Check(instance_checks.sqlite, "SQLite, and workers elsewhere than here"),
    Check(
        instance_checks.io_managers,
        "outputs in memory; or in the usual local directory, with several hosts",
        "outputs in a directory of which nobody knows whether all hosts share it",
    ),
    Check(instance_checks.compute_logs, "", "logs in local files, with several hosts"),
    Check(instance_checks.launcher_servers, "another broker, backend, key_prefix or key"),
    Check(instance_checks.executor_servers, "another broker, backend, key_prefix or key"),
    Check(
        instance_checks.run_monitoring,
        "off, with `TaskiqRunLauncher`",
        "`max_resume_run_attempts` is 0",
    ),
    Check(
        instance_checks.start_timeout,
        "a run waits in its queue for longer than `start_timeout_seconds`",
        "for half of it; or runs wait in RabbitMQ, which does not say how long",
    ),
    Check(
        server_checks.redis_data,
        "it has a memory limit and evicts keys at it",
        "no append-only file, or an eviction policy without a limit",
    ),
    Check(server_checks.redis_role, "a node of a cluster, or a replica"),
    Check(server_checks.rabbitmq, "", "a release before 3.8, or another product"),
    Check(
        server_checks.postgresql,
        "a standby, read-only transactions, or fsync off",
        "a release before 12",
    ),
    Check(
        server_checks.connections,
        "idle workers need more than there are",
        "all slots together may, while all are busy with short steps",
    ),
    Check(server_checks.pooler, "", "a pooler before the backend, without RabbitMQ as the broker"),
    Check(
        server_checks.clocks,
        "more than 300 s apart, with a signing key",
        "more than 10 s apart",
    ),
)


def examine(evidence: Evidence) -> list[tuple[Check, Finding]]:
    """Make each check."""
    return [(check, check.of(evidence)) for check in CHECKS]


def table_of_checks() -> str:
    """The checks as a table of Markdown, for the documents."""
    lines = ["| check | what must be so | FAIL | WARN |", "| --- | --- | --- | --- |"]
    for check in CHECKS:
        cells = (f"`{check.name}`", check.promise, check.fails or "never", check.warns or "never")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
