"""What a worker is put together from, so that a simulation or a test can bring stand-ins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dagster_taskiq.backend import Backend, open_backend
from dagster_taskiq.brokers import Admission, TaskBroker, open_bell, open_broker
from dagster_taskiq.connections import Servers
from dagster_taskiq.messages.queue_names import QueueKind
from dagster_taskiq.worker.child import ChildOptions
from dagster_taskiq.worker.fork_server import fork_server
from dagster_taskiq.worker.forked_process import Forking
from dagster_taskiq.worker.guard_client import GuardClient
from dagster_taskiq.worker.log_tails import LogTails
from dagster_taskiq.worker.observer import WorkerObserver
from dagster_taskiq.worker.options import WorkerOptions
from dagster_taskiq.worker.slot import ChildSlot
from dagster_taskiq.worker.slot_base import Slot
from dagster_taskiq.worker.templates import Templates


@dataclass(frozen=True)
class SlotOptions:
    """What a slot is for.

    Attributes:
        child: options of its children.
        is_warm: whether its children are forked from templates.
        max_tasks, max_memory_kib: see ``ChildSlot``.
    """

    child: ChildOptions
    is_warm: bool = True
    max_tasks: int = 0
    max_memory_kib: int = 0


def slot_options(
    options: WorkerOptions, kind: QueueKind, number: int, *, is_signed: bool
) -> SlotOptions:
    """What the slot of a worker is for.

    Args:
        kind: of its tasks.
        number: of the slot.
        is_signed: whether messages must be signed.
    """
    is_step = kind is QueueKind.STEPS
    return SlotOptions(
        ChildOptions(
            options.include,
            options.log_level,
            number,
            options.database_idle_seconds,
            options.server_patience_seconds,
            refuses_copies=is_signed,
            code_max_age_seconds=options.code_max_age_seconds,
            tracing=options.tracing,
            # a run signs its steps
            environment={} if is_step else options.secrets,
        ),
        # a run gets a fresh process, as from Dagster's other launchers
        max_tasks=options.max_tasks_per_child if is_step else 1,
        max_memory_kib=options.max_memory_per_child_kib if is_step else 0,
    )


@dataclass(frozen=True)
class WorkerParts:
    """The parts of one worker that reach beyond its own process.

    Attributes:
        backend: not yet started.
        guard: not yet started.
        open_broker: makes the broker of a station, with its physical queues and its admission.
        make_slot: makes a slot that is not yet prepared.
        templates: that children of slots are forked from; None for none.
        finish_output: called when all slots have stopped, to write what they have left to be
            written; it may block.
    """

    backend: Backend
    guard: GuardClient
    open_broker: Callable[[QueueKind, Sequence[str], Admission], TaskBroker]
    make_slot: Callable[[SlotOptions, WorkerObserver], Slot]
    templates: Templates | None = None
    finish_output: Callable[[], None] = lambda: None


def usual_parts(servers: Servers, options: WorkerOptions) -> WorkerParts:
    """The parts of a worker on these servers whose slots have child processes."""
    tails, forking = LogTails(), Forking(fork_server(), GuardClient())
    templates = None
    if options.has_warm_code:
        most = options.slots + options.run_slots
        templates = Templates(forking, options.include, options.log_level, most)

    def make_slot(slot: SlotOptions, observer: WorkerObserver) -> Slot:
        return ChildSlot(
            forking,
            tails,
            slot.child,
            templates if slot.is_warm else None,
            max_tasks=slot.max_tasks,
            max_memory_kib=slot.max_memory_kib,
            observer=observer,
        )

    return WorkerParts(
        backend=open_backend(
            servers.backend, servers.signer, open_bell(servers.broker, servers.backend)
        ),
        guard=forking.guard,
        open_broker=lambda _, queues, admission: open_broker(servers.broker, queues, admission),
        make_slot=make_slot,
        templates=templates,
        finish_output=tails.stop,
    )
