"""How the evidence is gathered: from the settings, dagster.yaml, the servers and the workers."""

from __future__ import annotations

import asyncio
import os
import platform
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster

from dagster_taskiq._dagster.fingerprint import storage_fingerprint
from dagster_taskiq._dagster.instance_facts import read_instance
from dagster_taskiq._dagster.instance_home import postgresql_of
from dagster_taskiq._dagster.job_facts import jobs_of
from dagster_taskiq.backend import Backend, open_backend
from dagster_taskiq.brokers import TaskBroker, open_broker
from dagster_taskiq.config.settings import Settings
from dagster_taskiq.connections import Servers, find_running_servers
from dagster_taskiq.doctor.evidence import Evidence, Versions
from dagster_taskiq.doctor.probe import PROBE_SECONDS, probe_queues
from dagster_taskiq.errors import DagsterTaskiqError, ServerError
from dagster_taskiq.executor import taskiq_executor
from dagster_taskiq.messages.envelope import PROTOCOL, QueueKind
from dagster_taskiq.messages.worker_records import WorkerRecord
from dagster_taskiq.overview import QueueView, reach_servers, read_overview
from dagster_taskiq.servers.facts import read_facts
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq.version import __version__

_RESTS = (
    "The settings mean the embedded server of DAGSTER_HOME, and no process uses it: start a worker."
)


def gather(
    settings: Settings, module: str | None = None, probe_seconds: float = PROBE_SECONDS
) -> Evidence:
    """Gather all that can be; nothing raises but what nobody has foreseen.

    Args:
        module: whose jobs are looked at.
        probe_seconds: how long a probe is waited for.
    """
    evidence = Evidence(
        settings=settings,
        host=socket.gethostname(),
        now=time.time(),
        versions=Versions(__version__, PROTOCOL, dagster.__version__, platform.python_version()),
        home=os.getenv("DAGSTER_HOME", ""),
    )
    evidence = _with_instance(evidence)
    if module is not None:
        try:
            evidence = replace(evidence, jobs=jobs_of(module, taskiq_executor.name))
        except DagsterTaskiqError as error:
            evidence = replace(evidence, jobs_problem=str(error))
    try:
        servers = find_running_servers(settings)
    except DagsterTaskiqError as error:
        return replace(evidence, servers_problem=str(error))
    if servers is None:
        return replace(evidence, servers_problem=_RESTS)
    return asyncio.run(_with_servers(replace(evidence, servers=servers), servers, probe_seconds))


def _with_instance(evidence: Evidence) -> Evidence:
    home = Path(evidence.home).expanduser().resolve()
    if not evidence.home or not home.is_dir():
        return evidence
    try:
        return replace(evidence, instance=read_instance(home), storage=storage_fingerprint(home))
    except DagsterTaskiqError as error:
        return replace(evidence, instance_problem=str(error))


async def _with_servers(evidence: Evidence, servers: Servers, probe_seconds: float) -> Evidence:
    try:
        backend = open_backend(servers.backend, servers.signer)
        broker = open_broker(servers.broker)
    except DagsterTaskiqError as error:  # a client library is not installed
        return replace(evidence, servers_problem=str(error))
    try:
        evidence = await _with_facts(evidence, servers)
        return await _with_workers(evidence, servers, backend, broker, probe_seconds)
    except ServerError as error:  # it has gone away meanwhile
        return replace(evidence, servers_problem=str(error))
    finally:
        for connected in (broker, backend):
            with suppress(ServerError):
                await connected.shutdown()


async def _with_workers(
    evidence: Evidence,
    servers: Servers,
    backend: Backend,
    broker: TaskBroker,
    probe_seconds: float,
) -> Evidence:
    views = await reach_servers(servers, backend, broker)
    evidence = replace(evidence, server_views=views)
    problems = {role for view in views if view.problem for role in view.roles}
    if "backend" in problems:
        return evidence
    workers, lost = await backend.workers(), await backend.lost_workers()
    evidence = replace(evidence, workers=workers, lost_workers=lost, now=time.time())
    if problems:
        return evidence
    overview = await read_overview(
        servers, backend, broker, [evidence.settings.default_queue], most_waiting=1
    )
    # a run's task that is not answered must be taken back, which is not possible everywhere
    parts = [
        (it.kind, it.name)
        for it in overview.queues
        if _can_answer(it, evidence.live_workers)
        and (it.kind is QueueKind.STEPS or it.waiting is not None)
    ]
    probes = await probe_queues(servers, backend, broker, parts, probe_seconds)
    return replace(evidence, queues=overview.queues, probes=probes)


def _can_answer(queue: QueueView, workers: Sequence[WorkerRecord]) -> bool:
    """Whether a worker that listens there has a slot free, by its last word."""
    is_step = queue.kind is QueueKind.STEPS
    return queue.pause is None and any(
        it.busy_slots < it.slots if is_step else it.busy_run_slots < it.run_slots
        for it in workers
        if queue.name in it.queues and it.state == "running"
    )


async def _with_facts(evidence: Evidence, servers: Servers) -> Evidence:
    asked = {"broker": servers.broker, "backend": servers.backend}
    with suppress(DagsterTaskiqError):  # which the checks of the instance tell
        if database := _database_of(evidence):
            asked["instance"] = database
    facts: dict[str, Any] = {}
    problems: dict[str, str] = {}
    times: dict[str, float] = {}
    for role, options in asked.items():
        same = next((it for it in facts if asked[it].client_url == options.client_url), None)
        if same is not None:
            facts[role], times[role] = facts[same], times[same]
            continue
        try:
            began = time.time()
            facts[role] = await read_facts(options, role)
            times[role] = (began + time.time()) / 2
        except DagsterTaskiqError as error:
            problems[role] = str(error)
    return replace(evidence, facts=facts, fact_problems=problems, facts_at=times)


def _database_of(evidence: Evidence) -> ServerOptions | None:
    """The PostgreSQL of Dagster's instance, if it has one."""
    if evidence.instance is None:
        return None
    database = postgresql_of(evidence.instance.home)
    if database is None:
        return None
    options = evidence.settings.server_options(database.url, None)
    return replace(options, fresh_password=database.fresh_password)
