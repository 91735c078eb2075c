"""Checks of Dagster's instance: that it is there, the same for all, and where all can read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import Any

from dagster_taskiq._dagster.fingerprint import SQLITE
from dagster_taskiq._dagster.instance_facts import InstanceFacts
from dagster_taskiq._dagster.job_facts import IN_MEMORY, IoManager
from dagster_taskiq.config.settings import Settings
from dagster_taskiq.connections import name_servers
from dagster_taskiq.doctor.evidence import Evidence
from dagster_taskiq.doctor.findings import Finding, Level, fail, ok, skip, warn
from dagster_taskiq.errors import ConfigError
from dagster_taskiq.messages.envelope import QueueKind
from dagster_taskiq.overview import QueueView
from dagster_taskiq.servers.kinds import ServerOptions, is_same_address

NO_INSTANCE = "there is no instance to look at"
NO_WORKERS = "no worker is listed"

#: Dagster's own name of the launcher's class; a subclass counts as another one.
_LAUNCHER = "TaskiqRunLauncher"


def dagster_home(evidence: Evidence) -> Finding:
    """DAGSTER_HOME names a directory with a dagster.yaml that Dagster can use."""
    home = evidence.home
    if not home:
        return fail(
            "DAGSTER_HOME is not set",
            "Set it to the directory of dagster.yaml, here and for each worker, the webserver and "
            "the daemon: without it each process has an instance of its own, which goes with it.",
        )
    if evidence.instance_problem:
        return fail("dagster.yaml cannot be used", evidence.instance_problem)
    if evidence.instance is None:
        return fail(f"{home} is no directory", "Set DAGSTER_HOME to the one of dagster.yaml.")
    if not evidence.instance.has_file:
        return warn(
            f"{home} has no dagster.yaml",
            "Dagster keeps everything in files there. Make one, if only an empty one, so that "
            "nobody takes the wrong directory for the right one.",
        )
    return ok(f"{home}, storage {evidence.storage or 'unknown'}")


def same_instance(evidence: Evidence) -> Finding:
    """Each worker has the same storage of Dagster's instance as there is here."""
    if not evidence.storage:
        return skip(NO_INSTANCE)
    told = {it.name: it.storage for it in evidence.live_workers if it.storage}
    if not told:
        return skip("no worker tells which instance it has")
    others = sorted(name for name, storage in told.items() if storage != evidence.storage)
    if others:
        return fail(
            f"{others[0]} has {told[others[0]]}, and here is {evidence.storage}"
            + _and_more(others[1:]),
            "Give all the same dagster.yaml. It counts as another storage where host, port or name "
            "of the database differ in the text, even if both texts lead to one server.",
        )
    return ok(f"{evidence.storage} here and on {counted(told, 'worker')}")


def sqlite(evidence: Evidence) -> Finding:
    """Dagster's storage is no SQLite where workers are on several hosts."""
    if not evidence.storage:
        return skip(NO_INSTANCE)
    if not evidence.storage.startswith(f"{SQLITE}:"):
        return ok("the storage is a server")
    hosts = sorted({evidence.host, *evidence.hosts})
    if len(hosts) > 1:
        return fail(
            f"the storage is SQLite, and there are {len(hosts)} hosts: {', '.join(hosts[:5])}",
            "Set 'storage: postgres:' in dagster.yaml: SQLite's files are of one host, and on a "
            "shared file system they break.",
        )
    return ok("the storage is SQLite, and this is the only host")


def io_managers(evidence: Evidence) -> Finding:
    """Jobs leave the outputs of steps where each worker can read them."""
    if evidence.jobs_problem:
        return fail("the module cannot be loaded", evidence.jobs_problem)
    if why := _without_jobs(evidence):
        return skip(why)
    in_memory = [it for it in evidence.io_managers if it.kind == IN_MEMORY]
    if in_memory:
        return fail(
            f"{_of_jobs(in_memory)} keep outputs in memory",
            "Use another IO manager: each step is a process of its own.",
        )
    local = [it for it in evidence.io_managers if it.is_local]
    if not local:
        return ok(f"{counted(evidence.io_managers, 'IO manager')}, none in local files")
    return _local_outputs(evidence, local)


def _without_jobs(evidence: Evidence) -> str:
    """Why there are no jobs to look at; empty where there are."""
    if evidence.jobs is None:
        return "no module was given: -m MODULE looks at its jobs"
    return "" if evidence.jobs else "the module has no job with taskiq_executor"


def _local_outputs(evidence: Evidence, local: list[IoManager]) -> Finding:
    if len({evidence.host, *evidence.hosts}) < 2:
        return ok("outputs are in local files, and this is the only host")
    usual = [it for it in local if not it.directory and it.is_directory_known]
    if usual:
        return fail(
            f"{_of_jobs(usual)} keep outputs in local files of each host",
            "Use an IO manager on storage that all workers share (S3, GCS, a database), or set "
            "base_dir of the present one to a shared directory.",
        )
    where = next((it.directory for it in local if it.directory), "a directory of their own")
    return warn(
        f"{_of_jobs(local)} keep outputs in {where}",
        "Make sure that this directory is the same one on each host that has workers.",
    )


def compute_logs(evidence: Evidence) -> Finding:
    """What steps print is kept where the webserver can read it."""
    if evidence.instance is None:
        return skip(NO_INSTANCE)
    if not evidence.instance.has_local_logs:
        return ok(evidence.instance.logs)
    if len({evidence.host, *evidence.hosts}) < 2:
        return ok(f"{evidence.instance.logs}, and this is the only host")
    return warn(
        f"{evidence.instance.logs} keeps them on the host of each step",
        "Set 'compute_logs:' in dagster.yaml to a class that writes to shared storage, or its "
        "base_dir to a shared directory; otherwise Dagster's UI shows nothing of other hosts.",
    )


def launcher_servers(evidence: Evidence) -> Finding:
    """The run launcher sends runs to the servers of the settings here."""
    if evidence.instance is None:
        return skip(NO_INSTANCE)
    if not uses_launcher(evidence.instance):
        return skip(f"runs are launched by {evidence.instance.launcher}, not by workers")
    if evidence.instance.launcher_problem:
        return fail("its settings cannot be used", evidence.instance.launcher_problem)
    advice = (
        "Give run_launcher in dagster.yaml the settings of the runs and workers, or this command "
        "the file of the workers (-y)."
    )
    return _compared(evidence, evidence.instance.launcher_config or {}, "its", advice)


def executor_servers(evidence: Evidence) -> Finding:
    """Jobs whose code names servers send their steps to those of the settings here."""
    if why := _without_jobs(evidence):
        return skip(why)
    naming = [
        it
        for it in evidence.jobs or ()
        if it.executor_config.get("broker") or it.executor_config.get("backend")
    ]
    if not naming:
        return skip("no job's code names servers: runs get them with their config")
    advice = (
        "Give taskiq_executor the settings of the workers, or this command the file of the workers "
        "of these jobs (-y)."
    )
    for job in naming:
        finding = _compared(evidence, job.executor_config, f"job {job.name}: its", advice)
        if finding.level is Level.FAIL:
            return finding
    return ok(f"{counted(naming, 'job')} with the broker and backend here")


def _compared(evidence: Evidence, config: Mapping[str, Any], whose: str, advice: str) -> Finding:
    """The servers of other settings against those here."""
    try:
        there = name_servers(Settings.from_config(config))
        here = name_servers(evidence.settings)
    except ConfigError as error:
        return fail(f"{whose} settings cannot be used", str(error))
    for role, one, other in (
        ("broker", there.broker, here.broker),
        ("backend", there.backend, here.backend),
    ):
        if not _is_same(one, other):
            return fail(
                f"{whose} {role} is {_shown(one)}, and here {_shown(other)}",
                advice,
            )
    if set(there.signer.key_ids) != set(here.signer.key_ids):
        return fail(
            f"{whose} signing keys are not those here",
            "Set the same 'signing_key' for the launcher, the runs and the workers.",
        )
    return ok(f"{whose} broker and backend are those here ({_shown(here.broker)})")


def run_monitoring(evidence: Evidence) -> Finding:
    """Dagster looks after launched runs, so that one whose worker dies does not stay for ever."""
    facts = evidence.instance
    if facts is None:
        return skip(NO_INSTANCE)
    if not uses_launcher(facts):
        return skip(f"runs are launched by {facts.launcher}, not by workers")
    if not facts.is_monitoring:
        return fail(
            "it is off, and TaskiqRunLauncher launches runs",
            "Set 'run_monitoring: {enabled: true}' in dagster.yaml, and max_resume_run_attempts: "
            "without it a run whose worker dies stays STARTED for ever.",
        )
    if not facts.resumes:
        return warn(
            "it is on and fails runs whose worker dies, since max_resume_run_attempts is 0",
            "Set 'run_monitoring: {max_resume_run_attempts: 3}' in dagster.yaml, and such a run "
            "goes on elsewhere with the steps that it has.",
        )
    return ok(f"it is on, and resumes a run up to {facts.resumes} times")


def start_timeout(evidence: Evidence) -> Finding:
    """Dagster does not fail runs for the time that they wait in their queue."""
    facts = evidence.instance
    if facts is None:
        return skip(NO_INSTANCE)
    if not uses_launcher(facts) or not facts.is_monitoring:
        return skip("no run is failed for it: it takes run monitoring and TaskiqRunLauncher")
    if evidence.queues is None:
        return skip("the queues could not be read")
    return _run_waits(evidence, evidence.queues, facts.start_timeout_seconds)


def _run_waits(evidence: Evidence, found: Sequence[QueueView], limit: int) -> Finding:
    queues = [it for it in found if it.kind is QueueKind.RUNS and it.depth]
    waits = {it.name: evidence.now - it.oldest_sent_at for it in queues if it.oldest_sent_at}
    queue = max(waits, key=lambda name: waits[name], default=None)
    longest = waits[queue] if queue is not None else 0.0
    advice = (
        "Raise 'run_monitoring: {start_timeout_seconds: ...}' in dagster.yaml above the longest "
        "wait, start more run slots, or let fewer runs wait (max_concurrent_runs)."
    )
    if longest > limit:
        return fail(
            f"a run waits in queue {queue} for {longest:.0f} s, and {limit} s fail it", advice
        )
    if longest > limit / 2:
        return warn(f"a run waits in queue {queue} for {longest:.0f} s of {limit} s", advice)
    if queues and not waits:
        return warn(f"runs wait in queue {queues[0].name}, and how long is not known", advice)
    return ok(f"no run waits for more than {limit / 2:.0f} s, half of what Dagster allows")


def uses_launcher(facts: InstanceFacts) -> bool:
    """Whether the instance's runs are launched on workers."""
    return facts.launcher == _LAUNCHER and facts.launcher_module.startswith("dagster_taskiq")


def _is_same(one: ServerOptions, other: ServerOptions) -> bool:
    return one.key_prefix == other.key_prefix and is_same_address(one.address, other.address)


def _shown(options: ServerOptions) -> str:
    return f"{options.address}, key_prefix {options.key_prefix}"


def counted(things: Sized, word: str) -> str:
    """Such as ``2 workers``."""
    number = len(things)
    return f"{number} {word}" + ("" if number == 1 else "s")


def _and_more(names: list[str]) -> str:
    return f" (and {len(names)} more workers)" if names else ""


def _of_jobs(found: list[IoManager]) -> str:
    names = sorted({it.job for it in found})
    more = f" and {len(names) - 3} more jobs" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} ({found[0].kind})"
