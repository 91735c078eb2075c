"""Ops that several modules of jobs have; what those see and do goes into their stack's trace.

A trace is a file with a JSON object a line, which every process appends to. A gate is a file that
an op waits for, so that a test decides how long a step runs.

Each process that executes steps imports the module of its job, so the ops are not in ``jobs``,
whose many definitions take a twentieth of a second.
"""

import json
import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from dagster import Failure, OpExecutionContext, op

#: Directory of the stack's trace and gates.
DIRECTORY_VARIABLE = "DAGSTER_TASKIQ_TEST_DIRECTORY"

#: How long an op waits for its gate: longer than any test does.
GATE_SECONDS = 120.0


def note(context: Any, kind: str, **more: Any) -> None:
    """Append a line to the trace."""
    directory = os.getenv(DIRECTORY_VARIABLE)
    if directory is None:
        return
    entry = {
        "kind": kind,
        "run": context.run_id,
        "step": getattr(context, "step_key", None) or str(context.op_handle),
        "attempt": getattr(context, "retry_number", 0) + 1,
        "pid": os.getpid(),
        "time": time.monotonic(),
        **more,
    }
    with (Path(directory) / "trace").open("a", buffering=1) as trace:
        trace.write(json.dumps(entry) + "\n")


def await_gate(context: OpExecutionContext, name: str = "gate") -> None:
    """Wait until the test opens the gate of this run."""
    path = Path(os.environ[DIRECTORY_VARIABLE]) / f"{context.run_id}.{name}"
    deadline = time.monotonic() + GATE_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise Failure(f"nobody has opened {path}")
        time.sleep(0.02)


# --- ops ---


@op
def one() -> int:
    return 1


@op
def add_one(context: OpExecutionContext, x: int) -> int:
    note(context, "ran")
    return x + 1


@op
def ran(context: OpExecutionContext) -> None:
    note(context, "ran")


@op
def gated(context: OpExecutionContext) -> None:
    note(context, "started")
    await_gate(context)
    note(context, "ended")


@op
def cleans_up(context: OpExecutionContext) -> None:
    note(context, "started")
    try:
        time.sleep(GATE_SECONDS)
    finally:
        note(context, "cleaned", main=threading.current_thread() is threading.main_thread())


@op
def stubborn(context: OpExecutionContext) -> None:
    """Ignores SIGTERM, and so does the process that it starts."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", str(GATE_SECONDS)])
    note(context, "started", child=child.pid)
    deadline = time.monotonic() + GATE_SECONDS
    while time.monotonic() < deadline:
        with suppress(BaseException):
            time.sleep(0.05)
