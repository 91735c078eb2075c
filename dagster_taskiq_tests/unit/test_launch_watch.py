"""When a launched run counts as lost, and what becomes of it then."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast
from uuid import uuid4

import pytest
from dagster import DagsterInstance, DagsterRunStatus

from dagster_taskiq.backend import TaskReport, TaskState
from dagster_taskiq.defaults import FOREIGN_WORKERS_SECONDS, IN_HAND_SECONDS, WAIT_REASON_SECONDS
from dagster_taskiq.errors import LauncherClosedError, UnreachableServerError
from dagster_taskiq.launch import launch_watch
from dagster_taskiq.launch.background import Background
from dagster_taskiq.launch.launch_watch import LaunchWatch
from dagster_taskiq.launch.run_client import RunClient
from dagster_taskiq.messages.envelope import Envelope, QueueKind, TaskName
from dagster_taskiq.messages.queue_looks import QueueLook
from dagster_taskiq.messages.queue_waits import Listeners, QueueWait, WaitKind
from dagster_taskiq.messages.results import NOWHERE, Outcome, Place, TaskResult
from dagster_taskiq_tests.acceptance import jobs

#: For what must happen, on a loaded machine.
PATIENCE_SECONDS = 30.0

LEASE_SECONDS = 2 * IN_HAND_SECONDS


REFUSAL = TaskResult(
    Outcome.REFUSED, Place("w@h", "id", "h", 1, 1), reason="It has another dagster.yaml."
)


class FakeClient:
    """Servers with one run, of which they know what a test says."""

    def __init__(self) -> None:
        self.is_queued = False
        self.state = TaskState.UNKNOWN
        self.now_epoch = "first"
        self.wait: QueueWait | None = None
        self.cancelled: list[str] = []
        self.sent: list[Envelope] = []
        self.is_looked_at = threading.Semaphore(0)
        self.looks: list[str] = []
        self.looked_into: list[str] = []
        self.refusal = REFUSAL

    def physical_queue(self, queue: str) -> str:
        return f"physical {queue}"

    def absent(self, queue: str, task_ids: Sequence[str]) -> set[str]:
        self.is_looked_at.release()
        self.looks.append(queue)
        return set() if self.is_queued else set(task_ids)

    def state_of(self, *_: str) -> tuple[str, TaskState]:
        return self.now_epoch, self.state

    def epoch(self) -> str:
        return self.now_epoch

    def look(self, *_: str) -> tuple[TaskReport, TaskResult | None]:
        is_refused = self.state is TaskState.REFUSED
        return TaskReport(self.state), self.refusal if is_refused else None

    def reopen(self, *_: str) -> bool:
        self.state = TaskState.UNKNOWN
        return True

    def queue_waits(self) -> FakeClient:
        return self

    def of(self, _: str) -> QueueWait | None:
        return self.wait

    def listeners(self, queue: str) -> Listeners:
        return Listeners(queue, QueueKind.RUNS, ("w@h",), 1, 2)

    def look_into(self, queue: str, task_id: str) -> QueueLook:
        self.looked_into.append(queue)
        return QueueLook(9, {task_id: 4})

    def explained(self, _: str, wait: QueueWait | None) -> QueueWait | None:
        return wait

    def cancel(self, run_id: str, *_: str) -> TaskState:
        self.cancelled.append(run_id)
        is_free = self.state in (TaskState.UNKNOWN, TaskState.REFUSED)
        return TaskState.CANCELLED if is_free else self.state

    def submit(self, envelope: Envelope) -> None:
        self.sent.append(envelope)
        self.is_queued = True


class Clock:
    """Stands still until it is told to go on."""

    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def client() -> FakeClient:
    return FakeClient()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(
    client: FakeClient, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LaunchWatch]:
    monkeypatch.setattr(launch_watch, "LOOK_SECONDS", 0.01)
    background = Background()
    yield LaunchWatch(cast("RunClient", client), background, LEASE_SECONDS, clock)
    background.close()


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[DagsterInstance]:
    with DagsterInstance.local_temp(str(tmp_path)) as instance:
        yield instance


def is_lost(watch: LaunchWatch) -> bool:
    return watch.is_lost("queue", "run", "task")


@pytest.mark.parametrize("state", [TaskState.UNKNOWN, TaskState.EXPIRED])
def test_lost_after_a_lease_of_absence(
    watch: LaunchWatch, client: FakeClient, clock: Clock, state: TaskState
) -> None:
    """Also after the death of a worker that had claimed it, and of the message in its hands."""
    client.state = state
    assert not is_lost(watch)
    clock.seconds += LEASE_SECONDS - 1
    assert not is_lost(watch)
    clock.seconds += 1
    assert is_lost(watch)


@pytest.mark.parametrize("what", ["is queued", "is claimed", "a new epoch"])
def test_counted_anew(watch: LaunchWatch, client: FakeClient, clock: Clock, what: str) -> None:
    """The absence ends with every sign of the run, and with the server's memory."""
    assert not is_lost(watch)
    if what == "a new epoch":
        client.now_epoch = "second"
    else:
        client.is_queued = what == "is queued"
        client.state = TaskState.CLAIMED if what == "is claimed" else TaskState.UNKNOWN
    clock.seconds += LEASE_SECONDS
    assert not is_lost(watch)
    client.is_queued, client.state = False, TaskState.UNKNOWN
    if what != "a new epoch":
        assert not is_lost(watch)
    clock.seconds += LEASE_SECONDS
    assert is_lost(watch)


def launched(instance: DagsterInstance) -> Envelope:
    """The task of a run that is STARTING."""
    run = instance.create_run_for_job(jobs.simple, status=DagsterRunStatus.STARTING)
    return Envelope(
        task_id="task",
        name=TaskName.EXECUTE_JOB,
        run_id=run.run_id,
        step_key=None,
        attempt=0,
        queue="long",
        priority=0,
        lease_seconds=LEASE_SECONDS,
        cancel_grace_seconds=1.0,
        epoch="first",
        payload="{}",
    )


def await_looks(client: FakeClient, count: int = 3) -> None:
    """Wait until the watch has looked so many times from now on."""
    while client.is_looked_at.acquire(blocking=False):
        pass
    for _ in range(count):
        assert client.is_looked_at.acquire(timeout=PATIENCE_SECONDS)


def test_a_lost_run_is_sent_again(
    watch: LaunchWatch, client: FakeClient, clock: Clock, instance: DagsterInstance
) -> None:
    """Once, in the present epoch, and the run's log says so."""
    envelope = launched(instance)
    client.now_epoch = "second"
    watch.look_after(instance, envelope)
    await_looks(client)
    assert client.sent == []
    clock.seconds += LEASE_SECONDS
    await_looks(client)
    (again,) = client.sent
    assert again.task_id == envelope.task_id
    assert again.epoch == "second"
    messages = [entry.message for entry in instance.all_logs(envelope.run_id)]
    assert 'No server knew of the run any more; sent it to queue "long" again.' in messages


def test_a_run_that_is_refused_is_not_sent_again(
    watch: LaunchWatch, client: FakeClient, clock: Clock, instance: DagsterInstance
) -> None:
    client.wait = QueueWait(WaitKind.REFUSED, "It is not signed.")
    watch.look_after(instance, launched(instance))
    await_looks(client)
    clock.seconds += LEASE_SECONDS
    await_looks(client)
    assert client.sent == []


def said(instance: DagsterInstance, run_id: str) -> list[str]:
    """Why the run waits, as often as its log says so."""
    messages = (entry.message for entry in instance.all_logs(run_id))
    return [text for text in messages if text.startswith("The run waits.")]


BUSY = QueueWait(WaitKind.BUSY, "All run slots are busy.")


def test_a_run_says_why_it_waits(
    watch: LaunchWatch, client: FakeClient, clock: Clock, instance: DagsterInstance
) -> None:
    """Once, after some seconds, and not what was said when it was launched."""
    client.is_queued = True
    client.wait = BUSY
    first, second = launched(instance), launched(instance)
    watch.look_after(instance, first)
    watch.look_after(instance, second, BUSY)
    await_looks(client, 6)
    assert said(instance, first.run_id) == []
    clock.seconds += WAIT_REASON_SECONDS + 1
    await_looks(client, 12)
    assert said(instance, first.run_id) == [
        "The run waits. All run slots are busy. It has place 4 of 9 in the queue."
    ]
    assert said(instance, second.run_id) == []
    assert len(client.looked_into) == 1
    (event,) = (
        entry.dagster_event
        for entry in instance.all_logs(first.run_id)
        if "The run waits." in entry.message
    )
    metadata = event.engine_event_data.metadata
    assert {key: value.value for key, value in metadata.items()} == {
        "queue": first.queue,
        "reason": "busy",
        "tasks in queue": 9,
        "workers": "w@h",
        "busy slots": "1 of 2",
        "priority": first.priority,
        "tasks before it": 3,
    }


def test_a_run_that_is_about_to_start_does_not_wait(
    watch: LaunchWatch, client: FakeClient, clock: Clock, instance: DagsterInstance
) -> None:
    """The slot that it has taken is busy with it."""
    client.is_queued, client.state, client.wait = True, TaskState.CLAIMED, BUSY
    envelope = launched(instance)
    watch.look_after(instance, envelope)
    clock.seconds += WAIT_REASON_SECONDS + 1
    await_looks(client, 6)
    assert said(instance, envelope.run_id) == []


def test_workers_of_another_version_alone_fail_a_run(
    watch: LaunchWatch, client: FakeClient, clock: Clock, instance: DagsterInstance
) -> None:
    """After a while, with the reason; its task is taken out of the queue."""
    client.is_queued = True
    client.wait = QueueWait(WaitKind.PROTOCOL, "All workers are of another version.")
    envelope = launched(instance)
    watch.look_after(instance, envelope)
    await_looks(client)
    assert client.cancelled == []
    clock.seconds += FOREIGN_WORKERS_SECONDS
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not instance.get_run_by_id(envelope.run_id).is_finished:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert client.cancelled == [envelope.run_id]
    messages = [entry.message for entry in instance.all_logs(envelope.run_id)]
    assert any("The run was not executed. All workers are of another" in it for it in messages)


def test_a_run_that_is_moved_is_sent_to_the_other_queue(
    watch: LaunchWatch, client: FakeClient, clock: Clock, instance: DagsterInstance
) -> None:
    """And looked for there from then on."""
    client.is_queued, client.state = True, TaskState.REFUSED
    client.refusal = TaskResult(Outcome.REFUSED, NOWHERE, reason="Moved by me.", queue="far")
    envelope = launched(instance)
    watch.look_after(instance, envelope)
    await_looks(client)
    (moved,) = client.sent
    assert (moved.task_id, moved.queue) == (envelope.task_id, "far")
    await_looks(client)
    assert client.looks[-1] == "far"
    messages = [entry.message for entry in instance.all_logs(envelope.run_id)]
    assert 'The run moves from queue "long" to queue "far". Moved by me.' in messages


def test_a_run_that_a_worker_gives_back_goes_to_another(
    watch: LaunchWatch, client: FakeClient, clock: Clock, instance: DagsterInstance
) -> None:
    """The log says once which worker could not execute it; after a while the run fails."""
    client.is_queued, client.state = True, TaskState.REFUSED
    envelope = launched(instance)
    watch.look_after(instance, envelope)
    await_looks(client)
    assert [it.task_id for it in client.sent] == ["task"]
    assert client.state is TaskState.UNKNOWN
    client.state = TaskState.REFUSED
    await_looks(client)
    assert len(client.sent) == 2
    messages = [entry.message for entry in instance.all_logs(envelope.run_id)]
    assert sum("w@h has given it back. It has another" in text for text in messages) == 1
    clock.seconds += FOREIGN_WORKERS_SECONDS
    client.state = TaskState.REFUSED
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not instance.get_run_by_id(envelope.run_id).is_finished:  # type: ignore[union-attr]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    failed = [entry.message for entry in instance.all_logs(envelope.run_id)]
    assert any("was not executed. Each worker gave it back. Worker w@h: It" in it for it in failed)


def test_the_watch_ends_with_its_last_run(
    watch: LaunchWatch, client: FakeClient, instance: DagsterInstance
) -> None:
    """And begins anew with the next one."""
    for _ in range(2):
        envelope = launched(instance)
        others = set(threading.enumerate())  # perhaps of a launcher that was just left
        watch.look_after(instance, envelope)
        await_looks(client)
        new = set(threading.enumerate()) - others
        (thread,) = (it for it in new if it.name == "launch-watch")
        run = instance.get_run_by_id(envelope.run_id)
        assert run is not None
        instance.report_run_failed(run)
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()


def test_an_outage_does_not_end_it(
    watch: LaunchWatch,
    client: FakeClient,
    instance: DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It says in one line that it cannot look, and looks again."""
    failed = threading.Event()

    def fail(*_: str) -> tuple[str, TaskState]:
        failed.set()
        raise ConnectionError("no server on port 6379")

    with monkeypatch.context() as patch:
        patch.setattr(client, "state_of", fail)
        watch.look_after(instance, launched(instance))
        assert failed.wait(PATIENCE_SECONDS)
    await_looks(client)
    (record, *_) = (it for it in caplog.records if "launched" in it.message or "wait" in it.message)
    assert "ConnectionError: no server on port 6379" in record.message
    assert record.exc_info is None


class PartlyBrokenClient(FakeClient):
    """Servers that raise for one run, and note which runs they are asked for."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error
        self.bad_run = ""
        self.asked: list[str] = []

    def state_of(self, run_id: str, _: str) -> tuple[str, TaskState]:
        self.asked.append(run_id)
        if run_id == self.bad_run:
            raise self.error
        return self.now_epoch, self.state


def look_after(
    instance: DagsterInstance, client: PartlyBrokenClient, clock: Clock, *queues: str
) -> tuple[LaunchWatch, list[str]]:
    """A watch of runs in these queues, which were lost long ago; it looks when it is told.

    The servers raise for the first run.
    """
    background = Background()
    background.close()
    watch = LaunchWatch(cast("RunClient", client), background, LEASE_SECONDS, clock)
    envelopes = [replace(launched(instance), queue=queue, task_id=str(uuid4())) for queue in queues]
    client.bad_run = envelopes[0].run_id
    for envelope in envelopes:
        watch.look_after(instance, envelope)
    return watch, [envelope.run_id for envelope in envelopes]


def test_a_run_that_raises_does_not_hold_up_the_others(
    clock: Clock, instance: DagsterInstance, caplog: pytest.LogCaptureFixture
) -> None:
    """Its error is in the log by its id, at each look; the other run is sent again."""
    client = PartlyBrokenClient(ValueError("nobody has thought of this"))
    watch, (bad, good) = look_after(instance, client, clock, "long", "long")
    assert watch._look(instance) is False
    clock.seconds += LEASE_SECONDS
    assert watch._look(instance) is False
    assert [it.run_id for it in client.sent] == [good]
    said = f"Cannot look after run {bad}, which waits to be started: ValueError: nobody has"
    assert sum(text.startswith(said) for text in caplog.messages) == 2


def test_a_queue_whose_server_does_not_answer_holds_up_no_other(
    clock: Clock, instance: DagsterInstance, caplog: pytest.LogCaptureFixture
) -> None:
    """Its other runs are not asked for, as each would wait for the server as long."""
    client = PartlyBrokenClient(UnreachableServerError("redis://fake", "Cannot reach it."))
    watch, (bad, same, other) = look_after(instance, client, clock, "long", "long", "short")
    watch._look(instance)
    assert set(client.asked) == {bad, other}
    clock.seconds += LEASE_SECONDS
    watch._look(instance)
    assert [it.run_id for it in client.sent] == [other]
    assert not any(same in text for text in caplog.messages)
    client.error, client.is_queued = ValueError("it answers now"), False
    watch._look(instance)
    clock.seconds += LEASE_SECONDS
    watch._look(instance)
    assert client.sent[1].run_id == same, "the first of those that were lost by now"


def test_a_queue_is_looked_into_once_for_all_its_runs(
    clock: Clock, instance: DagsterInstance
) -> None:
    """What was lost together is found lost together, also where that happens during a look."""
    client = PartlyBrokenClient(ValueError("never raised"))
    watch, _ = look_after(instance, client, clock, "long", "long", "short")
    client.bad_run = ""
    watch._look(instance)
    assert client.looks == ["long", "short"]
    clock.seconds += LEASE_SECONDS
    watch._look(instance)
    assert len(client.sent) == 3


def test_a_look_ends_with_the_launcher(clock: Clock, instance: DagsterInstance) -> None:
    """No other run is asked for when the launcher has left its servers."""
    client = PartlyBrokenClient(LauncherClosedError("The launcher has left its servers."))
    watch, (bad, _) = look_after(instance, client, clock, "long", "short")
    with pytest.raises(LauncherClosedError):
        watch._look(instance)
    assert client.asked == [bad]
