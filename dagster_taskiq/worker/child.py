"""The child process of a slot: it waits for a task, executes it, answers, and waits again.

It is forked from a server process in which Dagster is already imported. It leads a process group
of its own, so that whatever a step starts can be killed with it.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dagster_taskiq._dagster.patches import copy_logs_by, end_copies_of_steps, keep_definitions
from dagster_taskiq.aio.tracing import Tracing, no_tracing
from dagster_taskiq.defaults import DATABASE_IDLE_SECONDS, SERVER_PATIENCE_SECONDS
from dagster_taskiq.errors import ChannelLostError
from dagster_taskiq.execution.generators import reseed
from dagster_taskiq.execution.loaded_code import LOADED, import_modules
from dagster_taskiq.execution.tasks import TaskRunner
from dagster_taskiq.messages.envelope import TaskName
from dagster_taskiq.messages.plain_json import parse_object
from dagster_taskiq.messages.results import Outcome, TaskResult
from dagster_taskiq.worker.channel import Channel
from dagster_taskiq.worker.child_messages import (
    CodeIsOld,
    Execute,
    Executed,
    FindCode,
    LogClosed,
    LogOpened,
    LookAtRun,
    NotReady,
    OrderTaken,
    Ready,
    RunAnswer,
    RunOrder,
    RunStartLogged,
    Word,
)
from dagster_taskiq.worker.fork_server import die_with_worker, leave_fork_server
from dagster_taskiq.worker.leftovers import Leftovers
from dagster_taskiq.worker.soft_limit import SOFT_LIMIT_SIGNAL, soft_time_limit

#: Runs that a child has begun with last, for which it does not look again whether its code is old.
#: It may work for many in turn, and to look takes milliseconds.
_KNOWN_RUNS = 64


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
        code_max_age_seconds: how old the code of its template may be when it begins with a run;
            None for any age.
        measures_memory: whether it says after each step how much memory it holds.
        tracing: makes what hears of each step.
        environment: variables that it has and other children have not; may be secret.
    """

    include: tuple[str, ...]
    log_level: str
    slot: int
    database_idle_seconds: float = DATABASE_IDLE_SECONDS
    patience_seconds: float = SERVER_PATIENCE_SECONDS
    refuses_copies: bool = False
    code_max_age_seconds: float | None = None
    measures_memory: bool = False
    tracing: Callable[[], Tracing] = no_tracing
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)


def child_main(connection: socket.socket, options: ChildOptions) -> None:
    """The child's whole life, in its main thread.

    It says ``Ready`` or ``NotReady`` first. To each order it says ``OrderTaken`` before any code of
    the task runs, ``LogOpened`` and ``LogClosed`` around each captured output, ``RunStartLogged``
    for a run whose start is in Dagster's log, and its answer. Or it says ``CodeIsOld``, and nothing
    has run.
    """
    set_up_process(options.log_level)
    os.environ.update(options.environment)
    try:
        _serve(Channel(connection), options)
    except ChannelLostError as error:
        sys.exit(f"slot {options.slot}: {error}")
    except ConnectionError:
        pass  # the worker is gone, and so will this process be


def set_up_process(log_level: str) -> None:
    """Begin the life of a process that was forked by the fork server or a template."""
    os.setsid()
    die_with_worker()
    leave_fork_server()
    # between tasks a signal means nothing; during one, Dagster listens to it
    for number in (signal.SIGTERM, signal.SIGINT, SOFT_LIMIT_SIGNAL):
        signal.signal(number, signal.SIG_IGN)
    # the fork server has it blocked, see ``start_deaf`` there; what a step starts must not
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    logging.basicConfig(level=log_level, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells of every storage it opens
    reseed()


def _serve(channel: Channel, options: ChildOptions) -> None:
    def mention(word: Word) -> None:
        """Say something in the midst of a task, whose error it is not that the worker is gone."""
        with suppress(ConnectionError):
            channel.say(word)

    LOADED.find_code()
    with LOADED.loading():
        reason = import_modules(options.include)
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
    known_runs: deque[str] = deque(maxlen=_KNOWN_RUNS)
    while (order := channel.receive()) is not None:
        if isinstance(order, Execute) and order.run_id not in known_runs:
            old = LOADED.why_old(options.code_max_age_seconds)
            if old and not (old.is_own and order.takes_own_code):
                channel.say(CodeIsOld(old.reason, old.is_own, old.is_by_age))
                continue
            known_runs.append(order.run_id)
        if isinstance(order, Execute):
            answer = _execute(
                runner,
                order,
                options,
                lambda: channel.say(OrderTaken()),
                lambda: mention(RunStartLogged()),
            )
            tracing.flush()  # before the worker may kill this process
            channel.say(answer)
        else:
            channel.say(OrderTaken())
            channel.say(_look_after_run(runner, order))


def _execute(
    runner: TaskRunner,
    order: Execute,
    options: ChildOptions,
    take_order: Callable[[], None],
    on_run_start_logged: Callable[[], None],
) -> Executed:
    leftovers, step_end = Leftovers(), ""
    is_step = order.name is TaskName.EXECUTE_PLAN
    place = replace(order.place, pid=os.getpid())  # the claim may name the child before this one
    with soft_time_limit(order.soft_timeout_seconds) if is_step else nullcontext():
        take_order()  # from here on the worker looks at the clock, and its signal may come
        try:
            payload = _payload(order.payload)
        except ValueError as error:
            reason = f"Its payload cannot be read: {error}."
            result = TaskResult(Outcome.ERROR, place, reason=reason)
        else:
            if is_step:
                result = runner.execute_plan(payload, place, order.arrival, leftovers.look)
                step_end = runner.step_end
            else:
                result = runner.execute_run(
                    order.name, payload, place, order.arrival, on_run_start_logged
                )
    sys.stdout.flush()
    sys.stderr.flush()
    left_behind = ", ".join(leftovers.put_back())
    own_kib = _own_kib() if options.measures_memory else 0
    return Executed(result.to_bytes().decode(), left_behind, own_kib, step_end)


def _payload(text: str) -> dict[str, Any]:
    """The payload of a task, which the worker only passes on.

    Raises:
        ValueError: it is no JSON object.
    """
    return parse_object(text.encode(), sys.maxsize)


def _look_after_run(runner: TaskRunner, order: RunOrder) -> RunAnswer:
    try:
        if isinstance(order, LookAtRun):
            return RunAnswer(is_over=runner.is_run_over(_payload(order.payload)))
        if isinstance(order, FindCode):
            return RunAnswer(payloads=runner.find_code(order.run_ids))
        runner.fail_run(_payload(order.payload), order.reason)
    except Exception as error:
        return RunAnswer(error=f"{type(error).__name__}: {error}")
    return RunAnswer()


def _own_kib() -> int:
    """Memory of this process in KiB that would be free without it.

    So what it shares with the template that it was forked from does not count. Its peak where the
    present one is not to be had.
    """
    try:
        lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak // 1024 if sys.platform == "darwin" else peak
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
