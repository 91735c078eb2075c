"""Checks of workers and queues: that there are some, like here, and that tasks get through."""

from __future__ import annotations

from collections.abc import Callable

from dagster_taskiq.doctor.evidence import Evidence
from dagster_taskiq.doctor.findings import Finding, fail, ok, skip, warn
from dagster_taskiq.doctor.instance_checks import NO_WORKERS, counted, uses_launcher
from dagster_taskiq.doctor.probe import Answer, Probe
from dagster_taskiq.messages.control import refuses
from dagster_taskiq.messages.envelope import QueueKind
from dagster_taskiq.messages.queue_waits import WaitKind
from dagster_taskiq.messages.worker_records import WorkerRecord
from dagster_taskiq.servers.kinds import is_same_address

_NOT_READ = "the backend could not be asked"


def workers(evidence: Evidence) -> Finding:
    """Some worker is alive, and none has vanished."""
    if evidence.workers is None:
        return skip(_NOT_READ)
    live, lost = evidence.live_workers, evidence.lost_workers
    if not live:
        last = f"; {lost[0].name} was lost" if lost else ""
        return fail(
            f"no worker is alive{last}",
            "Start one: dagster-taskiq worker start. If one runs, it has another broker, backend "
            "or key_prefix than the settings here.",
        )
    if lost:
        return warn(
            f"{counted(live, 'worker')} alive, and lost: {', '.join(it.name for it in lost[:5])}",
            "It has ended without a word in the last ten minutes: see its log, and the system's "
            "for want of memory.",
        )
    slots = sum(it.slots for it in live)
    runs = sum(it.run_slots for it in live)
    where = counted(evidence.hosts, "host")
    return ok(f"{counted(live, 'worker')} on {where}, {slots} slots for steps, {runs} for runs")


def versions(evidence: Evidence) -> Finding:
    """Workers have the versions of Dagster, of this package and of its protocol that are here."""
    if not evidence.live_workers:
        return skip(NO_WORKERS)
    here = evidence.versions
    checks: list[tuple[Callable[[WorkerRecord], str], str, str, bool]] = [
        (lambda it: str(it.protocol), "protocol", str(here.protocol), True),
        (lambda it: it.version, "dagster-taskiq", here.package, False),
        (lambda it: _release(it.dagster), "Dagster", _release(here.dagster), True),
        (lambda it: it.dagster, "Dagster", here.dagster, False),
        (lambda it: _release(it.python), "Python", _release(here.python), False),
    ]
    for read, what, own, is_grave in checks:
        others = [it for it in evidence.live_workers if read(it) not in (own, "", "unknown")]
        if others:
            find = fail if is_grave else warn
            more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
            return find(
                f"{others[0].name}{more} has {what} {read(others[0])}, and here is {own}",
                "Install the same versions everywhere. A worker of another protocol takes no task "
                "of runs from here, and another Dagster may not read what this one writes.",
            )
    return ok(f"dagster-taskiq {here.package}, Dagster {here.dagster}, protocol {here.protocol}")


def keys(evidence: Evidence) -> Finding:
    """Workers accept what is signed here, and this host what they sign."""
    if not evidence.live_workers and not evidence.workers:
        return skip(NO_WORKERS)
    signer = evidence.settings.signer()
    for it in evidence.workers or ():
        if reason := refuses(signer, it):
            return fail(f"{it.name} and this host do not trust each other", _sentence(reason))
    if not signer.is_active:
        return ok("nothing is signed, here and there")
    return ok(f"{', '.join(signer.key_ids)}, here and on each worker")


def worker_servers(evidence: Evidence) -> Finding:
    """Workers have the broker and the backend of the settings here."""
    if evidence.servers is None or not evidence.live_workers:
        return skip(NO_WORKERS)
    own = evidence.servers.broker.address
    for it in evidence.live_workers:
        if it.other_backend:
            return fail(
                f"{it.name} gives back tasks of another backend, {it.other_backend}",
                "Set the same backend for workers and runs, or a key_prefix for each deployment.",
            )
    for it in evidence.live_workers:
        if it.broker and not is_same_address(it.broker, own):
            return warn(
                f"{it.name} listens on {it.broker}, and the broker here is {own}",
                "Set the same broker for both, unless both addresses lead to one server.",
            )
    return ok(f"{counted(evidence.live_workers, 'worker')} with the broker here")


def queues(evidence: Evidence) -> Finding:
    """Each queue with tasks has a worker, and so has the default queue."""
    if evidence.queues is None:
        return skip("the queues could not be read")
    if stuck := [it for it in evidence.queues if it.is_stuck]:
        it = stuck[0]
        reason = it.wait.reason if it.wait else ""
        more = f" and {len(stuck) - 1} more queues" if len(stuck) > 1 else ""
        return fail(
            f"tasks wait in queue {it.name} ({it.kind.value}){more}: nobody takes them", reason
        )
    default = evidence.settings.default_queue
    is_launching = evidence.instance is not None and uses_launcher(evidence.instance)
    needed = [QueueKind.STEPS, *([QueueKind.RUNS] if is_launching else [])]
    held_up = [it for it in evidence.queues if it.wait and it.wait.kind is WaitKind.PAUSED]
    if held_up:
        it = held_up[0]
        more = f" and {len(held_up) - 1} more" if len(held_up) > 1 else ""
        return warn(
            f"queue {it.name} ({it.kind.value}){more} is held up",
            f"{it.wait.reason if it.wait else ''} `queue resume` or `worker resume` ends that.",
        )
    served = {(it.kind, it.name) for it in evidence.queues if it.workers}
    for kind in needed:
        if (kind, default) not in served:
            return fail(
                f"no worker listens on queue {default} for {kind.value}",
                f"Start a worker with -q {default}, or set default_queue: what has no tag for "
                "its queue goes there and waits for ever.",
            )
    names = {it.name for it in evidence.queues if it.workers}
    return ok(f"{counted(names, 'queue')} with workers, nothing is stuck")


def probe(evidence: Evidence) -> Finding:
    """A task gets through each queue to a worker and back; nothing of it is executed."""
    if not evidence.probes:
        return skip("no worker with a free slot listens on a queue")
    if bad := [it for it in evidence.probes if it.answer in (Answer.FAILED, Answer.SILENT)]:
        it, more = bad[0], f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        if it.answer is Answer.FAILED:
            return fail(f"queue {_part(it)}{more}: no probe could be sent", it.problem)
        return fail(
            f"queue {_part(it)}{more}: no worker took the probe within {it.seconds:.0f} s",
            "Its workers have another broker, backend or key_prefix, hang, or refuse the task: see "
            "their logs, and `dagster-taskiq worker ping`.",
        )
    return ok("; ".join(f"{_part(it)} {_way(it)}" for it in evidence.probes))


def _part(it: Probe) -> str:
    return it.queue if it.kind is QueueKind.STEPS else f"{it.queue} (runs)"


def _way(it: Probe) -> str:
    milliseconds = max(1, round(1000 * it.seconds))
    verb = "to a worker and the backend" if it.answer is Answer.ANSWERED else "taken"
    return f"{verb} in {milliseconds} ms"


def _release(version: str) -> str:
    """The first two numbers of a version."""
    return ".".join(version.split(".")[:2])


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
