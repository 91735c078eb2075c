"""What can go wrong. Each fault says what it did, or None where it could not happen now."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import psutil
import psycopg2  # type: ignore[import-untyped]
from taskiq import BrokerMessage

from dagster_taskiq.brokers import open_broker
from dagster_taskiq.errors import ServerError
from dagster_taskiq.messages.envelope import QueueKind, physical_queue
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq_tests.acceptance.harness import forks, is_running
from dagster_taskiq_tests.acceptance.launched import LaunchedRun, metadata
from dagster_taskiq_tests.messages import STEP_TASK
from dagster_taskiq_tests.proxy import Mode
from dagster_taskiq_tests.servers import PrivateRedis
from dagster_taskiq_tests.soak.director import Director, SoakWorker
from dagster_taskiq_tests.soak.runs import SoakRun
from dagster_taskiq_tests.soak.stack import (
    LEASE_SECONDS,
    EmbeddedServer,
    accept_broker_connections,
    close_broker_connections,
    refuse_broker_connections,
)

Fault = Callable[[Director], "str | None"]

#: How long Dagster's database is away, once in a soak.
DATABASE_AWAY_SECONDS = 60.0

#: How long a worker is left without file descriptors, and RabbitMQ without connections.
SHORTAGE_SECONDS = 8.0

#: How many files a worker may still open then.
_SPARE_FILES = 2


def faults_of(director: Director, seconds: float) -> dict[str, Fault]:
    """The faults that the director's broker can have in a soak of that length, by name."""
    found: dict[str, Fault] = {
        "kill a step's child": _kill_step_child,
        "kill an idle child": _kill_idle_child,
        "SIGTERM to an idle child": _terminate_idle_child,
        "kill a worker": _kill_worker,
        "freeze a worker briefly": lambda it: _freeze_worker(it, 0.4 * LEASE_SECONDS),
        "freeze a worker beyond its lease": lambda it: _freeze_worker(it, 1.7 * LEASE_SECONDS),
        "drain a worker": _drain_worker,
        "kill a guard": _kill_guard,
        "kill a fork server": _kill_fork_server,
        "kill a template": _kill_template,
        "kill a run's process": lambda it: _signal_run(it, signal.SIGKILL),
        "freeze a run's process": lambda it: _signal_run(it, signal.SIGSTOP),
        "cancel a run": _cancel_run,
        "kill the backend": _kill_backend,
        "flush the backend": _flush,
        "freeze the backend for half a lease": lambda it: _freeze_backend(it, 0.5 * LEASE_SECONDS),
        "freeze the backend for two leases": lambda it: _freeze_backend(it, 2 * LEASE_SECONDS),
        "garbage in the queues": _send_garbage,
        "no file descriptors left in a worker": _take_descriptors,
    }
    if seconds > 2 * DATABASE_AWAY_SECONDS:
        found["the database away for a minute"] = _take_database
    if isinstance(director.server, PrivateRedis):
        found["restart the backend from an older snapshot"] = _go_back
    if isinstance(director.server, EmbeddedServer):
        found["kill the embedded server's keeper"] = _kill_keeper
    if director.kind.startswith("rabbitmq"):
        found["close the broker's connections"] = _close_connections
        found["RabbitMQ refuses connections"] = _refuse_connections
    return found


# --- children -----------------------------------------------------------------------------------


def _kill_step_child(director: Director) -> str | None:
    pids = director.busy_pids()
    if not pids:
        return None
    pid = director.random.choice(pids)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return f"pid {pid}"


def _kill_idle_child(director: Director) -> str | None:
    return _signal_idle(director, signal.SIGKILL)


def _terminate_idle_child(director: Director) -> str | None:
    return _signal_idle(director, signal.SIGTERM)


def _signal_idle(director: Director, number: signal.Signals) -> str | None:
    worker = _some_worker(director)
    if worker is None:
        return None
    busy = set(director.busy_pids())
    # a run's process does not tell that it is one; it may be hit as well
    idle = [it.pid for it in _forked(worker) if not forks(it) and it.pid not in busy]
    if not idle:
        return None
    pid = director.random.choice(idle)
    unfinished = director.runs.look()
    with suppress(ProcessLookupError):
        os.kill(pid, number)
    for run in unfinished:
        run.faults.append(f"{number.name} to pid {pid}, which may have been its own")
    return f"pid {pid} of {worker.process.name}"


# --- workers ------------------------------------------------------------------------------------


def _some_worker(director: Director) -> SoakWorker | None:
    workers = director.ready_workers()
    return director.random.choice(workers) if workers else None


def _kill_worker(director: Director) -> str | None:
    worker = _some_worker(director)
    if worker is None:
        return None
    worker.is_doomed = True
    worker.process.kill()
    director.start_worker()
    return worker.process.name


def _freeze_worker(director: Director, seconds: float) -> str | None:
    worker = _some_worker(director)
    if worker is None:
        return None
    worker.process.process.send_signal(signal.SIGSTOP)
    worker.thaws_at = time.monotonic() + seconds
    worker.is_harmed = True

    def thaw() -> None:
        worker.thaws_at = None
        worker.process.process.send_signal(signal.SIGCONT)

    director.later(seconds, thaw)
    return f"{worker.process.name} for {seconds:g} s"


def _drain_worker(director: Director) -> str | None:
    worker = _some_worker(director)
    if worker is None:
        return None
    worker.is_doomed = worker.is_drained = True
    worker.process.terminate()
    director.start_worker()
    return worker.process.name


def _take_descriptors(director: Director) -> str | None:
    worker = _some_worker(director)
    if worker is None:
        return None
    process = psutil.Process(worker.pid)
    _, most = process.rlimit(psutil.RLIMIT_NOFILE)
    process.rlimit(psutil.RLIMIT_NOFILE, (min(process.num_fds() + _SPARE_FILES, most), most))
    worker.is_harmed = True

    def give_back() -> None:
        with suppress(psutil.Error):
            process.rlimit(psutil.RLIMIT_NOFILE, (most, most))

    director.later(SHORTAGE_SECONDS, give_back)
    return f"{worker.process.name} for {SHORTAGE_SECONDS:g} s"


def _kill_guard(director: Director) -> str | None:
    return _kill_helper(director, _guard)


def _kill_fork_server(director: Director) -> str | None:
    return _kill_helper(director, _forkserver)


def _kill_template(director: Director) -> str | None:
    worker = _some_worker(director)
    templates = [it for it in _forked(worker) if forks(it)] if worker else []
    if worker is None or not templates:
        return None
    template = director.random.choice(templates)
    template.kill()
    return f"pid {template.pid} of {worker.process.name}"


def _forked(worker: SoakWorker) -> list[psutil.Process]:
    """Its templates and children: each leads a session, which what steps start does not."""
    server = _forkserver(worker)
    found = []
    with suppress(psutil.Error):
        for process in server.children(recursive=True) if server else []:
            with suppress(ProcessLookupError):
                if os.getsid(process.pid) == process.pid:
                    found.append(process)
    return found


def _kill_helper(
    director: Director, find: Callable[[SoakWorker], psutil.Process | None]
) -> str | None:
    worker = _some_worker(director)
    process = find(worker) if worker else None
    if worker is None or process is None:
        return None
    worker.is_harmed = True
    unfinished = director.runs.look()
    process.kill()
    if find is _forkserver:
        for run in unfinished:
            run.faults.append(f"the fork server of {worker.process.name} was killed")
    return f"pid {process.pid} of {worker.process.name}"


def _guard(worker: SoakWorker) -> psutil.Process | None:
    return _child_with(worker, lambda command: "guard.py" in " ".join(command))


def _forkserver(worker: SoakWorker) -> psutil.Process | None:
    """A fork of the worker, or in its place one that the standard library has started."""
    with suppress(psutil.Error):
        own = psutil.Process(worker.pid).cmdline()
        return _child_with(worker, lambda it: it == own or "multiprocessing.forkserver" in str(it))
    return None


def _child_with(
    worker: SoakWorker, is_wanted: Callable[[list[str]], bool]
) -> psutil.Process | None:
    with suppress(psutil.Error):
        for child in psutil.Process(worker.pid).children():
            with suppress(psutil.Error):
                if is_wanted(child.cmdline()):
                    return child
    return None


# --- runs ---------------------------------------------------------------------------------------


def _signal_run(director: Director, number: signal.Signals) -> str | None:
    running = [(run, _process_of(director, run)) for run in director.runs.look()]
    found = [(run, pid) for run, pid in running if pid is not None and is_running(pid)]
    if not found:
        return None
    run, pid = director.random.choice(found)
    with suppress(ProcessLookupError):
        os.kill(pid, number)
    run.faults.append(f"{number.name} to its process {pid}")
    if number is signal.SIGSTOP:
        director.later(2 * LEASE_SECONDS, lambda: _thaw(pid))
    kind = "own" if run.own else "launched"
    return f"{kind} run {run.number} ({run.run_id}), pid {pid}"


def _thaw(pid: int) -> None:
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_STOPPED:
            process.resume()


def _process_of(director: Director, run: SoakRun) -> int | None:
    """The process that executes a run, by what Dagster's log says."""
    if run.own is not None:
        return run.own.process.pid
    if run.run_id is None:
        return None
    starts = LaunchedRun(director.stack, run.run_id).starts()
    return int(metadata(starts[-1])["pid"]) if starts else None


def _cancel_run(director: Director) -> str | None:
    running = [run for run in director.runs.look() if run.run_id is not None]
    if not running:
        return None
    run = director.random.choice(running)
    run.faults.append("it was cancelled")
    if run.own is None:
        director.runs.cancel(run)
        return f"launched run {run.number} ({run.run_id})"
    known = director.runs.dagster_run(run)
    if known is None or known.is_finished:
        return None
    director.stack.instance.report_run_canceling(known)
    with suppress(ProcessLookupError):
        run.own.signal(signal.SIGTERM)
    return f"own run {run.number} ({run.run_id})"


# --- servers ------------------------------------------------------------------------------------


def _kill_backend(director: Director) -> str:
    director.server.kill()
    if not isinstance(director.server, EmbeddedServer):  # which has a keeper
        director.server.restart()
    return "it comes back with its data, as far as that was written"


def _flush(director: Director) -> str | None:
    try:
        director.server.flush()
    except psycopg2.Error:  # it is just starting, by another fault
        return None
    return "all that it has"


def _freeze_backend(director: Director, seconds: float) -> str:
    director.server.pause()
    # on time, whatever the director is waiting for
    threading.Timer(seconds, director.server.resume).start()
    time.sleep(seconds + 0.2)
    return f"{seconds:g} s"


def _go_back(director: Director) -> str:
    server = director.server
    assert isinstance(server, PrivateRedis)
    server.remember()
    time.sleep(director.random.uniform(1, 4))
    server.go_back()
    return "some seconds older"


def _kill_keeper(director: Director) -> str:
    assert isinstance(director.server, EmbeddedServer)
    director.server.kill_keeper()
    return "the server goes with it"


def _close_connections(director: Director) -> str:
    close_broker_connections(director.stack)
    return "all of them"


def _refuse_connections(director: Director) -> str:
    refuse_broker_connections(director.stack)
    director.later(SHORTAGE_SECONDS, lambda: accept_broker_connections(director.stack))
    return f"for {SHORTAGE_SECONDS:g} s"


def _take_database(director: Director) -> str | None:
    if director.faults["the database away for a minute"]:
        return None
    director.database.set(Mode.REFUSE)
    director.runs.excuse_beginners("Dagster's database went away as it began")
    director.later(DATABASE_AWAY_SECONDS, lambda: director.database.set(Mode.PASS))
    return f"for {DATABASE_AWAY_SECONDS:g} s"


def _send_garbage(director: Director) -> str | None:
    """Into the queues of steps and of runs: no JSON, half a task, an odd header, no run."""
    options = director.stack.broker or _embedded_options(director)

    async def send() -> int:
        broker = open_broker(options)
        await broker.startup()
        try:
            messages = [
                _message(physical_queue(options.key_prefix, kind, "dagster"), data)
                for kind in QueueKind
                for data in _garbage()
            ]
            await broker.kick_many(messages)
            return len(messages)
        finally:
            await broker.shutdown()

    try:
        return f"{asyncio.run(send())} messages"
    except ServerError:  # it is away, by another fault
        return None


def _embedded_options(director: Director) -> ServerOptions:
    from dagster_taskiq.servers.embedded.server import use_embedded_server  # noqa: PLC0415

    return ServerOptions(url=use_embedded_server(director.stack.home))


def _message(queue: str, data: bytes) -> BrokerMessage:
    labels: dict[str, Any] = {"queue_name": queue, "priority": 9}
    return BrokerMessage(
        task_id=str(uuid.uuid4()), task_name="execute_plan", message=data, labels=labels
    )


def _garbage() -> list[bytes]:
    forged = replace(STEP_TASK, lease_seconds=LEASE_SECONDS)
    whole = forged.to_message("", Signer()).message
    odd = whole.replace(b'"attempt": 1', b'"attempt": "first"')
    return [b"\xff\x00garbage", whole[: len(whole) // 2], odd, whole]
