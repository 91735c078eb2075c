"""The child process of a slot: it waits for a task, executes it, answers, and waits again.

It is forked from a server process in which Dagster is already imported. It leads a process group
of its own, so that whatever a step starts can be killed with it.
"""

from __future__ import annotations

import importlib
import logging
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dagster_taskiq.envelope import TaskName
from dagster_taskiq.results import Place
from dagster_taskiq.tasks import execute_plan, execute_run
from dagster_taskiq.worker import frames


@dataclass(frozen=True)
class ChildOptions:
    """What a child must know before its first task.

    Attributes:
        include: modules to import before it counts as ready.
        log_level: of the root logger, a name.
        slot: the number of its slot.
        environment: variables that it has and other children have not; may be secret.
    """

    include: tuple[str, ...]
    log_level: str
    slot: int
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)


def child_main(connection: socket.socket, options: ChildOptions) -> None:
    """The child's whole life, in its main thread.

    Messages to the parent: ``ready``, or ``failed`` with the reason; for each task ``started``
    before any of its code runs, then ``result``.
    """
    os.setsid()
    os.environ.update(options.environment)
    # between tasks a signal means nothing; during one, Dagster listens to it
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells of every storage it opens
    reason = _import_modules(options.include)
    if reason:
        connection.sendall(frames.encode({"kind": "failed", "reason": reason}))
        return
    connection.sendall(frames.encode({"kind": "ready"}))
    while (task := frames.receive(connection)) is not None:
        connection.sendall(frames.encode({"kind": "started"}))
        connection.sendall(frames.encode(_execute(task)))


def _import_modules(modules: tuple[str, ...]) -> str:
    if os.getcwd() not in sys.path and "" not in sys.path:  # noqa: PTH109 - a text is wanted
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    for module in modules:
        try:
            importlib.import_module(module)
        except BaseException as error:
            if not (isinstance(error, ModuleNotFoundError) and error.name == module):
                traceback.print_exc()
            return f"the module {module!r} cannot be imported: {type(error).__name__}: {error}"
    return ""


def _execute(task: dict[str, Any]) -> dict[str, Any]:
    place = Place.from_dict(task["place"])
    name = TaskName(task["name"])
    if name is TaskName.EXECUTE_PLAN:
        result = execute_plan(task["payload"], place, task["queue"])
    else:
        result = execute_run(name, task["payload"], place, task["queue"])
    sys.stdout.flush()
    sys.stderr.flush()
    return {
        "kind": "result",
        "result": result.to_bytes().decode(),
        "resident_kib": _resident_kib(),
    }


def _resident_kib() -> int:
    """Memory of this process in KiB; its peak where the present one is not to be had."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak // 1024 if sys.platform == "darwin" else peak
    return pages * resource.getpagesize() // 1024
