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
from dagster_taskiq.aio.tracing import Tracing, no_tracing
from dagster_taskiq.defaults import DATABASE_IDLE_SECONDS, SERVER_PATIENCE_SECONDS
from dagster_taskiq.errors import ChannelLostError
from dagster_taskiq.execution.tasks import TaskRunner
from dagster_taskiq.messages.envelope import TaskName
from dagster_taskiq.messages.plain_json import parse_object
from dagster_taskiq.messages.results import Outcome, TaskResult
from dagster_taskiq.worker.channel import Channel
from dagster_taskiq.worker.child_messages import (
    Execute,
    Executed,
    FailRun,
    LogClosed,
    LogOpened,
    LookAtRun,
    NotReady,
    OrderTaken,
    Ready,
    RunAnswer,
    RunStartLogged,
    Word,
)
from dagster_taskiq.worker.fork_server import die_with_worker, leave_fork_server
from dagster_taskiq.worker.leftovers import Leftovers
from dagster_taskiq.worker.soft_limit import SOFT_LIMIT_SIGNAL, soft_time_limit


@dataclass(frozen=True)
class ChildOptions:
    """What a child must know before its first task.

    Attributes:
        include: modules to import before it counts as ready.
        log_level: of the root logger, a name.
        slot: the number of its slot.
        database_idle_seconds: how long it leaves Dagster's database connected that it does not
            use; 0 is not at all.
        patience_seconds: how long it waits for Dagster's database when that is away.
        refuses_copies: whether it looks into Dagster's log before a step, see ``TaskRunner``.
        tracing: makes what hears of each step.
        environment: variables that it has and other children have not; may be secret.
    """

    include: tuple[str, ...]
    log_level: str
    slot: int
    database_idle_seconds: float = DATABASE_IDLE_SECONDS
    patience_seconds: float = SERVER_PATIENCE_SECONDS
    refuses_copies: bool = False
    tracing: Callable[[], Tracing] = no_tracing
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)


def child_main(connection: socket.socket, options: ChildOptions) -> None:
    """The child's whole life, in its main thread.

    It says ``Ready`` or ``NotReady`` first. To each order it says ``OrderTaken`` before any code of
    the task runs, ``LogOpened`` and ``LogClosed`` around each captured output, ``RunStartLogged``
    for a run whose start is in Dagster's log, and its answer.
    """
    os.setsid()
    die_with_worker()
    leave_fork_server()
    os.environ.update(options.environment)
    # between tasks a signal means nothing; during one, Dagster listens to it
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(SOFT_LIMIT_SIGNAL, signal.SIG_IGN)
    # the fork server has it blocked, see ``start_deaf`` there; what a step starts must not
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
    def mention(word: Word) -> None:
        """Say something in the midst of a task, whose error it is not that the worker is gone."""
        with suppress(ConnectionError):
            channel.say(word)

    reason = _import_modules(options.include)
    if reason:
        channel.say(NotReady(reason))
        return
    keep_definitions()
    end_copies_of_steps()
    tracing = options.tracing()
    runner = TaskRunner(
        database_idle_seconds=options.database_idle_seconds,
        patience_seconds=options.patience_seconds,
        refuses_copies=options.refuses_copies,
        tracing=tracing,
    )
    copy_logs_by(
        lambda path, target: mention(LogOpened(path, target)),
        lambda path: mention(LogClosed(path)),
    )
    channel.say(Ready())
    while (order := channel.receive()) is not None:
        channel.say(OrderTaken())
        if isinstance(order, Execute):
            answer = _execute(runner, order, on_run_start_logged=lambda: mention(RunStartLogged()))
            tracing.flush()  # before the worker may kill this process
            channel.say(answer)
        else:
            channel.say(_look_after_run(runner, order))


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
    runner: TaskRunner, order: Execute, on_run_start_logged: Callable[[], None]
) -> Executed:
    leftovers, step_end = Leftovers(), ""
    try:
        payload = _payload(order.payload)
    except ValueError as error:
        reason = f"Its payload cannot be read: {error}."
        result = TaskResult(Outcome.ERROR, order.place, reason=reason)
    else:
        if order.name is TaskName.EXECUTE_PLAN:
            with soft_time_limit(order.soft_timeout_seconds):
                result = runner.execute_plan(payload, order.place, order.arrival, leftovers.look)
                step_end = runner.step_end
        else:
            result = runner.execute_run(
                order.name, payload, order.place, order.arrival, on_run_start_logged
            )
    sys.stdout.flush()
    sys.stderr.flush()
    left_behind = ", ".join(leftovers.put_back())
    return Executed(result.to_bytes().decode(), left_behind, _resident_kib(), step_end)


def _payload(text: str) -> dict[str, Any]:
    """The payload of a task, which the worker only passes on.

    Raises:
        ValueError: it is no JSON object.
    """
    return parse_object(text.encode(), sys.maxsize)


def _look_after_run(runner: TaskRunner, order: LookAtRun | FailRun) -> RunAnswer:
    try:
        if isinstance(order, LookAtRun):
            return RunAnswer(is_over=runner.is_run_over(_payload(order.payload)))
        runner.fail_run(_payload(order.payload), order.reason)
    except Exception as error:
        return RunAnswer(error=f"{type(error).__name__}: {error}")
    return RunAnswer()


def _resident_kib() -> int:
    """Memory of this process in KiB; its peak where the present one is not to be had."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak // 1024 if sys.platform == "darwin" else peak
    return pages * resource.getpagesize() // 1024
