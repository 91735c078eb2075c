"""How a worker is started."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dagster_taskiq.aio.tracing import Tracing, no_tracing
from dagster_taskiq.defaults import (
    DATABASE_IDLE_SECONDS,
    RESULT_EXPIRES_SECONDS,
    SERVER_PATIENCE_SECONDS,
)
from dagster_taskiq.messages.time_limits import TimeLimits


@dataclass(frozen=True)
class WorkerOptions:
    """How a worker is started.

    Attributes:
        name: without the host.
        queues: as people name them, in no order.
        slots: how many steps run at once.
        run_slots: how many whole runs.
        include: modules that every child imports first.
        log_level: a name.
        max_tasks_per_child, max_memory_per_child_kib: see ``Slot``; 0 is never.
        drain_timeout_seconds: how long running steps may finish when the worker is told to stop.
        result_expires_seconds: how long an unread result is kept.
        limits: how long a step may take whose tags say nothing.
        database_idle_seconds: see ``ChildOptions``.
        server_patience_seconds: how long it waits for servers that are away when it starts, and its
            children for the database.
        has_warm_code: whether children are forked from processes that have loaded their code.
        code_max_age_seconds: see ``ChildOptions``.
        watch: directory whose changes of code give every slot a fresh child; None for none.
        tracing: see ``ChildOptions``.
        secrets: environment variables of the runs' processes that steps do not get.
    """

    name: str
    queues: tuple[str, ...]
    slots: int
    run_slots: int = 0
    include: tuple[str, ...] = ()
    log_level: str = "INFO"
    max_tasks_per_child: int = 0
    max_memory_per_child_kib: int = 0
    drain_timeout_seconds: float = 3600.0
    result_expires_seconds: float = RESULT_EXPIRES_SECONDS
    limits: TimeLimits = TimeLimits()
    database_idle_seconds: float = DATABASE_IDLE_SECONDS
    server_patience_seconds: float = SERVER_PATIENCE_SECONDS
    has_warm_code: bool = True
    code_max_age_seconds: float | None = None
    watch: Path | None = None
    tracing: Callable[[], Tracing] = no_tracing
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
