"""The execution loop against a dispatcher that loses, delays, repeats and forgets, as told.

Time is a number that moves when the loop waits, so that leases and minutes of absence cost
nothing. Steps that run, run in this process through the workers' own task code.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from dagster import (
    DagsterEvent,
    DagsterEventType,
    DagsterInstance,
    DagsterRunStatus,
    UrlMetadataValue,
    execute_job,
    reconstructable,
)
from dagster._core.execution.plan.objects import StepFailureData, StepRetryData

from dagster_taskiq import executor as executor_module
from dagster_taskiq._dagster.names import SerializableErrorInfo, pack_value
from dagster_taskiq._dagster.patches import execute_or_resume_run
from dagster_taskiq.backend.base import TaskReport, TaskState
from dagster_taskiq.defaults import (
    FOREIGN_WORKERS_SECONDS,
    IN_HAND_SECONDS,
    POOL_LOOK_SECONDS,
    RECONCILE_SECONDS,
)
from dagster_taskiq.errors import (
    RefusedByServerError,
    ServerError,
    SupersededLoopError,
    UnreachableServerError,
)
from dagster_taskiq.execution import attempt_log, tasks
from dagster_taskiq.execution.arrivals import Arrival, report_step_start
from dagster_taskiq.execution.tasks import TaskRunner
from dagster_taskiq.loop import endings, holding
from dagster_taskiq.loop.core_execution_loop import core_execution_loop
from dagster_taskiq.loop.dispatcher import Dispatcher, Inspection, StepTask
from dagster_taskiq.messages.attempt_ends import AttemptEnd, EndOutcome
from dagster_taskiq.messages.envelope import QueueKind, step_task_id
from dagster_taskiq.messages.queue_looks import QueueLook
from dagster_taskiq.messages.queue_waits import Listeners, QueueWait, WaitKind
from dagster_taskiq.messages.results import NOWHERE, Outcome, Place, TaskResult
from dagster_taskiq.messages.withheld_steps import Withheld
from dagster_taskiq_tests.unit import loop_jobs as jobs

LEASE_SECONDS = 30.0

PLACE = Place("w@h", "worker-id", "h", 4711, 2)

REFUSAL = TaskResult(Outcome.REFUSED, PLACE, reason="It has another dagster.yaml.")

#: What a dispatcher does with a task that is sent: it runs it and delivers the result.
RUN = "run"
#: It runs it, and the result is stored, but no word of it arrives.
RUN_UNHEARD = "run unheard"
#: It runs it to its end, and then neither claim nor result is there.
RUN_AND_LOSE = "run and lose"
#: The message is gone, nobody knows of it.
VANISH = "vanish"
#: It waits in a queue.
WAIT = "wait"
#: A worker had claimed it and died, before it began or after.
EXPIRE_UNSTARTED = "expire unstarted"
EXPIRE_STARTED = "expire started"
#: A worker has dropped its message, since the run seemed to have no loop.
DROP = "drop"
#: A worker cannot execute it, and word of that arrives, or not.
REFUSE = "refuse"
REFUSE_UNHEARD = "refuse unheard"
#: A worker has it and goes on and on.
HOLD = "hold"


def arrival_of(task: StepTask) -> Arrival:
    return Arrival(task.queue, task.attempt, 0.25)


class Clock:
    """The loop's clock."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class FakeDispatcher(Dispatcher):
    """Does with each step's task what ``plan`` says, one word for each time it is sent."""

    def __init__(self, clock: Clock, instance: DagsterInstance) -> None:
        self.clock = clock
        self.instance = instance
        self.plan: dict[str, list[str]] = defaultdict(list)
        self.sent: list[StepTask] = []
        self.batches: list[int] = []
        self.states: dict[str, TaskState] = {}
        self.stored: dict[str, TaskResult] = {}
        self.payloads: dict[str, Mapping[str, Any]] = {}
        #: Those that a worker has begun with by the log, and those that it has executed.
        self.begun: set[str] = set()
        self.executed: set[str] = set()
        self.arrived: list[tuple[str, TaskResult]] = []
        self.acknowledged: list[str] = []
        self.reopened: list[str] = []
        self.cancelled: list[str] = []
        self.inspections: list[float] = []
        #: By task id, where no worker renews it any more.
        self.leases_end_at: dict[str, float] = {}
        #: By task id, where another worker than the first has it.
        self.places: dict[str, Place] = {}
        self.server_clock_stepped_by = 0.0
        self.is_conclusive = True
        self.is_deleted = False
        self.why_waiting: dict[str, QueueWait] = {}
        self.listeners: dict[str, Listeners] = {}
        #: Places whose tasks are taken before a look.
        self.taken: set[int] = set()
        #: The queues that were looked into, each time.
        self.looks: list[str] = []
        self.trouble, self.troubled_at = "", float("-inf")
        #: Until when ``open``, ``submit``, ``inspect`` and ``cancel`` fail, and how.
        self.away_until = 0.0
        self.error: ServerError = UnreachableServerError(
            "redis://fake", "Cannot reach redis://fake."
        )
        #: Which of them fail.
        self.failing = {"open", "submit", "inspect", "cancel"}
        self.on_wait: Callable[[int], None] = lambda _: None
        self.waits = 0
        self.closed: list[bool] = []
        self.ended: list[AttemptEnd] = []
        self.withheld: list[Withheld] = []

    # --- what happens to tasks ---

    def submit(self, tasks: Sequence[StepTask]) -> None:
        self._reach("submit")
        self.batches.append(len(tasks))
        for task in tasks:
            self.sent.append(task)
            self.payloads[task.task_id] = task.make_payload()
            words = self.plan[task.step_key]
            self._do(words.pop(0) if words else RUN, task)

    def _do(self, word: str, task: StepTask) -> None:
        key = task.task_id
        if word == RUN:
            self.arrived.append((key, self._done(task)))
        elif word == REFUSE:
            self.states[key] = TaskState.REFUSED
            self.stored[key] = REFUSAL
            self.arrived.append((key, REFUSAL))
        elif word == REFUSE_UNHEARD:
            self.states[key] = TaskState.REFUSED
            self.stored[key] = REFUSAL
        elif word == RUN_UNHEARD:
            self._done(task)
        elif word == RUN_AND_LOSE:
            self.execute(task)
            self.states[key] = TaskState.EXPIRED
        elif word == EXPIRE_UNSTARTED:
            self.states[key] = TaskState.EXPIRED
        elif word == DROP:
            self.states[key] = TaskState.DROPPED
        elif word == EXPIRE_STARTED:
            self.start(task)
            self.states[key] = TaskState.EXPIRED
        elif word == HOLD:
            self.start(task)
            self.states[key] = TaskState.CLAIMED
        else:
            assert word in (VANISH, WAIT)
            self.states[key] = TaskState.UNKNOWN
            if word == WAIT:
                self.waiting.add(key)

    @property
    def waiting(self) -> set[str]:
        return self.__dict__.setdefault("_waiting", set())

    def _done(self, task: StepTask) -> TaskResult:
        result = self.execute(task)
        self.states[task.task_id] = TaskState.DONE
        self.stored[task.task_id] = result
        return TaskResult.from_bytes(result.to_bytes())

    def execute(self, task: StepTask) -> TaskResult:
        """What a worker does; also one with a signing key executes each attempt that is sent."""
        is_held = task.task_id in self.begun
        self.executed.add(task.task_id)
        runner = TaskRunner(refuses_copies=not is_held)
        result = runner.execute_plan(task.make_payload(), PLACE, arrival_of(task))
        assert result.outcome is not Outcome.COPY, result.reason
        return result

    def start(self, task: StepTask) -> None:
        """Log what a worker logs before it runs a step."""
        self.begun.add(task.task_id)
        (run,) = self.instance.get_runs(limit=1)
        report_step_start(self.instance, run, task.step_key, PLACE, arrival_of(task))

    def finish(self, task: StepTask) -> None:
        """What was held is done."""
        self.arrived.append((task.task_id, self._done(task)))

    # --- the loop's calls ---

    def open(self) -> None:
        self._reach("open")

    def _reach(self, what: str) -> None:
        if self.clock.now < self.away_until and what in self.failing:
            raise self.error

    def wait(self, timeout_seconds: float) -> list[tuple[str, TaskResult]]:
        self.waits += 1
        assert self.waits < 5000, "the loop never ends"
        self.on_wait(self.waits)
        if not self.arrived:
            self.clock.now += timeout_seconds + 0.001
        arrived, self.arrived = self.arrived, []
        return arrived

    def acknowledge(self, task_ids: Collection[str]) -> None:
        self.acknowledged += task_ids

    def inspect(self, tasks: Sequence[StepTask]) -> Inspection:
        self._reach("inspect")
        self.inspections.append(self.clock.now)
        unknown = [t for t in tasks if self.states.get(t.task_id) is TaskState.UNKNOWN]
        return Inspection(
            is_conclusive=self.is_conclusive,
            reports={t.task_id: self._report(t.task_id) for t in tasks},
            absent=frozenset(t.task_id for t in unknown) - self.waiting,
            waits=self.why_waiting,
            listeners=self.listeners,
            trouble=self.trouble,
            troubled_at=self.troubled_at,
        )

    def _report(self, task_id: str) -> TaskReport:
        state = self.states.get(task_id, TaskState.UNKNOWN)
        if state is not TaskState.CLAIMED:
            return TaskReport(state)
        left = self.leases_end_at.get(task_id, self.clock.now + LEASE_SECONDS) - self.clock.now
        left -= self.server_clock_stepped_by
        place = self.places.get(task_id, PLACE)
        return TaskReport(state, place, left) if left > 0 else TaskReport(TaskState.EXPIRED)

    def look_into(self, queue: str, tasks: Sequence[StepTask]) -> QueueLook:
        waiting = [it.task_id for it in self.sent if it.task_id in self.waiting]
        places = {it: place for place, it in enumerate(waiting, 1) if place not in self.taken}
        self.looks.append(queue)
        ids = [task.task_id for task in tasks if task.task_id in places]
        return QueueLook(len(self.waiting), {task_id: places[task_id] for task_id in ids})

    def fetch(self, task_ids: Sequence[str]) -> list[tuple[str, TaskResult]]:
        return [(key, self.stored[key]) for key in task_ids if key in self.stored]

    def cancel(self, tasks: Sequence[StepTask], reason: str) -> Mapping[str, TaskState]:
        self._reach("cancel")
        answers = {}
        for task in tasks:
            self.cancelled.append(task.step_key)
            state = self.states.get(task.task_id, TaskState.UNKNOWN)
            if state in (TaskState.UNKNOWN, TaskState.REFUSED):
                state = self.states[task.task_id] = TaskState.CANCELLED
            answers[task.task_id] = state
        return answers

    def condemn(self, task_id: str) -> bool:
        if self._report(task_id).state in (TaskState.CLAIMED, TaskState.DONE):
            return False
        self.states[task_id] = TaskState.LOST
        return True

    def reopen(self, task_id: str) -> bool:
        open_states = (
            TaskState.UNKNOWN,
            TaskState.EXPIRED,
            TaskState.DROPPED,
            TaskState.REFUSED,
        )
        if self.states.get(task_id) not in open_states:
            return False
        self.reopened.append(task_id)
        self.states[task_id] = TaskState.UNKNOWN
        return True

    def note_end(self, end: AttemptEnd) -> None:
        self.ended.append(end)

    def note_withheld(self, withheld: Withheld) -> None:
        if withheld != (self.withheld[-1] if self.withheld else Withheld()):
            self.withheld.append(withheld)

    def close(self, *, leave_running: bool = False) -> None:
        self.closed.append(leave_running)


@pytest.fixture(autouse=True)
def _no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DagsterInstance]:
    """One for all, since making its databases takes longer than a run; each test has its run."""
    with DagsterInstance.local_temp(str(tmp_path_factory.mktemp("instance"))) as instance:
        yield instance


@pytest.fixture
def fake(instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> FakeDispatcher:
    clock = Clock()
    fake = FakeDispatcher(clock, instance)
    loop = partial(core_execution_loop, now=clock.monotonic)
    monkeypatch.setattr(executor_module, "core_execution_loop", loop)
    monkeypatch.setattr(executor_module, "_open_dispatcher", lambda *_: fake)
    return fake


class Ran:
    """A run that is over, and its log."""

    def __init__(self, instance: DagsterInstance, run_id: str) -> None:
        run = instance.get_run_by_id(run_id)
        assert run
        self.status = run.status
        self.run_id = run_id
        self.events = [
            entry.dagster_event
            for entry in instance.all_logs(run_id)
            if entry.dagster_event is not None
        ]
        self.messages = [entry.message for entry in instance.all_logs(run_id)]

    def count(self, kind: DagsterEventType, step: str | None = None) -> int:
        return sum(
            event.event_type is kind and (step is None or event.step_key == step)
            for event in self.events
        )

    def said(self, text: str) -> int:
        """How often a message has the text in it."""
        return sum(text in str(message) for message in self.messages)

    def error(self, step: str) -> str:
        """Of the step's failure."""
        (event,) = (e for e in self.events if e.is_step_failure and e.step_key == step)
        error = event.step_failure_data.error
        assert error
        return str(error.message)

    def causes(self, step: str) -> list[str]:
        """The classes of the errors that the step's failure came from."""
        (event,) = (e for e in self.events if e.is_step_failure and e.step_key == step)
        names, error = [], event.step_failure_data.error
        while error and (error := error.cause):
            names.append(str(error.cls_name))
        return names


def execute(
    job: Any, instance: DagsterInstance, config: Mapping[str, Any] | None = None, **options: Any
) -> Ran:
    run_config = {"execution": {"config": config or {}}}
    with execute_job(
        reconstructable(job), instance, run_config=run_config, raise_on_error=False, **options
    ) as result:
        return Ran(instance, result.run_id)


def run_error(ran: Ran) -> str:
    """Of the run's end."""
    ends = [event for event in ran.events if event.is_job_failure or event.is_failure]
    data = [event.event_specific_data for event in ends]
    return " ".join(it.error.to_string() for it in data if getattr(it, "error", None))


SUCCESS, FAILURE = DagsterRunStatus.SUCCESS, DagsterRunStatus.FAILURE


# --- the good case ---


def test_steps_are_sent_as_they_become_ready(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """Those that are ready together in one call, each under the id of its attempt, once."""
    ran = execute(jobs.diamond_job, instance)
    assert ran.status is SUCCESS
    assert [task.step_key for task in fake.sent] == ["one", "left", "right", "total"]
    assert fake.batches == [1, 2, 1]
    for task in fake.sent:
        assert task.task_id == step_task_id(ran.run_id, task.step_key, 1)
        assert (task.queue, task.priority, task.attempt) == ("dagster", 5, 1)
    assert sorted(fake.acknowledged) == sorted(task.task_id for task in fake.sent)
    assert fake.closed == [False]
    assert fake.inspections == []


def test_queues_and_priorities_come_from_tags(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """The highest priority first; Dagster's own tag does not count, which is said once."""
    ran = execute(
        jobs.priority_job,
        instance,
        {"default_queue": "q"},
        tags={"dagster-taskiq/run_priority": "2"},
    )
    assert [(task.step_key, task.queue, task.priority) for task in fake.sent] == [
        ("urgent", "short", 10),
        ("mistaken", "q", 7),
        ("unhurried", "q", 3),
    ]
    assert ran.said("dagster/priority") == 1


def test_a_job_without_steps_needs_no_dispatcher(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """It ends at once, without a server."""
    assert execute(jobs.empty_job, instance).status is SUCCESS
    assert fake.closed == []


def test_max_concurrent_bounds_what_is_in_flight(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """Queued steps count, since they may run at any moment."""
    ran = execute(jobs.diamond_job, instance, {"max_concurrent": 1})
    assert ran.status is SUCCESS
    assert fake.batches == [1, 1, 1, 1]


# --- reconciliation ---


def test_a_lost_wake_up_is_healed(fake: FakeDispatcher, instance: DagsterInstance) -> None:
    """The result is stored and nobody says so: the next look finds it."""
    fake.plan["one"] = [RUN_UNHEARD]
    ran = execute(jobs.chain_job, instance)
    assert ran.status is SUCCESS
    assert [task.step_key for task in fake.sent] == ["one", "add_one", "add_one_2"]
    assert len(fake.inspections) == 1


def test_a_result_that_arrives_twice_counts_once(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """Once fetched by the look, once by the late wake-up; and one of nobody's is ignored."""
    fake.plan["one"] = [RUN_UNHEARD]

    def late(_: int) -> None:
        for key, result in fake.stored.items():
            fake.arrived.append((key, result))
        fake.arrived.append(("nobody's", TaskResult(Outcome.ERROR, PLACE, reason="stale")))

    fake.on_wait = lambda number: late(number) if len(fake.sent) > 1 else None
    ran = execute(jobs.chain_job, instance)
    assert ran.status is SUCCESS
    assert ran.count(DagsterEventType.STEP_SUCCESS, "one") == 1
    assert ran.said("stale") == 0


def test_a_vanished_task_is_sent_again(fake: FakeDispatcher, instance: DagsterInstance) -> None:
    """Under the same id, after it was missing for long enough, without using up a retry."""
    fake.plan["one"] = [VANISH, VANISH, RUN]
    ran = execute(jobs.single_job, instance)
    assert ran.status is SUCCESS
    assert len({task.task_id for task in fake.sent}) == 1
    assert [task.attempt for task in fake.sent] == [1, 1, 1]
    assert len(fake.reopened) == 2
    assert ran.count(DagsterEventType.STEP_UP_FOR_RETRY) == 0
    assert ran.said("again") == 2
    # twice absent for longer than a message may be in a worker's hand
    assert fake.clock.now - 1000 >= 2 * IN_HAND_SECONDS


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_a_result_of_a_task_that_is_to_be_sent_again_counts(
    fake: FakeDispatcher, instance: DagsterInstance, is_interrupted: bool
) -> None:
    """Its message turns up while the broker is away: it is not sent a second time."""
    fake.plan["one"], fake.failing = [VANISH], {"submit"}

    def happen(_: int) -> None:
        if fake.reopened and not fake.stored:
            fake.finish(fake.sent[0])
            fake.away_until = fake.clock.now + 50
            if is_interrupted:
                os.kill(os.getpid(), signal.SIGTERM)
        elif not fake.reopened and fake.sent:
            fake.away_until = 1e12

    fake.on_wait = happen
    ran = execute(jobs.chain_job, instance)
    assert ran.count(DagsterEventType.STEP_SUCCESS, "one") == 1
    if is_interrupted:
        assert "DagsterExecutionInterruptedError" in run_error(ran)
    else:
        assert ran.status is SUCCESS
    steps = [task.step_key for task in fake.sent]
    assert steps == (["one"] if is_interrupted else ["one", "add_one", "add_one_2"])


def test_a_waiting_task_is_left_in_its_queue(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """However long it waits there."""
    fake.plan["one"] = [WAIT]

    def serve(_: int) -> None:
        if fake.clock.now > 1000 + 3600 and not fake.stored:
            fake.finish(fake.sent[0])

    fake.on_wait = serve
    assert execute(jobs.single_job, instance).status is SUCCESS
    assert len(fake.sent) == 1
    assert fake.reopened == []


def test_an_expired_claim_of_an_unstarted_attempt_is_sent_again(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """Under the same id, and without using up a retry, of which there is none here."""
    fake.plan["one"] = [EXPIRE_UNSTARTED, EXPIRE_UNSTARTED, RUN]
    ran = execute(jobs.single_job, instance)
    assert ran.status is SUCCESS
    assert len({task.task_id for task in fake.sent}) == 1
    assert len(fake.sent) == 3


def test_a_dropped_task_is_sent_again_at_once(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """Also where other tasks wait in its queue, so that nobody can see that it is not there."""
    fake.plan["one"] = [DROP, DROP, RUN]
    fake.is_conclusive = False
    ran = execute(jobs.single_job, instance)
    assert ran.status is SUCCESS
    assert [task.attempt for task in fake.sent] == [1, 1, 1]
    assert fake.clock.now < 1000 + 10
    assert ran.count(DagsterEventType.STEP_UP_FOR_RETRY) == 0


def test_an_expired_claim_of_a_started_attempt_fails(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """Without a retry policy the step fails, with the reason; it is not run a second time."""
    fake.plan["one"] = [EXPIRE_STARTED]
    ran = execute(jobs.single_job, instance)
    assert ran.status is FAILURE
    assert len(fake.sent) == 1
    assert "lease" in ran.error("one")
    assert set(fake.states.values()) == {TaskState.LOST}


def test_an_expired_claim_of_a_started_attempt_is_retried_by_its_policy(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """Each loss is an attempt, with an id of its own, until the policy is exhausted."""
    fake.plan["patient"] = [EXPIRE_STARTED, EXPIRE_STARTED]
    ran = execute(jobs.patient_job, instance)
    assert ran.status is SUCCESS
    attempts = [task for task in fake.sent if task.step_key == "patient"]
    assert [task.attempt for task in attempts] == [1, 2, 3]
    assert len({task.task_id for task in attempts}) == 3
    assert ran.count(DagsterEventType.STEP_UP_FOR_RETRY) == 2


def test_too_many_lost_attempts_fail_the_step(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """As too many failed ones do."""
    fake.plan["patient"] = [EXPIRE_STARTED] * 3
    ran = execute(jobs.patient_job, instance)
    assert ran.status is FAILURE
    assert ran.count(DagsterEventType.STEP_UP_FOR_RETRY) == 2
    assert [task.step_key for task in fake.sent] == ["patient"] * 3


def test_a_lost_attempt_after_a_retry_is_judged_by_its_own_events(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """That the first attempt started says nothing of the second, which is sent again."""
    fake.plan["patient"] = [EXPIRE_STARTED, EXPIRE_UNSTARTED, RUN]
    ran = execute(jobs.patient_job, instance)
    assert ran.status is SUCCESS
    attempts = [task.attempt for task in fake.sent if task.step_key == "patient"]
    assert attempts == [1, 2, 2]
    assert ran.count(DagsterEventType.STEP_UP_FOR_RETRY) == 1


def test_an_expired_claim_whose_log_shows_success_counts_as_success(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """The worker died after the step; what depends on it gets its output."""
    fake.plan["one"] = [RUN_AND_LOSE]
    ran = execute(jobs.chain_job, instance)
    assert ran.status is SUCCESS
    assert [task.step_key for task in fake.sent] == ["one", "add_one", "add_one_2"]
    assert ran.count(DagsterEventType.STEP_SUCCESS, "one") == 1


def test_dynamic_outputs_of_a_lost_result_are_known(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """The mapped steps are those that the log shows."""
    fake.plan["numbers"] = [RUN_AND_LOSE]
    assert execute(jobs.dynamic_job, instance).status is SUCCESS
    assert sum("[" in task.step_key for task in fake.sent) == 4


def test_the_log_of_a_run_is_read_once_for_all_that_are_judged(
    fake: FakeDispatcher, instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an outage there may be hundreds; of what each came to only its step's events are."""
    for step in ("left", "right"):
        fake.plan[step] = [RUN_AND_LOSE]
    reads: list[None] = []
    all_logs = DagsterInstance.all_logs

    def note(self: DagsterInstance, *arguments: Any, **options: Any) -> Any:
        reads.append(None)
        return all_logs(self, *arguments, **options)

    steps: list[str] = []
    read_step_log = attempt_log.read_step_log

    def note_step(*arguments: Any, **options: Any) -> Any:
        steps.extend([arguments[2]] if options.get("with_outputs") else [])
        return read_step_log(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(DagsterInstance, "all_logs", note)
        patch.setattr(attempt_log, "read_step_log", note_step)
        with execute_job(reconstructable(jobs.diamond_job), instance) as result:
            assert result.success
    assert len(reads) == 1
    assert sorted(steps) == ["left", "right"]


def test_nothing_is_judged_before_the_watch_is_conclusive(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """After an outage a missing claim proves nothing until a lease has been watched."""
    fake.plan["one"] = [EXPIRE_STARTED]
    fake.is_conclusive = False

    def late(_: int) -> None:
        fake.is_conclusive = fake.clock.now > 1000 + 300

    fake.on_wait = late
    assert execute(jobs.single_job, instance).status is FAILURE
    assert fake.clock.now >= 1300


def test_a_dead_worker_s_claim_is_judged_when_its_lease_ends(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """Without waiting for the next round, since the loop has seen how long it has to go."""
    fake.plan["one"] = [HOLD]

    def die(_: int) -> None:
        if fake.clock.now > 1100:
            fake.leases_end_at.setdefault(fake.sent[0].task_id, fake.clock.now + 30)
            fake.on_wait = lambda _: None

    fake.on_wait = die
    ran = execute(jobs.single_job, instance)
    assert ran.status is FAILURE
    (ends_at,) = fake.leases_end_at.values()
    assert ends_at <= fake.clock.now < ends_at + 0.5
    assert "The worker is gone" in ran.error("one")


@pytest.mark.parametrize("fault", ["deleted", "clock stepped far", "clock stepped a little"])
def test_a_claim_that_ends_before_its_time_is_judged_when_its_worker_has_stopped(
    fake: FakeDispatcher, instance: DagsterInstance, fault: str
) -> None:
    """Its worker may execute for a lease after the loop has seen the claim for the last time."""
    fake.plan["patient"] = [HOLD, RUN]
    gone_at: list[float] = []

    def strike(_: int) -> None:
        if fake.clock.now > 1100:
            gone_at.append(fake.clock.now)
            (task,) = fake.sent
            if fault == "deleted":
                fake.states[task.task_id] = TaskState.EXPIRED
            else:
                fake.leases_end_at[task.task_id] = fake.clock.now + 28
                fake.server_clock_stepped_by = 60 if "far" in fault else 27
            fake.on_wait = lambda _: None

    fake.on_wait = strike
    ran = execute(jobs.patient_job, instance)
    assert ran.status is SUCCESS
    assert [task.attempt for task in fake.sent if task.step_key == "patient"] == [1, 2]
    assert fake.clock.now - gone_at[0] >= LEASE_SECONDS
    assert fake.clock.now - gone_at[0] < LEASE_SECONDS + 2 * RECONCILE_SECONDS
    (retry,) = (event for event in ran.events if event.is_step_up_for_retry)
    assert "was gone before its lease had ended" in str(retry.step_retry_data.error)


def test_a_lost_claim_after_an_outage_names_the_outage(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """Not the worker, which did what it had to."""
    fake.plan["one"] = [HOLD]

    def happen(_: int) -> None:
        if fake.clock.now > 1010:
            fake.trouble, fake.troubled_at = "Cannot reach redis://fake.", fake.clock.now + 1
            fake.states[fake.sent[0].task_id] = TaskState.EXPIRED
            fake.on_wait = lambda _: None

    fake.on_wait = happen
    assert "Cannot reach redis://fake." in execute(jobs.single_job, instance).error("one")


def test_a_claim_that_turns_up_after_all_is_waited_for(
    fake: FakeDispatcher, instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backend refuses the judgement: the worker has asserted its claim again."""
    fake.plan["one"] = [EXPIRE_STARTED]

    def condemn(task_id: str) -> bool:
        fake.states[task_id] = TaskState.CLAIMED
        fake.on_wait = lambda _: fake.finish(fake.sent[0])
        return False

    monkeypatch.setattr(fake, "condemn", condemn)
    ran = execute(jobs.single_job, instance)
    assert ran.status is SUCCESS
    assert len(fake.sent) == 1


def test_a_done_task_whose_result_is_gone_is_judged_by_the_log(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """It expired unread: the log has the step's end."""
    fake.plan["one"] = [RUN_UNHEARD]
    fake.on_wait = lambda _: fake.stored.clear()
    assert execute(jobs.chain_job, instance).status is SUCCESS


# --- results of all kinds ---


def deliver(fake: FakeDispatcher, step: str, *results: TaskResult) -> None:
    """Answer each time that the step is sent with one of these."""
    fake.plan[step] = [HOLD] * len(results)
    left = list(results)

    def answer(_: int) -> None:
        held = [t for t in fake.sent if fake.states.get(t.task_id) is TaskState.CLAIMED]
        for task in held:
            if left:
                fake.states[task.task_id] = TaskState.DONE
                fake.arrived.append((task.task_id, left.pop(0)))

    fake.on_wait = answer


def test_a_dead_child_is_a_failed_attempt_with_its_reason(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """The UI shows worker, host, pid and how it died."""
    died = TaskResult(
        Outcome.DIED, PLACE, reason="its process was killed by SIGKILL.", exit_code=-9
    )
    deliver(fake, "one", died)
    error = execute(jobs.single_job, instance)
    assert error.status is FAILURE
    for text in ("SIGKILL", "w@h", "4711"):
        assert text in error.error("one")


def test_a_dead_child_is_retried_by_the_policy(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """Its death is a failure like any other."""
    deliver(fake, "patient", TaskResult(Outcome.DIED, PLACE, reason="killed"))
    assert execute(jobs.patient_job, instance).status is SUCCESS


def test_events_that_are_not_in_the_log_do_not_count(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """An end is one if the log has it; what is missing after it is said."""
    fake.plan["one"] = [HOLD]
    unlogged = TaskResult(Outcome.UNLOGGED, PLACE, reason="no space left")

    def answer(_: int) -> None:
        (task,) = fake.sent
        if fake.states[task.task_id] is TaskState.CLAIMED:
            fake.finish(task)  # it logs all its events
            fake.arrived[-1] = (task.task_id, unlogged)

    fake.on_wait = answer
    ended = execute(jobs.single_job, instance)
    assert ended.status is SUCCESS
    assert ended.said("events after its end are lost: no space left") == 1


def test_a_step_without_an_end_in_the_log_is_tried_again(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """Whatever its worker has seen of it."""
    deliver(fake, "patient", TaskResult(Outcome.UNLOGGED, PLACE, reason="no space left"))
    assert execute(jobs.patient_job, instance).status is SUCCESS
    deliver(fake, "one", TaskResult(Outcome.UNLOGGED, PLACE, reason="no space left"))
    failed = execute(jobs.single_job, instance)
    assert failed.status is FAILURE
    assert "no space left" in failed.error("one")


def test_an_attempt_that_could_not_begin_fails_with_the_reason(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """The code could not be loaded on the worker, for example."""
    deliver(fake, "one", TaskResult(Outcome.ERROR, PLACE, reason="No module named 'their_code'"))
    assert "their_code" in execute(jobs.single_job, instance).error("one")


def test_code_that_cannot_be_loaded_says_where_and_what(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """Worker, host, directory and what was looked for; Dagster's own error is the cause."""
    submit = fake.submit

    def submit_lost(tasks: Sequence[StepTask]) -> None:
        submit([replace(it, make_payload=partial(_payload_without_code, it)) for it in tasks])

    fake.submit = submit_lost  # type: ignore[method-assign]
    ran = execute(jobs.single_job, instance)
    error = ran.error("one")
    for text in ("worker w@h (host h", 'job "single_job"', "from no_such_module import"):
        assert text in error
    assert f"directory of the worker: {Path.cwd()}" in error
    assert "install it as a package" in error
    causes = ran.causes("one")
    assert causes[0] == "UnloadableCodeError"
    assert "ModuleNotFoundError" in causes


def _payload_without_code(task: StepTask) -> Mapping[str, Any]:
    """As if the module of the jobs were not there any more."""
    payload = json.dumps(task.make_payload())
    return dict(json.loads(payload.replace(jobs.__name__, "no_such_module")))


def test_an_interrupted_step_is_retried_and_shows_why_and_where(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """The worker knows why, and the step's process where it was; Dagster's log has one end."""
    fake.plan["interrupted_once"] = [HOLD]

    def answer(_: int) -> None:
        fake.on_wait = lambda _: None
        (task,) = fake.sent
        result = fake.execute(task)
        assert result.is_cancelled
        told = replace(result, is_cancelled=False, reason=f"{result.reason[:-1]} after a drain.")
        fake.arrived.append((task.task_id, told))

    fake.on_wait = answer
    ran = execute(jobs.interrupted_job, instance)
    assert ran.status is SUCCESS
    assert ran.count(DagsterEventType.STEP_FAILURE) == 0
    (retry,) = (event for event in ran.events if event.is_step_up_for_retry)
    error = retry.step_retry_data.error
    assert "It was stopped after a drain." in error.message
    assert "in interrupted_once" in error.to_string(), "where it was"


def test_a_result_without_an_end_is_a_failure(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """A worker that says it has finished and shows no event of it."""
    deliver(fake, "one", TaskResult(Outcome.FINISHED, PLACE))
    assert "without saying" in execute(jobs.single_job, instance).error("one")


@pytest.mark.parametrize("text", ["garbage", "{}", '{"__class__": "NoSuchEvent"}', "null"])
def test_events_that_cannot_be_read_fail_the_step_alone(
    text: str, fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """A worker of another version of Dagster does not end the run's loop with an exception."""
    deliver(fake, "one", TaskResult(Outcome.FINISHED, PLACE, events=(text,)))
    ran = execute(jobs.single_job, instance)
    assert ran.status is FAILURE
    assert ran.count(DagsterEventType.STEP_FAILURE, "one") == 1
    assert "cannot be read" in ran.error("one")


def test_an_error_that_cannot_be_read_fails_the_step_alone(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """Nor does an error that is none."""
    deliver(fake, "one", TaskResult(Outcome.ERROR, PLACE, error={"__class__": "NoSuchError"}))
    assert "cannot be read" in execute(jobs.single_job, instance).error("one")


def test_a_result_that_cannot_be_read_is_judged_by_the_log(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """Its step had succeeded all the same, and what depends on it goes on."""
    fake.plan["one"] = [RUN_UNHEARD]

    def spoil(_: int) -> None:
        for key in fake.stored:
            fake.stored[key] = TaskResult(Outcome.FINISHED, PLACE, events=("garbage",))

    fake.on_wait = spoil
    ran = execute(jobs.chain_job, instance)
    assert ran.status is SUCCESS
    assert ran.count(DagsterEventType.STEP_SUCCESS, "one") == 1


# --- outages ---


REFUSED = RefusedByServerError("redis://fake", "redis://fake refuses the credentials.")
FINAL = RefusedByServerError("redis://fake", "redis://fake refuses it for good.", is_final=True)


def away_from(fake: FakeDispatcher, wait: int, seconds: float) -> None:
    """From the loop's n-th wait on."""

    def leave(number: int) -> None:
        if number == wait:
            fake.away_until = fake.clock.now + seconds

    fake.on_wait = leave


def test_an_outage_of_the_broker_is_ridden_out(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """Longer than the patience with what begins. It is said once, the steps are sent after it."""
    away_from(fake, 1, 1000)
    ran = execute(jobs.diamond_job, instance)
    assert ran.status is SUCCESS
    assert len(fake.sent) == 4
    assert ran.said("Cannot reach redis://fake") == 1


def test_a_run_that_begins_during_an_outage_waits(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """Its log says once what for."""
    fake.away_until = fake.clock.now + 250
    ran = execute(jobs.diamond_job, instance)
    assert ran.status is SUCCESS
    assert len(fake.sent) == 4
    assert ran.said("Cannot reach redis://fake") == 1


@pytest.mark.parametrize(("patience", "waits"), [(40.0, True), (0.0, False)])
def test_a_run_that_begins_waits_no_longer_than_is_set(
    fake: FakeDispatcher, instance: DagsterInstance, patience: float, waits: bool
) -> None:
    """Then it fails with the server's sentence, and has sent nothing."""
    fake.away_until = 1e12
    ran = execute(jobs.single_job, instance, {"server_patience_seconds": patience})
    assert ran.status is FAILURE
    assert fake.sent == []
    assert patience <= fake.clock.now - 1000 <= patience + 5
    assert ran.said("Cannot reach redis://fake. The run goes on") == waits
    assert fake.closed == [False]


@pytest.mark.parametrize("error", [REFUSED, FINAL])
def test_a_run_that_is_refused_when_it_begins_fails_at_once(
    fake: FakeDispatcher, instance: DagsterInstance, error: ServerError
) -> None:
    """The settings are wrong, most likely."""
    fake.away_until, fake.error = fake.clock.now + 10, error
    ran = execute(jobs.single_job, instance)
    assert ran.status is FAILURE
    assert fake.clock.now == 1000


def test_an_interrupt_ends_the_wait_of_a_run_that_begins(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """At once; it says that it was interrupted, and nothing was sent."""
    fake.away_until = 1e12
    interrupt_once(fake, 10, lambda: None)
    ran = execute(jobs.single_job, instance)
    assert fake.sent == []
    assert fake.clock.now - 1010 < 5
    assert "DagsterExecutionInterruptedError" in run_error(ran)


def test_a_refusal_in_the_middle_of_a_run_is_waited_for(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """Users are being replaced, say. It is said once."""
    fake.error = REFUSED
    away_from(fake, 1, 100)
    ran = execute(jobs.diamond_job, instance)
    assert ran.status is SUCCESS
    assert ran.said("refuses the credentials") == 1


@pytest.mark.parametrize(("error", "seconds"), [(REFUSED, 300), (FINAL, 0)])
def test_a_refusal_that_stays_or_is_final_fails_a_run(
    fake: FakeDispatcher, instance: DagsterInstance, error: ServerError, seconds: float
) -> None:
    """After the patience, and at once; with the server's words."""
    fake.error = error
    away_from(fake, 1, 1e9)
    ran = execute(jobs.diamond_job, instance)
    assert ran.status is FAILURE
    assert str(error) in run_error(ran)
    assert seconds <= fake.clock.now - 1000 <= seconds + 20


@pytest.mark.parametrize("error", [REFUSED, FINAL])
def test_a_cancel_is_told_until_it_is_heard(
    fake: FakeDispatcher, instance: DagsterInstance, error: ServerError
) -> None:
    """Whatever the server says to it; the run's end is an interrupt, and its step has stopped."""
    fake.plan["one"], fake.error, fake.failing = [HOLD], error, {"cancel"}
    told: list[float] = []

    def then() -> None:
        if not told:
            told.append(fake.clock.now)
            fake.away_until = fake.clock.now + 20
        if fake.cancelled and not fake.arrived:
            stopped = TaskResult(Outcome.DIED, PLACE, reason="stopped", is_cancelled=True)
            fake.arrived.append((fake.sent[0].task_id, stopped))

    interrupt_once(fake, 10, then)
    fake.away_until = 1e12  # from before it is told for the first time
    ran = execute(jobs.single_job, instance, {"lease_seconds": 30.0, "cancel_grace_seconds": 30.0})
    assert fake.cancelled == ["one"]
    assert fake.clock.now - told[0] >= 20
    assert ran.count(DagsterEventType.STEP_FAILURE, "one") == 1
    assert "DagsterExecutionInterruptedError" in run_error(ran)


def test_a_cancel_that_is_never_heard_ends_with_the_lease(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """Also where the server answers everything else, as a full Redis does."""
    fake.plan["one"], fake.failing = [HOLD], {"cancel"}
    fake.away_until = 1e12
    interrupt_once(fake, 10, lambda: None)
    ran = execute(jobs.single_job, instance, {"lease_seconds": 30.0, "cancel_grace_seconds": 30.0})
    assert 60 <= fake.clock.now - 1010 <= 120
    assert ran.said("none could say so") == 1
    assert "DagsterExecutionInterruptedError" in run_error(ran)


def test_a_loop_that_takes_over_during_an_outage_waits_and_adopts(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """For as long as it takes, since its steps may be running; none is failed or sent again."""
    fake.plan["one"] = [HOLD]
    run_id = leave(fake, instance, lambda: execute(jobs.single_job, instance).run_id)
    (task,) = fake.sent
    fake.away_until = fake.clock.now + 1000

    def finish(_: int) -> None:
        if fake.clock.now > fake.away_until and not fake.stored:
            fake.finish(task)

    fake.on_wait = finish
    ran = resume(instance, run_id)
    assert ran.status is SUCCESS
    assert fake.sent == [task]
    assert fake.cancelled == []
    assert ran.said("Cannot reach redis://fake") == 1


def test_a_run_that_is_cancelled_while_its_next_loop_waits_stops_its_steps(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """It has not adopted them yet: they are told all the same, as soon as somebody listens."""
    fake.plan["one"] = [HOLD]
    run_id = leave(fake, instance, lambda: execute(jobs.single_job, instance).run_id)
    fake.away_until = fake.clock.now + 50

    def then() -> None:
        if fake.cancelled and not fake.arrived:
            stopped = TaskResult(Outcome.DIED, PLACE, reason="stopped", is_cancelled=True)
            fake.arrived.append((fake.sent[0].task_id, stopped))

    interrupt_once(fake, fake.clock.now - 1000 + 20, then)
    ran = resume(instance, run_id)
    assert fake.cancelled == ["one"]
    assert ran.count(DagsterEventType.STEP_FAILURE, "one") == 1


def test_an_outage_during_reconciliation_is_ridden_out(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """And each outage is said anew."""
    fake.plan["one"] = [HOLD]

    def happen(_: int) -> None:
        moment = fake.clock.now - 1000
        if 50 < moment < 60 or 200 < moment < 210:
            fake.away_until = fake.clock.now + 50
        if moment > 400 and not fake.stored:
            fake.finish(fake.sent[0])

    fake.on_wait = happen
    ran = execute(jobs.single_job, instance)
    assert ran.status is SUCCESS
    assert ran.said("Cannot reach redis://fake") == 2


# --- steered from outside ---


def test_a_step_that_is_moved_is_sent_to_the_other_queue(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """The log says by whom; the move is no refusal, after which a step fails some time."""
    fake.plan["one"] = [WAIT, RUN]

    def move(number: int) -> None:
        if number == 1:
            (task,) = fake.sent
            moved = TaskResult(Outcome.REFUSED, NOWHERE, reason="Moved by me.", queue="far")
            fake.states[task.task_id] = TaskState.REFUSED
            fake.stored[task.task_id] = moved
            fake.arrived.append((task.task_id, TaskResult.from_bytes(moved.to_bytes())))

    fake.on_wait = move
    ran = execute(jobs.single_job, instance)
    assert ran.status is SUCCESS
    assert [task.queue for task in fake.sent] == ["dagster", "far"]
    assert len({task.task_id for task in fake.sent}) == 1
    said = 'Step "one" moves from queue "dagster" to queue "far". Moved by me.'
    assert ran.said(said) == 1
    assert ran.said("waits for another worker") == 0


def test_a_step_that_somebody_has_cancelled_fails_without_a_retry(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """Before a worker had started it, in the moment in which its worker gave it back, say."""
    fake.plan["patient"] = [WAIT]

    def cancel(_: int) -> None:
        fake.states[fake.sent[0].task_id] = TaskState.CANCELLED

    fake.on_wait = cancel
    ran = execute(jobs.patient_job, instance)
    assert ran.status is FAILURE
    assert ran.error("patient") == (
        'Step "patient": It was cancelled by an order before a worker had started it.'
    )
    assert len(fake.sent) == 1


# --- why a step waits ---


UNSERVED = {"dagster": QueueWait(WaitKind.UNSERVED, "No worker listens.")}
FOREIGN = {"dagster": QueueWait(WaitKind.PROTOCOL, "All workers are of another version.")}


def test_why_a_step_waits_is_said_once(fake: FakeDispatcher, instance: DagsterInstance) -> None:
    """And again only after the reason was gone in between."""
    fake.plan["one"] = [WAIT]

    def happen(_: int) -> None:
        moment = fake.clock.now - 1000
        fake.why_waiting = {} if 100 < moment < 200 else UNSERVED
        if moment > 300 and not fake.stored:
            fake.finish(fake.sent[0])

    fake.on_wait = happen
    ran = execute(jobs.single_job, instance)
    assert ran.status is SUCCESS
    assert ran.said('Step "one" waits. No worker listens.') == 2


def waiting_events(ran: Ran, text: str) -> list[tuple[str | None, str, dict[str, Any]]]:
    """Step key, message and metadata of each event that says why something waits."""
    return [
        (
            event.step_key,
            str(event.message),
            {key: value.value for key, value in event.engine_event_data.metadata.items()},
        )
        for event in ran.events
        if event.is_engine_event and text in str(event.message)
    ]


def test_the_event_of_a_waiting_step_says_where_it_is(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """Its queue is looked into for that only when there is something new to say."""
    fake.plan["one"] = [WAIT]
    fake.why_waiting = {"dagster": QueueWait(WaitKind.BUSY, "All 4 step slots are busy.")}
    fake.listeners = {"dagster": Listeners("dagster", QueueKind.STEPS, ("a@h", "b@h"), 4, 4)}
    fake.on_wait = lambda number: fake.finish(fake.sent[0]) if number == 100 else None
    ran = execute(jobs.single_job, instance)
    assert waiting_events(ran, "waits") == [
        (
            "one",
            'Step "one" waits. All 4 step slots are busy. It has place 1 of 1 in the queue.',
            {
                "queue": "dagster",
                "reason": "busy",
                "tasks in queue": 1,
                "workers": "a@h, b@h",
                "busy slots": "4 of 4",
                "priority": 5,
                "tasks before it": 0,
            },
        )
    ]
    assert fake.looks == ["dagster"]


def test_of_many_steps_that_wait_one_event_tells(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """By queue and reason, however long they wait; with the next one's place."""
    for number in range(25):
        fake.plan[f"step_{number:02}"] = [WAIT]
    fake.why_waiting = UNSERVED

    def happen(number: int) -> None:
        if number == 50:
            fake.why_waiting = {"dagster": QueueWait(WaitKind.BUSY, "All are busy.")}
        if number == 100:
            for task in fake.sent:
                fake.finish(task)

    fake.on_wait = happen
    fake.taken = {1}
    ran = execute(jobs.crowd_job, instance)
    assert ran.status is SUCCESS
    told = waiting_events(ran, "wait")
    assert [(key, text.partition(". ")[2].partition(" step_")[0]) for key, text, _ in told] == [
        (None, "No worker listens."),
        (None, "All are busy."),
    ]
    for _, text, metadata in told:
        assert text.startswith('25 steps wait in queue "dagster". ')
        assert text.endswith("step_01 has place 2 of 25 in the queue.")
        assert metadata["steps"].startswith("step_00, step_01, ")
        assert metadata["steps"].endswith("step_19 and 5 more")
    assert fake.looks == ["dagster"] * 2


def test_steps_that_max_concurrent_holds_back(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """The log says so once, and no step looks as if it had been forgotten."""
    for number in range(3):
        fake.plan[f"step_{number:02}"] = [HOLD]

    def happen(number: int) -> None:
        if number == 20:
            for task in fake.sent[:3]:
                fake.finish(task)

    fake.on_wait = happen
    ran = execute(jobs.crowd_job, instance, {"max_concurrent": 3})
    assert ran.status is SUCCESS
    (told,) = waiting_events(ran, "ready and wait")
    assert told[:2] == (
        None,
        "22 steps are ready and wait. max_concurrent is 3, and 3 steps are queued or running.",
    )
    assert told[2]["reason"] == "limited"
    assert told[2]["steps"].startswith("step_03, step_04")


def test_what_is_held_back_is_told_to_people_while_it_is(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """Twenty steps by name, each with its own time, and the others by their number."""
    for number in range(2):
        fake.plan[f"step_{number:02}"] = [HOLD]

    def happen(number: int) -> None:
        if number in (20, 60):
            fake.finish(fake.sent[number // 40])

    fake.on_wait = happen
    began_at = time.time()
    ran = execute(jobs.crowd_job, instance, {"max_concurrent": 2})
    assert ran.status is SUCCESS
    first, *_, last = fake.withheld
    (group,) = first.groups
    reason = "max_concurrent is 2, and 2 steps are queued or running."
    assert (group.pool, group.reason, first.more) == ("", reason, 3)
    assert [key for key, _ in group.steps] == [f"step_{number:02}" for number in range(2, 22)]
    assert all(began_at <= since <= time.time() for _, since in group.steps)
    for later in fake.withheld[1:-1]:
        kept = {key: since for it in later.groups for key, since in it.steps}
        assert kept.items() & dict(group.steps).items()  # since the first time that it was seen
    assert last == Withheld()


def test_max_concurrent_is_the_reason_also_when_a_step_has_just_ended(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """It was reached when steps were taken, and what is free since is not taken yet."""
    for number in range(25):
        fake.plan[f"step_{number:02}"] = [HOLD]

    def happen(_: int) -> None:
        held = [it for it in fake.sent if fake.states[it.task_id] is TaskState.CLAIMED]
        if held:
            fake.finish(held[0])
            fake.clock.now += RECONCILE_SECONDS  # the look comes with the result

    fake.on_wait = happen
    ran = execute(jobs.crowd_job, instance, {"max_concurrent": 2})
    assert ran.status is SUCCESS
    assert len(fake.withheld) > 2
    assert {group.reason for it in fake.withheld for group in it.groups} == {
        "max_concurrent is 2, and 2 steps are queued or running."
    }


def test_a_run_that_stops_holds_nothing_back(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    fake.plan["step_00"] = [HOLD]

    def happen(number: int) -> None:
        if number == 20:
            assert fake.withheld[-1] != Withheld()
            os.kill(os.getpid(), signal.SIGTERM)
        elif number == 60:
            assert fake.withheld[-1] == Withheld()
            fake.finish(fake.sent[0])

    fake.on_wait = happen
    execute(jobs.crowd_job, instance, {"max_concurrent": 1})
    assert fake.waits >= 60


def test_a_step_that_waits_for_a_pool_names_who_has_its_slots(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """Dagster's own event says only that the pool is full."""
    instance.event_log_storage.set_concurrency_slots("narrow", 1)
    fake.plan["first"] = [HOLD]

    def happen(_: int) -> None:
        if fake.clock.now > 1010 and not fake.stored:
            fake.finish(fake.sent[0])
        elif fake.stored:
            time.sleep(0.01)  # Dagster asks a pool again by the real clock

    fake.on_wait = happen
    ran = execute(jobs.pool_job, instance)
    assert ran.status is SUCCESS
    (told,) = waiting_events(ran, "ready and wait")
    assert told[1] == (
        '1 step is ready and waits. Slots of pool "narrow": 1 of 1 are taken, by first of run '
        f"{ran.run_id}."
    )
    assert told[2]["steps"] == "second"
    reason = told[1].partition("waits. ")[2]
    assert [(it.pool, it.reason) for it in fake.withheld[0].groups] == [("narrow", reason)]


def test_a_run_goes_on_where_nobody_can_say_who_has_a_pools_slots(
    fake: FakeDispatcher, instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads the log is told as much as there is; each pool is asked for once in a while."""
    instance.event_log_storage.set_concurrency_slots("narrow", 1)
    fake.plan["first"] = [HOLD]
    asked: list[str] = []

    def fail(_instance: DagsterInstance, pool: str) -> None:
        asked.append(pool)
        raise OSError("the database is away")

    def happen(_: int) -> None:
        if fake.clock.now > 1010 and not fake.stored:
            fake.finish(fake.sent[0])
        elif fake.stored:
            time.sleep(0.01)  # Dagster asks a pool again by the real clock

    monkeypatch.setattr(holding, "pool_holders", fail)
    fake.on_wait = happen
    ran = execute(jobs.pool_job, instance)
    assert ran.status is SUCCESS
    (told,) = waiting_events(ran, "ready and wait")
    assert told[1] == '1 step is ready and waits. Slots of pool "narrow" are taken.'
    assert len(asked) <= 1 + (fake.clock.now - 1000) / POOL_LOOK_SECONDS


def test_a_step_that_begins_says_where_and_after_which_wait(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """As a table in Dagster's UI."""
    ran = execute(jobs.single_job, instance)
    ((key, _, metadata),) = waiting_events(ran, "Executing step")
    assert key == "one"
    assert metadata.pop("started at") == pytest.approx(time.time(), abs=600)
    assert metadata == {
        "queue": "dagster",
        "worker": PLACE.worker,
        "host": PLACE.host,
        "slot": PLACE.slot,
        "pid": str(os.getpid()),
        "attempt": 1,
        "seconds waited": 0.25,
    }


def test_a_run_links_to_the_dashboard_where_its_address_is_set(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """In the first event of ours."""
    ran = execute(jobs.single_job, instance, {"dashboard_url": "https://host/taskiq/"})
    ours = next(event for event in ran.events if event.is_engine_event)
    link = ours.engine_event_data.metadata["dashboard"]
    assert isinstance(link, UrlMetadataValue)
    assert link.url == f"https://host/taskiq/runs/{ran.run_id}"


def test_why_a_step_waits_is_not_said_at_once(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """A worker may be starting."""
    fake.plan["one"] = [WAIT]
    fake.why_waiting = UNSERVED
    fake.on_wait = lambda number: fake.finish(fake.sent[0]) if number == 2 else None
    assert execute(jobs.single_job, instance).said("No worker listens") == 0


def test_workers_of_another_version_alone_fail_a_step(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """After a while of nothing else, with the reason, and though it has retries left."""
    fake.plan["patient"] = [WAIT]

    def happen(_: int) -> None:
        # interrupted once: the time is counted anew
        fake.why_waiting = UNSERVED if 100 < fake.clock.now - 1000 < 110 else FOREIGN

    fake.on_wait = happen
    ran = execute(jobs.patient_job, instance)
    assert ran.status is FAILURE
    assert (
        ran.error("patient")
        == 'Step "patient" was not executed. All workers are of another version.'
    )
    assert fake.clock.now - 1000 > 110 + FOREIGN_WORKERS_SECONDS
    assert [task.step_key for task in fake.sent] == fake.cancelled == ["patient"]


def test_a_step_that_is_taken_after_all_does_not_fail(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """In the very moment of giving it up."""
    fake.plan["one"] = [WAIT]
    fake.why_waiting = FOREIGN
    cancel = fake.cancel

    def take_and_cancel(tasks: Sequence[StepTask], reason: str) -> Mapping[str, TaskState]:
        fake.states[tasks[0].task_id] = TaskState.CLAIMED
        states = cancel(tasks, reason)
        fake.finish(tasks[0])
        return states

    fake.cancel = take_and_cancel  # type: ignore[method-assign]
    assert execute(jobs.single_job, instance).status is SUCCESS


# --- what a worker gives back ---


@pytest.mark.parametrize("word", [REFUSE, REFUSE_UNHEARD])
def test_what_a_worker_cannot_execute_goes_to_another(
    word: str, fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """Without using up a retry, and the log says once which worker could not, and why."""
    fake.plan["one"] = [word] * 3
    ran = execute(jobs.single_job, instance)
    assert ran.status is SUCCESS
    assert len(fake.sent) == 4
    assert len({task.task_id for task in fake.sent}) == 1
    assert len(fake.reopened) == 3
    assert ran.said("w@h has given it back. It has another dagster.yaml.") == 1
    assert ran.count(DagsterEventType.STEP_UP_FOR_RETRY) == 0
    assert fake.acknowledged == [fake.sent[0].task_id], "what is reopened has no result to forget"


def test_a_worker_of_another_instance_gives_a_step_back(
    fake: FakeDispatcher, instance: DagsterInstance, tmp_path: Path
) -> None:
    """It has not begun with it, and says which instance it has."""
    payloads: list[dict[str, Any]] = []
    submit = fake.submit

    def note(sent: Sequence[StepTask]) -> None:
        payloads.extend(dict(it.make_payload()) for it in sent)
        submit(sent)

    fake.submit = note  # type: ignore[method-assign]
    execute(jobs.single_job, instance)
    (payload,) = payloads
    with DagsterInstance.local_temp(str(tmp_path)) as other:
        instance_ref = pack_value(other.get_ref())
        payload[tasks.ARGS_KEY] = {**payload[tasks.ARGS_KEY], "instance_ref": instance_ref}
        runner = TaskRunner()
        result = runner.execute_plan(payload, PLACE, Arrival("dagster", 1))
        runner.close()
    assert result.outcome is Outcome.REFUSED
    assert result.events == ()
    assert "is not in this worker's Dagster instance" in result.reason


def test_what_only_wrong_workers_take_fails_after_a_while(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """With the reason, and without a retry."""
    fake.plan["patient"] = [REFUSE] * 1000
    ran = execute(jobs.patient_job, instance)
    assert ran.status is FAILURE
    assert "Worker w@h: It has another dagster.yaml." in ran.error("patient")
    assert fake.clock.now - 1000 > FOREIGN_WORKERS_SECONDS
    assert 10 < len(fake.sent) <= FOREIGN_WORKERS_SECONDS, "it is not taken and sent in a circle"


def test_a_run_that_was_deleted_is_no_fault_of_the_worker(
    fake: FakeDispatcher, instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its steps fail at once, and the failure says what happened."""
    fake.plan["one"] = [REFUSE]
    with monkeypatch.context() as patch:
        find = DagsterInstance.get_run_by_id
        patch.setattr(
            DagsterInstance,
            "get_run_by_id",
            lambda self, run_id: None if fake.sent and fake.is_deleted else find(self, run_id),
        )
        fake.is_deleted = True
        fake.acknowledge = lambda _: setattr(fake, "is_deleted", False)  # type: ignore[method-assign]
        ran = execute(jobs.single_job, instance)
    assert "has been deleted" in ran.error("one")
    assert len(fake.sent) == 1


# --- interrupts ---


def interrupt_once(fake: FakeDispatcher, moment: float, then: Callable[[], None]) -> None:
    """Send this process the signal that a terminated run gets."""
    pending = [True]

    def happen(_: int) -> None:
        if pending and fake.clock.now - 1000 > moment:
            pending.clear()
            os.kill(os.getpid(), signal.SIGTERM)
        elif not pending:
            then()

    fake.on_wait = happen


def test_an_interrupt_cancels_and_waits_for_the_word(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """Queued steps never run, running ones are waited for, and the run is not a success."""
    fake.plan["left"], fake.plan["right"] = [HOLD], [WAIT]
    asked_at: list[float] = []

    def then() -> None:
        asked_at.append(fake.clock.now)
        if fake.clock.now - asked_at[0] > 20 and not fake.arrived:
            stopped = TaskResult(Outcome.DIED, PLACE, reason="stopped", is_cancelled=True)
            fake.arrived += [(t.task_id, stopped) for t in fake.sent if t.step_key == "left"]

    interrupt_once(fake, 10, then)
    ran = execute(jobs.diamond_job, instance)
    assert ran.status in (FAILURE, DagsterRunStatus.CANCELED)
    assert sorted(fake.cancelled) == ["left", "right"]
    assert fake.clock.now - asked_at[0] > 20
    assert ran.count(DagsterEventType.STEP_FAILURE, "left") == 1
    assert ran.said('Withdrew step "right"') == 1
    assert [task.step_key for task in fake.sent] == ["one", "left", "right"]
    assert fake.closed == [False]


def test_a_cancelled_step_is_not_retried(fake: FakeDispatcher, instance: DagsterInstance) -> None:
    """Whatever its policy says."""
    fake.plan["patient"] = [HOLD]
    stopped = TaskResult(Outcome.DIED, PLACE, reason="stopped", is_cancelled=True)
    interrupt_once(fake, 10, lambda: fake.arrived.append((fake.sent[0].task_id, stopped)) or None)
    ran = execute(jobs.patient_job, instance)
    assert ran.count(DagsterEventType.STEP_UP_FOR_RETRY) == 0
    assert len(fake.sent) == 1


def test_an_interrupt_during_an_outage_ends_after_a_lease(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """By then every worker has stopped its steps by itself; the run does not hang for ever."""
    fake.plan["one"] = [HOLD]

    def then() -> None:
        fake.away_until = 1e12

    interrupt_once(fake, 10, then)
    fake.away_until = 0
    ran = execute(jobs.single_job, instance, {"lease_seconds": 30.0, "cancel_grace_seconds": 30.0})
    assert ran.status in (FAILURE, DagsterRunStatus.CANCELED)
    assert 60 <= fake.clock.now - 1010 <= 120


def test_an_interrupt_finds_a_dead_workers_step(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """Nobody can say that it stopped: its lease's end is the word."""
    fake.plan["one"] = [EXPIRE_STARTED]
    fake.is_conclusive = False

    def then() -> None:
        fake.is_conclusive = True

    interrupt_once(fake, 10, then)
    ran = execute(jobs.single_job, instance)
    assert ran.status in (FAILURE, DagsterRunStatus.CANCELED)
    assert ran.count(DagsterEventType.STEP_FAILURE, "one") == 1


def test_an_interrupt_after_a_flush_waits_until_nobody_can_have_the_steps(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """That the server calls them cancelled says nothing before a lease of watching it.

    Then the one that had started counts as lost, and the other one as withdrawn.
    """
    fake.plan["left"], fake.plan["right"] = [HOLD], [WAIT]

    def cancel(tasks: Sequence[StepTask], reason: str) -> Mapping[str, TaskState]:
        for task in tasks:
            fake.states[task.task_id] = TaskState.CANCELLED
        return {task.task_id: TaskState.EXPIRED for task in tasks}

    def watch() -> None:
        fake.is_conclusive = fake.clock.now > 1010 + 300

    fake.cancel = cancel  # type: ignore[method-assign]
    fake.is_conclusive = False
    interrupt_once(fake, 10, watch)
    ran = execute(jobs.diamond_job, instance)
    assert fake.clock.now > 1010 + 300
    assert ran.count(DagsterEventType.STEP_FAILURE, "left") == 1
    assert ran.count(DagsterEventType.STEP_FAILURE, "right") == 0
    assert ran.said('Withdrew step "right"') == 1


def test_a_run_that_will_resume_leaves_its_steps_alone(
    fake: FakeDispatcher, instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another loop takes over: nothing is cancelled, and the dispatcher is told to leave them."""
    monkeypatch.setattr(DagsterInstance, "run_will_resume", lambda *_: True)
    fake.plan["one"] = [HOLD]
    interrupt_once(fake, 10, lambda: None)
    ran = execute(jobs.single_job, instance)
    assert fake.cancelled == []
    assert fake.closed == [True]
    assert ran.count(DagsterEventType.STEP_FAILURE) == 0
    assert ran.said("the steps go on") == 1


def test_a_user_who_cancels_a_run_that_could_resume_stops_its_steps(
    fake: FakeDispatcher, instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``run_will_resume`` does not look at the run's status: the loop does."""
    monkeypatch.setattr(DagsterInstance, "run_will_resume", lambda *_: True)
    fake.plan["one"] = [WAIT]
    cancelling: list[None] = []

    def cancel(_: int) -> None:
        if fake.clock.now > 1010 and not cancelling:
            cancelling.append(None)
            (run,) = instance.get_runs(limit=1)
            instance.report_run_canceling(run)
            os.kill(os.getpid(), signal.SIGTERM)

    fake.on_wait = cancel
    execute(jobs.single_job, instance)
    assert fake.cancelled == ["one"]
    assert fake.closed == [False]


class Exited(BaseException):
    """In place of the end of this process."""


def test_a_superseded_loop_leaves_everything_to_the_other(
    fake: FakeDispatcher, instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It neither cancels nor fails the steps that the newer loop has adopted, nor the run.

    Any exception would be logged as the run's end, so its process ends at once, with a code.
    """
    codes: list[int] = []

    def exit_process(code: int) -> None:
        codes.append(code)
        raise Exited

    monkeypatch.setattr(os, "_exit", exit_process)
    fake.plan["one"] = [HOLD]

    def supersede(number: int) -> None:
        if number == 3:
            raise SupersededLoopError("taken over")

    fake.on_wait = supersede
    ran = execute(jobs.single_job, instance)  # Dagster takes any exception for a failed run
    assert codes == [tasks.EXIT_SUPERSEDED]
    assert fake.cancelled == []
    assert fake.closed == [True]
    assert ran.count(DagsterEventType.STEP_FAILURE) == 0


def test_a_failing_loop_stops_its_steps_and_waits_for_the_word(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """Nothing of a run goes on unwatched."""
    fake.plan["one"] = [HOLD]
    failed: list[None] = []

    def fail(number: int) -> None:
        if number == 3:
            failed.append(None)
            raise ZeroDivisionError
        if failed and "one" in fake.cancelled:
            stopped = TaskResult(Outcome.DIED, PLACE, reason="stopped", is_cancelled=True)
            fake.arrived.append((fake.sent[0].task_id, stopped))

    fake.on_wait = fail
    ran = execute(jobs.single_job, instance)
    assert ran.status is FAILURE
    assert fake.cancelled == ["one"]
    assert fake.closed == [False]
    (end,) = (event for event in ran.events if event.event_type is DagsterEventType.RUN_FAILURE)
    assert "ZeroDivisionError" in str(end.event_specific_data)


# --- resuming ---


@pytest.mark.parametrize("has_started", [True, False])
def test_a_resumed_loop_judges_before_it_sends_again(
    fake: FakeDispatcher,
    instance: DagsterInstance,
    has_started: bool,
) -> None:
    """What nobody has any more after a flush is not sent before the watch is conclusive.

    Then an attempt that had started counts as lost, and only one that had not is sent again.
    """
    fake.plan["one"] = [HOLD if has_started else WAIT]
    run_id = leave(fake, instance, lambda: execute(jobs.diamond_job, instance).run_id)
    (task,) = fake.sent
    fake.states[task.task_id] = TaskState.UNKNOWN
    fake.waiting.clear()
    resumed_at = fake.clock.now
    fake.is_conclusive = False

    def watch(_: int) -> None:
        fake.is_conclusive = fake.clock.now - resumed_at > 300
        assert fake.is_conclusive or fake.sent == [task]

    fake.on_wait = watch
    ran = resume(instance, run_id)
    assert ran.said("Resumed the run; 1 steps are queued or running") == 1
    if has_started:
        assert ran.status is FAILURE
        assert fake.sent == [task]
        assert "lease" in ran.error("one")
        assert "worker w@h (host h, slot 2" in ran.error("one"), "the log knows where it ran"
    else:
        assert ran.status is SUCCESS
        assert [it.step_key for it in fake.sent] == ["one", "one", "left", "right", "total"]
        assert fake.sent[1].task_id == task.task_id


def leave(
    fake: FakeDispatcher,
    instance: DagsterInstance,
    execute: Callable[[], str],
    after_seconds: float = 10,
) -> str:
    """Have a run's process end after a time, in a run that will be resumed; the run's id."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DagsterInstance, "run_will_resume", lambda *_: True)
        interrupt_once(fake, fake.clock.now - 1000 + after_seconds, lambda: None)
        run_id = execute()
    fake.on_wait = lambda _: None
    return run_id


def resume(instance: DagsterInstance, run_id: str) -> Ran:
    """Execute the rest of a run in what is a new process to Dagster."""
    execute_or_resume_run(instance, run_id, is_resumed=True)
    return Ran(instance, run_id)


def finish_held(fake: FakeDispatcher, step: str) -> None:
    """Have a held step run to its end as soon as the loop waits."""

    def happen(_: int) -> None:
        fake.on_wait = lambda _: None
        fake.finish([task for task in fake.sent if task.step_key == step][-1])

    fake.on_wait = happen


@pytest.mark.parametrize("resumes", [1, 2])
def test_a_resumed_run_counts_what_has_failed_before(
    fake: FakeDispatcher, instance: DagsterInstance, resumes: int
) -> None:
    """However often it is resumed, and without a second event of the failure in the log."""
    fake.plan["one"] = [HOLD]
    run_id = leave(fake, instance, lambda: execute(jobs.exhausted_job, instance).run_id)
    for _ in range(resumes - 1):
        leave(fake, instance, lambda: resume(instance, run_id).run_id)
    finish_held(fake, "one")
    ran = resume(instance, run_id)
    assert ran.status is FAILURE
    assert ran.count(DagsterEventType.STEP_SUCCESS, "one") == 1
    assert ran.count(DagsterEventType.STEP_FAILURE) == 1
    assert ran.count(DagsterEventType.STEP_UP_FOR_RETRY) == 1
    assert ran.said("Steps failed: ['never']") == 1
    assert [task.step_key for task in fake.sent] == ["never", "one", "never"]


def test_a_failure_that_came_while_the_run_had_no_process_counts(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """Only the log says of it, since its result went to the former process; then steps skip."""
    fake.plan["may_fail"] = [HOLD]
    config = {"may_fail": {"config": {"fails": True}}}

    def first() -> str:
        options = {"ops": config, "execution": {"config": {}}}
        with execute_job(
            reconstructable(jobs.failing_job), instance, run_config=options, raise_on_error=False
        ) as result:
            return result.run_id

    run_id = leave(fake, instance, first)
    (held,) = (task for task in fake.sent if task.step_key == "may_fail")
    fake._do(RUN_UNHEARD, held)
    ran = resume(instance, run_id)
    assert ran.status is FAILURE
    assert ran.count(DagsterEventType.STEP_FAILURE, "may_fail") == 1
    assert ran.said("Steps failed: ['may_fail']") == 1
    assert "total" not in [task.step_key for task in fake.sent]


@pytest.mark.parametrize("moment", ["before the next attempt", "during the next attempt"])
def test_a_late_failure_of_a_lost_attempt_does_not_count_after_a_resume(
    fake: FakeDispatcher, instance: DagsterInstance, moment: str
) -> None:
    """Its worker lives and says so in the log; the next attempt succeeds, and so does the run."""
    fake.plan["patient"] = [EXPIRE_STARTED, HOLD]
    other_process = os.getpid() + 1

    def begin_elsewhere(task: StepTask) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "getpid", lambda: other_process)
            FakeDispatcher.start(fake, task)

    def fail_late() -> None:
        (run,) = instance.get_runs(limit=1)
        first = next(e for e in Ran(instance, run.run_id).events if e.step_key == "patient")
        error = SerializableErrorInfo("late", [], "Late")
        late = first._replace(
            event_type_value=DagsterEventType.STEP_FAILURE.value,
            event_specific_data=StepFailureData(error, user_failure_data=None),
            pid=other_process,
        )
        instance.report_dagster_event(late, run.run_id)

    def start(task: StepTask) -> None:
        if task.attempt == 1:
            begin_elsewhere(task)
        elif moment.startswith("during"):
            FakeDispatcher.start(fake, task)
            fail_late()
        else:
            fail_late()
            FakeDispatcher.start(fake, task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake, "start", start)
        run_id = leave(fake, instance, lambda: execute(jobs.patient_job, instance).run_id, 60)
    finish_held(fake, "patient")
    ran = resume(instance, run_id)
    assert ran.count(DagsterEventType.STEP_FAILURE, "patient") == 1, "the late one"
    assert ran.status is SUCCESS
    assert [(task.step_key, task.attempt) for task in fake.sent] == [
        ("patient", 1),
        ("patient", 2),
        ("add_one", 1),
    ]


# --- copies of tasks, to workers with a signing key ---


@pytest.mark.parametrize(
    ("job", "plan"),
    [
        (jobs.retry_job, {}),
        (jobs.dynamic_job, {}),
        (jobs.patient_job, {"patient": [EXPIRE_STARTED, EXPIRE_UNSTARTED, RUN]}),
    ],
    ids=["retries", "dynamic", "lost"],
)
def test_a_copy_of_what_has_begun_is_refused(
    fake: FakeDispatcher, instance: DagsterInstance, job: Any, plan: Mapping[str, list[str]]
) -> None:
    """Running, ended, lost, or about to be retried: it is not executed, and writes nothing."""
    fake.plan.update(plan)
    copies: set[str] = set()

    def send_copies(_: int) -> None:
        for task in fake.sent:
            if task.task_id in fake.begun | fake.executed:
                reason = check_is_refused(fake, task)
                assert "has begun before on worker w@h (slot 2)" in reason
                copies.add(task.task_id)

    fake.on_wait = send_copies
    assert execute(job, instance).status is SUCCESS
    assert copies == {task.task_id for task in fake.sent}


def check_is_refused(fake: FakeDispatcher, task: StepTask) -> str:
    """Execute a copy of a task in a process that looks into the log; why it does not."""
    (run,) = fake.instance.get_runs(limit=1)
    before = len(fake.instance.all_logs(run.run_id))
    runner = TaskRunner(refuses_copies=True)
    result = runner.execute_plan(fake.payloads[task.task_id], PLACE, arrival_of(task))
    assert result.outcome is Outcome.COPY, result
    assert f'Attempt {task.attempt} of step "{task.step_key}"' in result.reason
    assert len(fake.instance.all_logs(run.run_id)) == before
    return result.reason


def test_a_copy_of_what_has_ended_without_a_beginning_is_refused(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """The worker could not load its code, and the loop has gone on to the next attempt."""
    fake.plan["patient"] = [WAIT, RUN]
    error = TaskResult(Outcome.ERROR, PLACE, reason="No module named 'their_code'")
    refused = []

    def happen(_: int) -> None:
        first = fake.sent[0]
        if len(fake.sent) > 1:
            refused.append(check_is_refused(fake, first))
        else:
            fake.states[first.task_id] = TaskState.DONE
            fake.arrived.append((first.task_id, error))

    fake.on_wait = happen
    assert execute(jobs.patient_job, instance).status is SUCCESS
    assert refused
    assert "on worker" not in refused[0]


def test_a_retry_that_loop_and_worker_ask_for_at_once_is_one(
    fake: FakeDispatcher, instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker of a lost attempt lives and logs its retry while the loop logs its own."""
    fake.plan["patient"] = [EXPIRE_STARTED]
    other_process = os.getpid() + 1
    ask = endings.retry_or_fail_step

    def ask_both(*arguments: Any) -> DagsterEvent:
        (run,) = instance.get_runs(limit=1)
        first = next(e for e in Ran(instance, run.run_id).events if e.step_key == "patient")
        retry = first._replace(
            event_type_value=DagsterEventType.STEP_UP_FOR_RETRY.value,
            event_specific_data=StepRetryData(SerializableErrorInfo("own", [], "Own")),
            pid=other_process,
        )
        instance.report_dagster_event(retry, run.run_id)
        return ask(*arguments)

    def begin_elsewhere(task: StepTask) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "getpid", lambda: other_process)
            FakeDispatcher.start(fake, task)

    monkeypatch.setattr(fake, "start", begin_elsewhere)
    monkeypatch.setattr(endings, "retry_or_fail_step", ask_both)
    ran = execute(jobs.patient_job, instance)
    assert ran.status is SUCCESS
    assert ran.count(DagsterEventType.STEP_UP_FOR_RETRY) == 2
    assert [task.attempt for task in fake.sent] == [1, 2, 1]


@pytest.mark.parametrize("has_ended", [True, False])
def test_a_claim_that_a_copy_has_taken_leaves_the_step_to_the_log(
    fake: FakeDispatcher, instance: DagsterInstance, has_ended: bool
) -> None:
    """The worker that had the step could not report; the copy's has let its claim end."""
    fake.plan["one"] = [HOLD]
    other = replace(PLACE, worker="other@h")

    def replay(_: int) -> None:
        fake.on_wait = lambda _: None
        (task,) = fake.sent
        check_is_refused(fake, task)
        fake.places[task.task_id] = other
        fake.leases_end_at[task.task_id] = fake.clock.now + LEASE_SECONDS
        if has_ended:
            fake.execute(task)

    fake.on_wait = replay
    ran = execute(jobs.single_job, instance)
    assert len(fake.sent) == 1
    assert fake.clock.now - 1000 >= LEASE_SECONDS
    assert ran.status is (SUCCESS if has_ended else FAILURE)
    if not has_ended:
        assert 'Step "one" on worker w@h' in ran.error("one")
        assert "Worker other@h (slot 2) was given its task too" in ran.error("one")


# --- what the history is told ---


def told(fake: FakeDispatcher) -> list[tuple[str, int, EndOutcome, bool, str]]:
    """Of each attempt: step, number, outcome, whether it is tried again, and its worker."""
    return [
        (end.step_key, end.attempt, end.outcome, end.is_retried, end.worker) for end in fake.ended
    ]


WON, FAILED = EndOutcome.SUCCEEDED, EndOutcome.FAILED
LOST, CANCELLED = EndOutcome.LOST, EndOutcome.CANCELLED


def test_the_history_is_told_of_each_attempt(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """Its job, its way and its times, once; and of a failure what the step's code has raised."""
    ran = execute(jobs.exhausted_job, instance)
    assert sorted(told(fake)) == [
        ("never", 1, FAILED, True, "w@h"),
        ("never", 2, FAILED, False, "w@h"),
        ("one", 1, WON, False, "w@h"),
    ]
    for end in fake.ended:
        assert (end.run_id, end.job, end.queue) == (ran.run_id, "exhausted_job", "dagster")
        assert end.task_id == step_task_id(ran.run_id, end.step_key, end.attempt)
        assert (end.host, end.slot) == ("h", 2)
        assert end.sent_at is not None
        assert end.started_at is not None
        assert end.sent_at - 60 < end.started_at <= end.ended_at <= time.time()
        assert end.reason == ("" if end.outcome is WON else "ValueError: never")


def test_the_history_says_why_an_attempt_failed(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """What the step's code has raised, or, where it could not begin, why."""
    fake.on_wait = lambda _: time.sleep(0.005)  # Dagster waits for retries by its own clock
    execute(jobs.retry_job, instance)
    reasons = {(end.step_key, end.attempt): end.reason for end in fake.ended}
    assert reasons == {
        ("third_time", 1): "ValueError: attempt 0",
        ("third_time", 2): "ValueError: attempt 1",
        ("third_time", 3): "",
        ("asks_for_retry", 1): "It asked to be tried again.",
        ("asks_for_retry", 2): "",
        ("total", 1): "",
    }
    fake.ended.clear()
    error = SerializableErrorInfo("SomeError: no such module\n", [], "SomeError")
    deliver(fake, "one", TaskResult(Outcome.ERROR, PLACE, error=pack_value(error)))
    execute(jobs.single_job, instance)
    assert [end.reason for end in fake.ended] == ["SomeError: no such module"]


def test_the_history_tells_lost_attempts_from_failed_ones(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """With the worker that had it and when it began, whether it is tried again or not."""
    fake.plan["patient"] = [EXPIRE_STARTED, EXPIRE_STARTED, EXPIRE_STARTED]
    execute(jobs.patient_job, instance)
    assert told(fake) == [
        ("patient", 1, LOST, True, "w@h"),
        ("patient", 2, LOST, True, "w@h"),
        ("patient", 3, LOST, False, "w@h"),
    ]
    assert all("lease" in end.reason and end.started_at for end in fake.ended)


def test_a_dead_child_is_a_lost_attempt_in_the_history(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """Unless its end is in the log, as that of a result that was too large is."""
    died = TaskResult(Outcome.DIED, PLACE, reason="its process was killed by SIGKILL.")
    deliver(fake, "one", died)
    execute(jobs.single_job, instance)
    assert told(fake) == [("one", 1, LOST, False, "w@h")]
    assert "SIGKILL" in fake.ended[0].reason
    fake.ended.clear()
    fake.plan["one"] = [RUN_AND_LOSE]
    assert execute(jobs.single_job, instance).status is SUCCESS
    assert told(fake) == [("one", 1, WON, False, "w@h")]
    assert fake.ended[0].started_at is not None


def test_what_is_sent_again_has_not_ended(fake: FakeDispatcher, instance: DagsterInstance) -> None:
    """It is one attempt, whatever became of its message."""
    fake.plan["one"] = [VANISH, EXPIRE_UNSTARTED, DROP, REFUSE]
    assert execute(jobs.single_job, instance).status is SUCCESS
    assert told(fake) == [("one", 1, WON, False, "w@h")]


def test_the_history_is_told_of_what_nobody_could_execute(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    fake.plan["one"] = [REFUSE] * 1000
    execute(jobs.single_job, instance)
    assert told(fake) == [("one", 1, FAILED, False, "")]
    assert "It has another dagster.yaml." in fake.ended[0].reason


def test_the_history_is_told_of_what_was_cancelled(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """What was executed with its worker, what was queued without; what was not sent is no end."""
    fake.plan["left"], fake.plan["right"] = [HOLD], [WAIT]

    def then() -> None:
        if fake.cancelled and not fake.arrived:
            stopped = TaskResult(Outcome.DIED, PLACE, reason="stopped", is_cancelled=True)
            fake.arrived += [(t.task_id, stopped) for t in fake.sent if t.step_key == "left"]

    interrupt_once(fake, 10, then)
    execute(jobs.diamond_job, instance)
    assert sorted(told(fake)) == [
        ("left", 1, CANCELLED, False, "w@h"),
        ("one", 1, WON, False, "w@h"),
        ("right", 1, CANCELLED, False, ""),
    ]


def test_a_cancel_of_which_no_word_comes_is_in_the_history(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    fake.plan["one"], fake.failing = [HOLD], {"cancel"}
    fake.away_until = 1e12
    interrupt_once(fake, 10, lambda: None)
    execute(jobs.single_job, instance, {"lease_seconds": 30.0, "cancel_grace_seconds": 30.0})
    assert told(fake) == [("one", 1, CANCELLED, False, "w@h")]


def test_what_a_policy_asks_for_while_the_run_stops_is_not_tried_again(
    fake: FakeDispatcher, instance: DagsterInstance
) -> None:
    """The step fails by itself, before it hears of the cancel."""
    fake.plan["never"] = [HOLD]

    def then() -> None:
        (task,) = (it for it in fake.sent if it.step_key == "never")
        if fake.cancelled and task.task_id not in fake.executed:
            fake.finish(task)

    interrupt_once(fake, 10, then)
    execute(jobs.exhausted_job, instance)
    assert ("never", 1, FAILED, False, "w@h") in told(fake)
