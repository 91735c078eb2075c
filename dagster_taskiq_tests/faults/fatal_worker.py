"""A worker with a fault built in: ``python -m dagster_taskiq_tests.faults.fatal_worker``.

Its arguments are those of ``dagster-taskiq``; ``FAULT_VARIABLE`` says which fault. The fault is
patched into the worker's own process here, so that the package needs no hooks for it.
"""

import os
import signal
from functools import partial

from dagster_taskiq import connections
from dagster_taskiq.backend.postgresql import PostgresqlBackend
from dagster_taskiq.backend.redis import RedisBackend
from dagster_taskiq.brokers.postgresql import PostgresqlTaskBroker
from dagster_taskiq.brokers.redis import RedisTaskBroker
from dagster_taskiq.cli import main as command_line
from dagster_taskiq.messages.envelope import physical_queue
from dagster_taskiq.worker import listing
from dagster_taskiq.worker.slot import ChildSlot
from dagster_taskiq_tests.faults import FAULT_VARIABLE


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def _patch(owner: type, name: str, *, is_done_first: bool) -> None:
    """Let the process die at the call of a coroutine method, before or after it is executed."""
    original = getattr(owner, name)

    async def fatal(*arguments: object, **more: object) -> None:
        if is_done_first:
            await original(*arguments, **more)
        _die()

    setattr(owner, name, fatal)


def _patch_backends(name: str, *, is_done_first: bool) -> None:
    for kind in (RedisBackend, PostgresqlBackend):
        _patch(kind, name, is_done_first=is_done_first)


def main() -> None:
    # how long a task that it has taken stays out of reach; no test need wait for the usual time
    RedisTaskBroker.in_hand_seconds = PostgresqlTaskBroker.in_hand_seconds = 2.0
    fault = os.environ[FAULT_VARIABLE]
    if fault == "taken":
        _patch_backends("claim", is_done_first=False)
    elif fault == "claimed":
        _patch_backends("claim", is_done_first=True)
    elif fault == "acked":
        _patch(ChildSlot, "run", is_done_first=False)
    elif fault == "ended":
        _patch_backends("complete", is_done_first=False)
    elif fault == "loading":
        _patch(ChildSlot, "_send", is_done_first=True)
    elif fault == "begun":
        _patch_backends("begin", is_done_first=False)
    elif fault == "other protocol":
        listing.PROTOCOL += 1
        connections.physical_queue = partial(physical_queue, protocol=listing.PROTOCOL)
    else:
        raise ValueError(fault)
    command_line(prog_name="dagster-taskiq")


if __name__ == "__main__":
    main()
