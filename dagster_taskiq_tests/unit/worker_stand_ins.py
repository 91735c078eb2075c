"""Stand-ins for what a worker has outside its own process: slots, broker, backend, guard.

They do what a test tells them, and note what they are asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

from taskiq import BrokerMessage

from dagster_taskiq.backend import Backend, Claim, ClaimAnswer, Renewal
from dagster_taskiq.brokers import Admission, Delivery, TaskBroker
from dagster_taskiq.brokers.base import Listener
from dagster_taskiq.errors import ServerError
from dagster_taskiq.messages.envelope import Envelope, QueueKind
from dagster_taskiq.messages.queue_pauses import QueuePause
from dagster_taskiq.messages.results import Outcome, Place, TaskResult
from dagster_taskiq.messages.worker_records import RunningTask, WorkerRecord
from dagster_taskiq.worker.child_messages import Answer, Execute, Executed, Order, RunAnswer
from dagster_taskiq.worker.guard_client import GuardClient
from dagster_taskiq.worker.observer import WorkerObserver
from dagster_taskiq.worker.slot_base import ChildDied, Slot

PLACE = Place("w@h", "worker-id", "h", 4711, 1)

#: What a child does with an order: gets its slot and the order, and may call
#: ``on_run_start_logged``.
Act = Callable[["FakeSlot", Order], Any]


def finished(**values: Any) -> Executed:
    """The answer of a child that has executed its task."""
    result = TaskResult(Outcome.FINISHED, PLACE, **values)
    return Executed(result.to_bytes().decode(), "", 1, "success")


class FakeSlot(Slot):
    """Answers at once, or as ``act`` says; ``pid`` is 4711 and the slot's number more.

    Attributes:
        act: what its child does, a coroutine function; its return value is the answer.
        failure: raised by ``prepare``.
        happened: what was done with it, in words.
        on_run_start_logged: to be called by ``act`` when the log says that the run has started.
        told: set when its child gets a signal.
    """

    def __init__(self, number: int = 1, happened: list[str] | None = None) -> None:
        self.number = number
        self.act: Act | None = None
        self.failure: Exception | None = None
        self.happened = [] if happened is None else happened
        self.orders: list[Order] = []
        self.on_run_start_logged: Callable[[], None] = lambda: None
        self.told = asyncio.Event()

    @property
    def pid(self) -> int:
        return 4711 + self.number

    async def prepare(self, location: str = "") -> None:
        if self.failure is not None:
            raise self.failure

    def retire(self) -> None: ...

    async def run(
        self,
        order: Order,
        on_child: Callable[[int], None],
        on_order_taken: Callable[[], None] = lambda: None,
        on_run_start_logged: Callable[[], None] = lambda: None,
    ) -> Answer | ChildDied:
        self.orders.append(order)
        self.on_run_start_logged = on_run_start_logged
        on_child(self.pid)
        on_order_taken()
        if self.act is not None:
            answer: Answer | ChildDied = await self.act(self, order)
            return answer
        return finished() if isinstance(order, Execute) else RunAnswer()

    def interrupt(self) -> None:
        self.happened.append("interrupted")
        self.told.set()

    def warn(self) -> None:
        self.happened.append("warned")

    def kill(self) -> None:
        self.happened.append("killed")
        self.told.set()

    async def stop(self) -> None: ...


class FakeBackend:
    """Grants claims and stores results, unless it is told otherwise.

    Attributes:
        answers: to the next claims; an exception is raised. Further ones are granted.
        failures: raised by the next calls of ``complete``.
        is_held: whether ``complete`` finds the claim.
        happened: what was done, in words.
        results: by task id.
        records: what heartbeats said.
    """

    address = "memory://fake"
    identity = "fake"

    def __init__(self, happened: list[str] | None = None) -> None:
        self.happened = [] if happened is None else happened
        self.answers: list[ClaimAnswer | Exception] = []
        self.failures: list[Exception] = []
        self.is_held = True
        self.results: dict[str, bytes] = {}
        self.records: list[WorkerRecord] = []
        self.told: Sequence[RunningTask] = ()
        self.claims: list[Claim] = []
        self.orders: asyncio.Queue[bytes] = asyncio.Queue()

    async def claim(
        self, claim: Claim, *, needs_live_run: bool, until_begun: bool = False
    ) -> ClaimAnswer:
        self.claims.append(claim)
        answer = self.answers.pop(0) if self.answers else ClaimAnswer.GRANTED
        if isinstance(answer, Exception):
            raise answer
        self.happened.append(f"claim {answer.value}")
        return answer

    async def begin(self, claim: Claim) -> None:
        self.happened.append("begin")

    async def release(self, claim: Claim) -> None:
        self.happened.append("release")

    async def renew(self, claims: Sequence[Claim]) -> list[Renewal]:
        return [Renewal(True, None, True, False, it.epoch) for it in claims]

    async def complete(
        self, claim: Claim, result: bytes, *, expires_seconds: float, is_refused: bool = False
    ) -> bool:
        if self.failures:
            raise self.failures.pop(0)
        self.happened.append("complete")
        if self.is_held:
            self.results[claim.task_id] = result
        return self.is_held

    async def startup(self) -> None: ...

    async def shutdown(self) -> None: ...

    async def workers(self) -> list[WorkerRecord]:
        return []

    async def paused_queues(self) -> dict[str, QueuePause]:
        return {}

    async def heartbeat(
        self, record: WorkerRecord, *, expires_seconds: float, running: Sequence[RunningTask]
    ) -> None:
        self.records.append(record)
        self.told = running

    async def tidy(self) -> None: ...

    async def goodbye(self, worker_id: str) -> None:
        self.happened.append("goodbye")

    async def wait_for_control(self, worker_id: str, timeout_seconds: float) -> list[bytes]:
        return [await self.orders.get()]

    def whole(self) -> Backend:
        """For who takes a whole backend; the other methods are not there."""
        return cast("Backend", self)


class FakeGuard(GuardClient):
    """Watches nothing, and has no process."""

    def start(self) -> None: ...

    async def monitor(self, on_unguarded: Callable[[int], None] = lambda _: None) -> None:
        await asyncio.Event().wait()

    def close(self) -> None: ...


class FakeBroker(TaskBroker):
    """Delivers what is put into it, in that order.

    Attributes:
        happened: what became of each message, "ack" or "release", in order.
        notes: the last one that was left for each run.
    """

    address = "memory://fake"
    queues = ("q",)

    def __init__(
        self, happened: list[str] | None = None, admission: Admission | None = None
    ) -> None:
        super().__init__()
        self.admission = admission
        self.happened = [] if happened is None else happened
        self.notes: dict[str, bytes] = {}
        self._waiting: list[bytes] = []
        self._changed = asyncio.Event()

    def put(self, data: bytes) -> None:
        """A message for the listener."""
        self._waiting.append(data)
        self._changed.set()

    def deliver(self, data: bytes, content: Any = None) -> Delivery:
        """A message in somebody's hands."""

        async def ack() -> None:
            self.happened.append("ack")

        async def release() -> None:
            self.happened.append("release")

        return Delivery(data=data, ack=ack, release=release, content=content)

    def listener(self) -> Listener:
        return _FakeListener(self)

    async def kick(self, message: BrokerMessage) -> None:
        self.put(message.message)

    async def kick_many(self, messages: Sequence[BrokerMessage]) -> None:
        for message in messages:
            self.put(message.message)

    async def leave_note(self, run_id: str, note: bytes) -> None:
        self.notes[run_id] = note

    async def take_note(self, run_id: str) -> bytes | None:
        return self.notes.get(run_id)

    async def withdraw(self, queue: str, task_ids: Collection[str]) -> set[str]:
        return set()

    async def absent(self, queue: str, task_ids: Collection[str]) -> set[str]:
        return set()

    async def depth(self, queue: str) -> int:
        return len(self._waiting)

    async def product(self) -> str:
        return "fake"


class _FakeListener(Listener):
    def __init__(self, broker: FakeBroker) -> None:
        self._broker = broker

    async def look(self) -> Delivery | None:
        broker = self._broker
        return broker.deliver(broker._waiting.pop(0)) if broker._waiting else None

    async def wait(self) -> None:
        await self._broker._changed.wait()
        self._broker._changed.clear()

    async def turn_to(self, queues: Sequence[str]) -> None:
        pass


class Witness(WorkerObserver):
    """Notes the events of tasks by name, and what came with the last one of each."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.details: dict[str, Any] = {}

    def _note(self, event: str, detail: Any = None) -> None:
        self.heard.append(event)
        self.details[event] = detail

    def admitted(self, envelope: Envelope) -> None:
        self._note("admitted")

    def given_back(self, envelope: Envelope) -> None:
        self._note("given back")

    def dropped(self, envelope: Envelope, answer: ClaimAnswer) -> None:
        self._note("dropped", answer)

    def claimed(self, envelope: Envelope) -> None:
        self._note("claimed")

    def began(self, envelope: Envelope, place: Place) -> None:
        self._note("began", place)

    def stopped(self, claim: Claim, cause: str) -> None:
        self._note("stopped", cause)

    def ended(self, envelope: Envelope, ending: Any) -> None:
        self._note("ended", ending)

    def completed(
        self, envelope: Envelope, result: TaskResult, *, is_cancelled: bool, size_bytes: int
    ) -> None:
        self._note("completed", (result, is_cancelled))
        self.details["size"] = size_bytes

    def released(self, envelope: Envelope) -> None:
        self._note("released")

    def refused(self, address: str, what: str, error: Exception) -> None:
        self._note("refused", what)

    def broker_away(self, kind: QueueKind, error: ServerError) -> None:
        self._note("broker away", kind)

    def broker_back(self, kind: QueueKind) -> None:
        self._note("broker back", kind)

    def failed(self, task: str) -> None:
        self._note("failed", task)
