"""A process like a worker's: ``test_fork_server`` looks at it and at its children from outside.

Its one argument says how the fork server is started: "early", or by the standard library, "late".
Each line on standard input, the name of a module, gives it a child which imports that; the answer
is a line with the child's pid. At the end of its input it ends without a word to anybody.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import warnings

from dagster_taskiq.worker.child import ChildOptions
from dagster_taskiq.worker.fork_server import (
    EarlyForkServer,
    fork_server,
    start_early,
    take_variables,
)
from dagster_taskiq.worker.forked_process import Forking
from dagster_taskiq.worker.guard_client import GuardClient
from dagster_taskiq.worker.log_tails import LogTails
from dagster_taskiq.worker.slot import ChildSlot

SECRET = "PROBE_SECRET"


async def serve() -> None:
    guard = GuardClient()
    guard.start()
    slots = []
    for number, module in enumerate(iter(sys.stdin.readline, "")):
        options = ChildOptions((module.strip(),), "WARNING", number)
        slots.append(ChildSlot(Forking(fork_server(), guard), LogTails(), options))
        await slots[-1].prepare()
        sys.stdout.write(f"{slots[-1].pid}\n")
        sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    server = start_early() if sys.argv[1] == "early" else EarlyForkServer()
    # what a worker does only then must not reach its children
    os.close(int(sys.argv[2]))
    logging.basicConfig(level="DEBUG", format="worker: %(message)s")
    warnings.showwarning = print  # type: ignore[assignment]
    warnings.simplefilter("ignore")
    take_variables([SECRET])
    server.begin(forget=[SECRET])
    asyncio.run(serve())
