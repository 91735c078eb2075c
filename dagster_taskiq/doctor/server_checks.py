"""Checks of broker, backend and Dagster's database: that they answer, and how they are set."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

from dagster_taskiq.defaults import CONTROL_AGE_SECONDS, WORKER_EXPIRES_SECONDS
from dagster_taskiq.doctor.evidence import Evidence
from dagster_taskiq.doctor.findings import Finding, Level, fail, ok, skip, warn
from dagster_taskiq.servers.facts import PostgresqlFacts, RedisFacts
from dagster_taskiq.servers.kinds import POSTGRESQL, RABBITMQ, REDIS, ServerKind

#: Releases that the package was never tried with are below these.
_OLDEST_RABBITMQ = (3, 8)
_OLDEST_POSTGRESQL = 12

#: Connections of webserver and daemon to Dagster's database, about.
_CONNECTIONS_OF_DAGSTER = 10

#: Connections to a PostgreSQL that a worker keeps, and that it has at most, by what that is for.
_OF_A_WORKER = {"backend": (1, 5), "broker": (2, 8), "instance": (0, 0)}

#: The same of a run, at most.
_OF_A_RUN = {"backend": 2, "broker": 1, "instance": 1}

#: From the least to the worst.
_GRAVITY = [Level.SKIP, Level.OK, Level.WARN, Level.FAIL]

#: How far the clocks of two hosts may differ before the times that people see are wrong.
_CLOCK_SECONDS = 10.0

F = TypeVar("F")


def broker(evidence: Evidence) -> Finding:
    """The broker answers."""
    return _reached(evidence, "broker")


def backend(evidence: Evidence) -> Finding:
    """The backend answers, and its user has the rights that are needed."""
    return _reached(evidence, "backend")


def _reached(evidence: Evidence, role: str) -> Finding:
    if evidence.servers_problem:
        return fail("it cannot be looked at", evidence.servers_problem)
    view = next((it for it in evidence.server_views if role in it.roles), None)
    if view is None:
        return skip("it was not asked")
    if view.problem or view.seconds is None:
        return fail(
            f"{view.address} does not answer",
            f"{view.problem} Check the address, the credentials and the network between.",
        )
    milliseconds = max(1, round(1000 * view.seconds))
    return ok(f"{view.product} answers within {milliseconds} ms, {view.address}")


def redis_data(evidence: Evidence) -> Finding:
    """Redis keeps its data on disk, and throws none of it away."""
    return _each(evidence, REDIS, RedisFacts, _redis_data)


def _redis_data(_: list[str], facts: RedisFacts) -> Finding:
    if facts.eviction != "noeviction":
        advice = (
            "Set 'maxmemory-policy noeviction': what Redis throws away are tasks, claims and "
            "results, so steps run late or fail."
        )
        if facts.memory_limit_bytes:
            return fail(f"it evicts keys when it is full ({facts.eviction})", advice)
        return warn(f"it would evict keys ({facts.eviction}), once it has a memory limit", advice)
    if not facts.has_log:
        return warn(
            "it writes no append-only file",
            "Set 'appendonly yes': tasks that wait are lost with a restart, and are sent again "
            "only as long as their run or launcher lives.",
        )
    return ok("append-only file, nothing is evicted")


def redis_role(evidence: Evidence) -> Finding:
    """Redis is one primary: no cluster, no replica."""
    return _each(evidence, REDIS, RedisFacts, _redis_role)


def _redis_role(_: list[str], facts: RedisFacts) -> Finding:
    if facts.is_cluster:
        return fail(
            "it is a node of a cluster",
            "Use one server, with replicas if you like: what must happen at once is about keys "
            "that a cluster keeps on several nodes.",
        )
    if facts.role != "master":
        return fail("it is a replica", "Set the address of the primary, to which can be written.")
    return ok("one primary")


def rabbitmq(evidence: Evidence) -> Finding:
    """RabbitMQ is of a release that is known to work."""
    if evidence.servers is None or evidence.servers.broker.kind is not RABBITMQ:
        return skip("the broker is no RabbitMQ")
    view = next((it for it in evidence.server_views if "broker" in it.roles), None)
    product = view.product if view else None
    found = re.search(r"RabbitMQ (\d+)\.(\d+)", product or "")
    if product is None:
        return skip("it does not answer")
    if found is None:
        return warn(
            f"{product} is no RabbitMQ",
            "Use RabbitMQ: another server of its protocol may have no queues with priorities.",
        )
    if tuple(map(int, found.groups())) < _OLDEST_RABBITMQ:
        return warn(f"{product} is old", "Nobody has tried it; update it.")
    return ok(product)


def postgresql(evidence: Evidence) -> Finding:
    """Each PostgreSQL is a primary that can be written to and keeps what it has confirmed."""
    return _each(evidence, POSTGRESQL, PostgresqlFacts, _postgresql)


def _postgresql(_: list[str], facts: PostgresqlFacts) -> Finding:
    version = facts.version // 10_000
    if facts.is_standby:
        return fail("it is a standby", "Set the address of the primary, to which can be written.")
    if facts.is_read_only:
        return fail(
            "its transactions are read-only",
            "Set default_transaction_read_only to off for this user and database.",
        )
    if not facts.has_fsync:
        return fail("fsync is off", "Set 'fsync = on': a crash may destroy the database.")
    if version < _OLDEST_POSTGRESQL:
        return warn(f"version {version} is old", "Nobody has tried it; update it.")
    return ok(f"version {version}, a primary")


def connections(evidence: Evidence) -> Finding:
    """Each PostgreSQL takes as many connections as the slots of the workers may need."""
    if not evidence.live_workers:
        return skip("no worker is listed, so nobody knows how many slots there are")
    return _each(evidence, POSTGRESQL, PostgresqlFacts, partial(_connections, evidence))


def _connections(evidence: Evidence, roles: list[str], facts: PostgresqlFacts) -> Finding:
    if facts.is_pooled:
        return ok("a pooler shares out the connections")
    limit = facts.max_connections
    is_of_dagster = "instance" in roles
    if is_of_dagster and not evidence.settings.source.kept_connection_seconds:
        return ok(f"short-lived sessions, {limit} connections")
    workers = evidence.live_workers
    steps, runs = sum(it.slots for it in workers), sum(it.run_slots for it in workers)
    of_dagster = _CONNECTIONS_OF_DAGSTER if is_of_dagster else 0
    least = of_dagster + sum(len(workers) * _OF_A_WORKER[role][0] for role in roles)
    most = of_dagster + sum(
        len(workers) * _OF_A_WORKER[role][1] + runs * _OF_A_RUN[role] for role in roles
    )
    most += steps if is_of_dagster else 0
    advice = (
        "Raise max_connections there, put a pooler before it, or start fewer slots; "
        "docs/scaling.md says what each part needs."
    )
    if least > limit:
        return fail(f"all workers need {least} connections of {limit} when they are idle", advice)
    if most > limit:
        all_slots = f"{steps} slots for steps and {runs} for runs"
        return warn(f"{all_slots} may need {most} connections of {limit}", advice)
    return ok(f"all slots together need at most {most} connections of {limit}")


def pooler(evidence: Evidence) -> Finding:
    """No pooler keeps runs from being woken by PostgreSQL."""
    facts = evidence.facts.get("backend")
    if not isinstance(facts, PostgresqlFacts):
        return skip(evidence.fact_problems.get("backend") or "the backend is no PostgreSQL")
    if not facts.is_pooled:
        return ok("no pooler is between")
    if evidence.servers is not None and evidence.servers.broker.kind is RABBITMQ:
        return ok("a pooler is between, and runs are woken through RabbitMQ")
    return warn(
        "a pooler is between",
        "It works, and runs look for results four times a second, as nobody can wake them. Give "
        "'backend' the address of the PostgreSQL itself to have them woken.",
    )


def clocks(evidence: Evidence) -> Finding:
    """The clocks of servers and workers are those here."""
    offsets = {
        role: facts.clock - evidence.facts_at[role]
        for role, facts in evidence.facts.items()
        if facts is not None and facts.clock is not None
    }
    for it in evidence.live_workers:
        # the backend keeps a record for so long, by its own clock
        age = evidence.now - it.sent_at
        offsets[it.name] = -age if age < 0 else -max(0.0, age - WORKER_EXPIRES_SECONDS)
    if not offsets:
        return skip("neither a server nor a worker tells its time")
    name = max(offsets, key=lambda it: abs(offsets[it]))
    off = offsets[name]
    if abs(off) <= _CLOCK_SECONDS:
        return ok(f"all within {max(1.0, abs(off)):.0f} s of this host's")
    side = "ahead of" if off > 0 else "behind"
    summary = f"that of {name} is {abs(off):.0f} s {side} this host's"
    advice = "Have the hosts' clocks set by NTP (chrony, systemd-timesyncd)."
    if evidence.settings.signing_keys and abs(off) > CONTROL_AGE_SECONDS:
        more = f"With a signing key orders count for {CONTROL_AGE_SECONDS:.0f} s only."
        return fail(summary, f"{advice} {more}")
    return warn(summary, f"{advice} Until then times in listings are wrong.")


# --- servers by what they are for ---


def _servers(evidence: Evidence, kind: type[F]) -> list[tuple[list[str], F]]:
    """The facts of the servers of a kind, each with what it is for."""
    found: list[tuple[list[str], F]] = []
    for role, facts in evidence.facts.items():
        if not isinstance(facts, kind):
            continue
        same = next((roles for roles, known in found if known is facts), None)
        if same is None:
            found.append(([role], facts))
        else:
            same.append(role)
    return found


def _each(
    evidence: Evidence, kind: ServerKind, facts: type[F], judge: Callable[[list[str], F], Finding]
) -> Finding:
    """The worst that is to be said of the servers of a kind."""
    findings = [
        replace(finding, summary=f"{_named(roles)}: {finding.summary}")
        for roles, it in _servers(evidence, facts)
        for finding in [judge(roles, it)]
    ]
    if findings:
        return max(findings, key=lambda it: _GRAVITY.index(it.level))
    return skip(" ".join(evidence.fact_problems.values()) or f"no {kind.name} is used")


def _named(roles: list[str]) -> str:
    return " and ".join("Dagster's database" if it == "instance" else it for it in roles)
