"""What the trace, Dagster's log, the servers and the processes say: which promise was broken."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from typing import Any

import psutil
from dagster import DagsterEventType, DagsterRun, DagsterRunStatus, RunsFilter

from dagster_taskiq.messages.envelope import QueueKind
from dagster_taskiq_tests.acceptance.harness import Note, forks, until
from dagster_taskiq_tests.soak.director import CHILDREN, WORKERS, Director, descriptors
from dagster_taskiq_tests.soak.jobs import NUMBER_TAG, POOL
from dagster_taskiq_tests.soak.runs import SoakRun
from dagster_taskiq_tests.soak.stack import LEASE_SECONDS, PostgresServer

#: What a loaded machine may add to a time that a promise names.
SLACK_SECONDS = 3.0

#: How long after its run's death a step may still be there.
OUTLIVE_SECONDS = LEASE_SECONDS + 5.0

#: More open files of one kind than that, above what a worker had when it was ready, are a leak:
#: connection pools grow to what is used at once.
SPARE_DESCRIPTORS = 12


#: Ends of a step, or of an attempt of it; and those that a run may succeed with.
_GOOD_ENDS = (DagsterEventType.STEP_SUCCESS, DagsterEventType.STEP_SKIPPED)
_ENDS = (*_GOOD_ENDS, DagsterEventType.STEP_FAILURE, DagsterEventType.STEP_UP_FOR_RETRY)


@dataclass
class Verdict:
    """What came of a soak.

    Attributes:
        statuses: how many runs ended how.
        steps, attempts: executed.
        lost: runs that never ended, and steps that succeeded without having run.
        twice: attempts that were executed by two processes.
        wrong_ends: runs whose end does not fit what their steps did.
        others: what else must not be.
        left: what was left over, by kind.
        failures: how often attempts failed, by why.
    """

    statuses: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    attempts: int = 0
    lost: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    wrong_ends: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)

    @property
    def is_good(self) -> bool:
        """Whether every promise was kept."""
        return not (self.lost or self.twice or self.wrong_ends or self.others or +self.left)


def judge(director: Director, unfinished: list[SoakRun]) -> Verdict:
    """Look at everything; workers must be idle by now."""
    verdict = Verdict(others=[*director.problems, *director.runs.errors])
    for run in unfinished:
        known = director.runs.dagster_run(run)
        status = known.status.value if known else "not there"
        verdict.lost.append(f"run {run.number} ({run.run_id}, {run.job}) is {status}")
    _judge_trace(director, verdict)
    _judge_runs(director, verdict)
    _look_for_leftovers(director, verdict)
    return verdict


def keep_logs(director: Director) -> None:
    """Write Dagster's log of every run to a file, since its database goes with the soak."""
    for run in director.runs.all:
        if run.run_id is None:
            continue
        path = director.stack.directory / f"run-{run.number:03}.events"
        with path.open("w") as output:
            output.write(f"{run.run_id} {run.job} {run.faults}\n")
            for entry in director.stack.instance.all_logs(run.run_id):
                event = entry.dagster_event
                kind = event.event_type_value if event else ""
                when = datetime.fromtimestamp(entry.timestamp, tz=timezone.utc).isoformat()
                print(when, entry.timestamp, entry.step_key, kind, entry.message, file=output)


# --- attempts -----------------------------------------------------------------------------------


def _judge_trace(director: Director, verdict: Verdict) -> None:
    by_attempt: dict[tuple[str, str, int], list[Note]] = defaultdict(list)
    for note in director.notes():
        by_attempt[note.run, note.step, note.attempt].append(note)
        if note.kind == "wrong":
            verdict.others.append(f"wrong values: {note}")
    verdict.attempts = len(by_attempt)
    verdict.steps = len({key[:2] for key in by_attempt})
    for key, notes in by_attempt.items():
        starts = [note for note in notes if note.kind == "start"]
        if len(starts) > 1 or len({note.pid for note in notes}) > 1:
            seen = [(note.kind, note.pid, note.time) for note in notes if note.kind != "tick"]
            verdict.twice.append(f"{key}: {seen}")
        following = by_attempt.get((key[0], key[1], key[2] + 1))
        if following and following[0].time < notes[-1].time:
            overlap = notes[-1].time - following[0].time
            verdict.others.append(f"{key} went on for {overlap:.2f} s beside the next attempt")


# --- runs ---------------------------------------------------------------------------------------


def _judge_runs(director: Director, verdict: Verdict) -> None:
    by_number = {str(run.number): run for run in director.runs.all}
    notes: dict[str, list[Note]] = defaultdict(list)
    for note in director.notes():
        notes[note.run].append(note)
    for record in director.stack.instance.get_run_records(RunsFilter()):
        run = record.dagster_run
        soak_run = by_number.get(run.tags.get(NUMBER_TAG, ""))
        if soak_run is None:
            continue
        verdict.statuses[run.status.value] += 1
        for text in _judge_run(
            director, run, soak_run, record.end_time, notes[run.run_id], verdict
        ):
            verdict.others.append(f"run {soak_run.number} ({run.run_id}): {text}")
        for text in _wrong_ends(director, run, soak_run, notes[run.run_id]):
            verdict.wrong_ends.append(f"run {soak_run.number} ({run.run_id}): {text}")


def _wrong_ends(
    director: Director, run: DagsterRun, soak_run: SoakRun, notes: list[Note]
) -> Iterator[str]:
    """Where the end of a run, as Dagster shows it, does not fit the ends of its steps."""
    ends = {
        str(entry.step_key): entry.dagster_event.event_type
        for entry in director.stack.instance.all_logs(run.run_id, of_type=set(_ENDS))
        if entry.dagster_event
    }
    if run.status is DagsterRunStatus.SUCCESS:
        bad = {key: kind.value for key, kind in ends.items() if kind not in _GOOD_ENDS}
        if bad:
            yield f"it is SUCCESS, and the last ends of these steps are {bad}"
        missing = sorted((_planned_steps(director, run) | {it.step for it in notes}) - ends.keys())
        if missing:
            yield f"it is SUCCESS, and the log has no end of {missing}"
    if run.status is DagsterRunStatus.CANCELED and "it was cancelled" not in soak_run.faults:
        yield "it is CANCELED, and nobody has cancelled it"
    if run.status is DagsterRunStatus.FAILURE and not soak_run.faults:
        unknown = sorted({it.step for it in notes if it.kind == "end"} - ends.keys())
        if unknown:
            yield f"these steps ran to their end, and the log has none: {unknown}"


def _planned_steps(director: Director, run: DagsterRun) -> set[str]:
    """Keys of the steps that the run was to execute, but for those of dynamic outputs."""
    plan = director.stack.instance.get_execution_plan_snapshot(str(run.execution_plan_snapshot_id))
    return {key for key in plan.step_keys_to_execute if "[" not in key}


def _judge_run(
    director: Director,
    run: DagsterRun,
    soak_run: SoakRun,
    end_time: float | None,
    notes: list[Note],
    verdict: Verdict,
) -> Iterator[str]:
    entries = list(director.stack.instance.all_logs(run.run_id))
    events = [entry.dagster_event for entry in entries if entry.dagster_event]
    has_failed_step = _judge_steps(run.run_id, events, notes, verdict)
    text = " ".join(str(entry.message) for entry in entries)
    if "An exception was thrown during execution" in text:
        yield f"its loop failed: {_errors(events)}"
    is_excused = soak_run.faults or "surpassed the configured maximum attempts to resume" in text
    if run.status is DagsterRunStatus.FAILURE and not has_failed_step and not is_excused:
        yield f"it failed, and no step did: {_errors(events) or text[-300:]}"
    if "seconds to cancel" in text:
        yield "its cancel took too long"
    if "seconds to start" in text:
        yield "it did not start, and nobody said why"
    if end_time is not None and notes:
        late = max(note.time for note in notes) - end_time
        if late > _allowed_seconds(run, events):
            yield f"{run.status.value}, and a step went on for {late:.2f} s"


def _judge_steps(run_id: str, events: list[Any], notes: list[Note], verdict: Verdict) -> bool:
    """Whether a step has failed for good; what has succeeded must have run to its end."""
    ended = {(note.step, note.attempt) for note in notes if note.kind == "end"}
    retries: Counter[str] = Counter()
    has_failed = False
    for event in events:
        kind, key = event.event_type, event.step_key or ""
        if kind is DagsterEventType.STEP_UP_FOR_RETRY:
            verdict.failures[_why(event.step_retry_data.error)] += 1
            retries[key] += 1
        elif kind is DagsterEventType.STEP_FAILURE:
            verdict.failures[_why(event.step_failure_data.error)] += 1
            has_failed = True
        elif kind is DagsterEventType.STEP_SUCCESS and (key, retries[key] + 1) not in ended:
            verdict.lost.append(f"{run_id} {key}: it has succeeded and not run")
    return has_failed


def _allowed_seconds(run: DagsterRun, events: list[Any]) -> float:
    """How long after its run's end a step may go on: not at all, unless the run's process died."""
    is_over = run.status is DagsterRunStatus.SUCCESS or (
        run.status is DagsterRunStatus.CANCELED and "process" not in _end_text(events)
    )
    return 0.5 if is_over else OUTLIVE_SECONDS + SLACK_SECONDS


def _why(error: Any) -> str:
    if error is None:
        return "no error"
    while error.cause is not None and error.cls_name == "RetryRequestedFromPolicy":
        error = error.cause
    text = error.message.splitlines()[0]
    if error.cls_name == "StepLost":
        text = text.partition("): ")[2].partition(" (")[0]
    return f"{error.cls_name}: {text[:120]}"


def _errors(events: list[Any]) -> str:
    found = []
    for event in events:
        data = event.event_specific_data
        if getattr(data, "error", None) is not None:
            found.append(f"{data.error.cls_name}: {data.error.message[:300]}")
    return " | ".join(found)


def _end_text(events: list[Any]) -> str:
    ends = [e.message or "" for e in events if e.event_type is DagsterEventType.RUN_CANCELED]
    return ends[-1] if ends else ""


# --- what is left -------------------------------------------------------------------------------


def _look_for_leftovers(director: Director, verdict: Verdict) -> None:
    # a result that is acknowledged, a claim that ends: all a matter of moments now
    for kind in ("claims", "run leases", "in the queues", "pool slots"):
        deadline = time.monotonic() + 2 * LEASE_SECONDS
        while (left := _keys(director)[kind]) and time.monotonic() < deadline:
            time.sleep(0.5)
        if left:
            verdict.left[kind] += left
    for worker in director.ready_workers():
        children = psutil.Process(worker.pid).children(recursive=True)
        names = [_command_of(child) for child in children]
        helpers = sum("guard.py" in name or "resource_tracker" in name for name in names)
        # each slot has one child, or none where that was killed while it was idle: a slot whose
        # child is gone gets another one with its next task
        forking = sum(map(forks, children))  # the fork server and templates
        extra = len(children) - helpers - CHILDREN - forking
        if extra > 0:
            verdict.left["child processes"] += extra
            verdict.others.append(f"{worker.process.name} has these children: {names}")
        growth = descriptors(worker.pid) - (worker.fds or Counter())
        for kind, count in growth.items():
            if count > SPARE_DESCRIPTORS:
                verdict.left["file descriptors"] += count
                verdict.others.append(f"{worker.process.name} has {count} {kind}s more")


def _command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error as error:  # a zombie has none
        return str(error)


def _count_pool_slots(director: Director) -> int:
    info = director.stack.instance.event_log_storage.get_concurrency_info(POOL)
    return len(info.claimed_slots) + len(info.pending_steps)


def _keys(director: Director) -> Counter[str]:
    """What servers and storage still have of runs that are over."""
    found: Counter[str] = Counter()
    prefix = director.stack.broker.key_prefix if director.stack.broker else "dagster-taskiq"
    if isinstance(director.server, PostgresServer):
        held = "lease_until > clock_timestamp()"
        found["claims"] = director.server.count(f"tasks WHERE state = 'claimed' AND {held}")
        found["run leases"] = director.server.count(f"runs WHERE {held}")
        return found + _in_queues(director)
    with director.server.client() as client:
        for key in client.scan_iter(match=f"{prefix}*", count=1000):
            name = key.decode().removeprefix(prefix)
            if name.startswith(":claim:"):
                found["claims"] += 1
            elif name.startswith(":run:") and name.endswith(":loop"):
                found["run leases"] += 1
            elif name.endswith((":waiting", ":payloads", ":in-hand", ":places", ":bell")):
                found["in the queues"] += 1
    return found + _in_queues(director)


def _in_queues(director: Director) -> Counter[str]:
    found = Counter({"pool slots": _count_pool_slots(director)})
    if director.kind not in ("redis", "embedded"):
        for kind in QueueKind:
            found["in the queues"] += asyncio.run(director.stack.depth("dagster", kind=kind))
    return found


def stop_workers(director: Director, verdict: Verdict) -> None:
    """Drain what still runs: idle workers stop at once, with exit code 0."""
    running = [worker for worker in director.workers if not worker.has_ended]
    for worker in running:
        if not worker.is_drained:
            worker.process.terminate()
    for worker in running:
        until(partial(getattr, worker, "has_ended"), f"{worker.process.name} stops")
    assert len(director.workers) >= WORKERS
    for worker in director.workers:
        was_told = worker.is_drained or worker in running
        code = worker.process.process.poll()
        if was_told and code != 0 and not worker.is_harmed:
            verdict.others.append(f"{worker.process.name} was drained and ended with {code}")
