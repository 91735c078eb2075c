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
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dagster_taskiq._dagster.patches import copy_logs_by, end_copies_of_steps, keep_definitions
from dagster_taskiq.aio.forked_copies import ending_copies
from dagster_taskiq.defaults import SERVER_PATIENCE_SECONDS
from dagster_taskiq.errors import ChannelLostError
from dagster_taskiq.execution.tasks import TaskRunner
from dagster_taskiq.messages.envelope import TaskName
from dagster_taskiq.messages.plain_json import parse_object
from dagster_taskiq.messages.results import Outcome, Place, TaskResult
from dagster_taskiq.worker.channel import Channel
from dagster_taskiq.worker.fork_server import die_with_worker, leave_fork_server
from dagster_taskiq.worker.leftovers import Leftovers
from dagster_taskiq.worker.soft_limit import SOFT_LIMIT_SIGNAL, soft_time_limit

#: Names of what ``run_watch`` has to say, beside those of tasks.
LOOK_AT_RUN = "look_at_run"
FAIL_RUN = "fail_run"


@dataclass(frozen=True)
class ChildOptions:
    """What a child must know before its first task.

    Attributes:
        include: modules to import before it counts as ready.
        log_level: of the root logger, a name.
        slot: the number of its slot.
        keeps_connections: whether it leaves Dagster's database connected between statements.
        patience_seconds: how long it waits for Dagster's database when that is away.
        refuses_copies: whether it looks into Dagster's log before a step, see ``TaskRunner``.
        environment: variables that it has and other children have not; may be secret.
    """

    include: tuple[str, ...]
    log_level: str
    slot: int
    keeps_connections: bool = True
    patience_seconds: float = SERVER_PATIENCE_SECONDS
    refuses_copies: bool = False
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)


def child_main(connection: socket.socket, options: ChildOptions) -> None:
    """The child's whole life, in its main thread.

    Messages to the parent: ``ready``, or ``failed`` with the reason; for each task ``started``
    before any of its code runs, ``log`` and ``log-end`` around each of its captured outputs,
    ``begun`` for a run whose start is in Dagster's log, and ``result``, which names what keeps the
    child from taking another task.
    """
    os.setsid()
    die_with_worker()
    leave_fork_server()
    os.environ.update(options.environment)
    # between tasks a signal means nothing; during one, Dagster listens to it
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(SOFT_LIMIT_SIGNAL, signal.SIG_IGN)
    # the fork server was started with it blocked, see ``slot``; what a step starts must not be
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells of every storage it opens
    try:
        _serve(Channel(connection), options)
    except ChannelLostError as error:
        sys.exit(f"slot {options.slot}: {error}")
    except ConnectionError:
        pass  # the worker is gone, and so will this process be


def _serve(channel: Channel, options: ChildOptions) -> None:
    def mention(kind: str, **content: Any) -> None:
        """Say something in the midst of a task, whose error it is not that the worker is gone."""
        with suppress(ConnectionError):
            channel.say(kind, **content)

    reason = _import_modules(options.include)
    if reason:
        channel.say("failed", reason=reason)
        return
    keep_definitions()
    end_copies_of_steps()
    runner = TaskRunner(
        keeps_connections=options.keeps_connections,
        patience_seconds=options.patience_seconds,
        refuses_copies=options.refuses_copies,
    )
    copy_logs_by(
        lambda path, target: mention("log", path=path, target=target),
        lambda path: mention("log-end", path=path),
    )
    channel.say("ready")
    while (task := channel.receive()) is not None:
        channel.say("started")
        if task["name"] in (LOOK_AT_RUN, FAIL_RUN):
            kind, answer = "run", _look_after_run(runner, task)
        else:
            kind, answer = "result", _execute(runner, task, on_begun=lambda: mention("begun"))
        channel.say(kind, **answer, resident_kib=_resident_kib())


def _import_modules(modules: tuple[str, ...]) -> str:
    _find_code_here()
    for module in modules:
        try:
            with ending_copies():
                importlib.import_module(module)
        except BaseException as error:
            if not (isinstance(error, ModuleNotFoundError) and error.name == module):
                traceback.print_exc()
            return f"the module {module!r} cannot be imported: {type(error).__name__}: {error}"
    return ""


def _find_code_here() -> None:
    """Let modules of the worker's directory be found, wherever the run's process was started.

    Dagster takes the first entry for the script's directory and skips it when it loads a job, so
    the directory is the second one.
    """
    here = str(Path.cwd())
    sys.path[:] = ["", here, *(path for path in sys.path if path not in ("", here))]


def _execute(
    runner: TaskRunner, task: dict[str, Any], on_begun: Callable[[], None]
) -> dict[str, Any]:
    place = Place.from_dict(task["place"])
    name = TaskName(task["name"])
    leftovers = Leftovers()
    try:
        payload = _payload(task)
    except ValueError as error:
        result = TaskResult(Outcome.ERROR, place, reason=f"Its payload cannot be read: {error}.")
    else:
        if name is TaskName.EXECUTE_PLAN:
            with soft_time_limit(task.get("soft_timeout_seconds")):
                result = runner.execute_plan(payload, place, task["queue"], leftovers.look)
        else:
            result = runner.execute_run(name, payload, place, task["queue"], on_begun)
    sys.stdout.flush()
    sys.stderr.flush()
    left_behind = ", ".join(leftovers.put_back())
    return {"result": result.to_bytes().decode(), "left_behind": left_behind}


def _payload(task: dict[str, Any]) -> dict[str, Any]:
    """The payload of a task, which the worker only passes on.

    Raises:
        ValueError: it is no JSON object.
    """
    text: str = task["payload"]
    return parse_object(text.encode(), sys.maxsize)


def _look_after_run(runner: TaskRunner, task: dict[str, Any]) -> dict[str, Any]:
    answer = {"is_over": False, "error": ""}
    try:
        if task["name"] == LOOK_AT_RUN:
            answer["is_over"] = runner.is_run_over(_payload(task))
        else:
            runner.fail_run(_payload(task), task["reason"])
    except Exception as error:
        answer["error"] = f"{type(error).__name__}: {error}"
    return answer


def _resident_kib() -> int:
    """Memory of this process in KiB; its peak where the present one is not to be had."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak // 1024 if sys.platform == "darwin" else peak
    return pages * resource.getpagesize() // 1024
