"""The fork server that is a fork of the worker: its children are those of the standard library's.

A probe, a process of its own, stands for the worker.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import psutil
import pytest

from dagster_taskiq.worker import fork_server
from dagster_taskiq_tests.unit.fork_server_probe import SECRET

SECONDS = 60.0

#: Included by a child, it writes down what the child finds.
FACTS = """
import gc, json, logging, os, signal, sys, threading, warnings
from pathlib import Path

from dagster_taskiq._dagster.storage import STORAGE_MODULES

(handler,) = logging.getLogger().handlers
warnings.warn("a warning")
json.dump({
    "log level": logging.getLogger().level,
    "log format": handler.formatter._fmt,
    "warnings are shown by": warnings.showwarning.__module__,
    "filters": [str(it) for it in warnings.filters],
    "signals": {it.name: str(signal.getsignal(it)) for it in signal.valid_signals()
                if isinstance(it, signal.Signals)},
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "threads": [it.name for it in threading.enumerate()],
    "descriptors": len(os.listdir("/dev/fd")),
    "gc": [gc.isenabled(), *gc.get_threshold()],
    "path": sys.path,
    "arguments": sys.argv,
    "directory": os.getcwd(),
    "environment": dict(os.environ),
    "preloaded": [it in sys.modules for it in ("dagster", *STORAGE_MODULES)],
}, open("facts.json", "w"))
"""


class Probe:
    """The process and what it answers."""

    def __init__(self, how: str, directory: Path) -> None:
        self.directory = directory
        reader, writer = os.pipe()
        self.pipe = os.fdopen(reader, "rb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dagster_taskiq_tests.unit.fork_server_probe", how, str(writer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            pass_fds=[writer],
            cwd=directory,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(directory)]),
                SECRET: "hunter2",
            },
        )
        os.close(writer)

    def child(self, module: str = "os") -> psutil.Process:
        """A new child that imports a module."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{module}\n")
        return psutil.Process(int(self._process.stdout.readline()))

    def facts(self) -> dict[str, Any]:
        """What a child finds."""
        (self.directory / "child_facts.py").write_text(FACTS)
        self.child("child_facts")
        facts: dict[str, Any] = json.loads((self.directory / "facts.json").read_text())
        return facts

    def helpers(self) -> list[psutil.Process]:
        """Its own children, the guard and multiprocessing's tracker left out."""
        return [
            process
            for process in psutil.Process(self._process.pid).children()
            if not any(it in " ".join(process.cmdline()) for it in ("guard.py", "tracker"))
        ]

    def kill_guard(self) -> None:
        """SIGKILL to the guard, so that it kills nobody."""
        for process in psutil.Process(self._process.pid).children():
            if "guard.py" in " ".join(process.cmdline()):
                process.kill()

    def kill(self) -> list[psutil.Process]:
        """SIGKILL to it alone; who has outlived it by some seconds."""
        below = psutil.Process(self._process.pid).children(recursive=True)
        self._process.kill()
        self._process.wait()
        return psutil.wait_procs(below, SECONDS)[1]

    def close(self) -> None:
        """End it and what it has left."""
        if self._process.poll() is None:
            for process in self.kill():
                process.kill()
        for stream in (self._process.stdin, self._process.stdout, self.pipe):
            assert stream is not None
            stream.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Probe]:
    """A process whose fork server was forked from it."""
    with closing(Probe("early", tmp_path_factory.mktemp("probe"))) as probe:
        yield probe


@pytest.fixture
def probe(tmp_path: Path) -> Iterator[Probe]:
    """Another one, to be harmed."""
    with closing(Probe("early", tmp_path)) as probe:
        yield probe


def test_children_are_those_of_the_standard_library(shared: Probe) -> None:
    """They find the same signals, logging, warnings, descriptors and environment, whichever way
    their fork server was started.
    """
    with closing(Probe("late", shared.directory)) as probe:
        early, late = shared.facts(), probe.facts()
    for facts in (early, late):  # but for what is the tests' own
        del facts["arguments"][1:], facts["environment"]["PYTEST_CURRENT_TEST"]
    assert early == late
    assert early["preloaded"] == [True, True, True, True]
    assert SECRET not in early["environment"]


def test_there_is_one_fork_server_and_it_is_a_fork(shared: Probe) -> None:
    """All children have the same parent, a copy of the worker."""
    children = [shared.child() for _ in range(3)]
    (server,) = shared.helpers()
    assert {child.ppid() for child in children} == {server.pid}
    assert "forkserver" not in " ".join(server.cmdline())


def test_a_secret_is_gone_from_children(shared: Probe) -> None:
    """Not even the kernel, which shows what a process was started with, has it any more."""
    child = shared.child()
    for process in (child, child.parent()):
        assert process is not None
        text = Path(f"/proc/{process.pid}/environ").read_text(errors="replace")
        assert "PYTHONPATH" in text
        assert "hunter2" not in text


def test_no_descriptor_of_the_worker_lives_on(shared: Probe) -> None:
    """Who waits for a pipe's end, as a command in the background does, need not wait for them."""
    child = shared.child()
    assert shared.pipe.read() == b""
    assert child.is_running()


def test_a_child_runs_what_stands_on_disk_now(shared: Probe) -> None:
    """Modules of users are not in the fork server, whatever the children before have imported."""
    for version in ("first", "a longer second"):
        text = f"open('version', 'w').write({version!r})"
        (shared.directory / "changing.py").write_text(text)
        shared.child("changing")
        assert (shared.directory / "version").read_text() == version


def test_nothing_outlives_a_killed_worker(probe: Probe) -> None:
    """Neither the fork server nor its children."""
    children = [probe.child(), probe.child()]
    assert probe.kill() == []
    assert not any(child.is_running() for child in children)


@pytest.mark.skipif(sys.platform != "linux", reason="Only Linux does this.")
def test_no_child_outlives_a_killed_worker_whose_guard_is_gone(probe: Probe) -> None:
    """Nor do processes that they have started, also if they cannot do anything at the moment."""
    text = "import subprocess; started = subprocess.Popen(['sleep', '1000'])"
    (probe.directory / "starting.py").write_text(text)
    child = probe.child("starting")
    (started,) = child.children()
    child.suspend()
    probe.kill_guard()
    assert probe.kill() == []
    assert psutil.wait_procs([child, started], SECONDS)[1] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_is_deaf(shared: Probe, number: signal.Signals) -> None:
    """A supervisor or a terminal may send these to every process; it goes on."""
    shared.child()
    (server,) = shared.helpers()
    server.send_signal(number)
    assert shared.child().ppid() == server.pid


def test_a_dead_one_is_replaced(probe: Probe) -> None:
    """By one that the standard library starts, and children come as before."""
    probe.child()
    (server,) = probe.helpers()
    server.kill()
    deadline = time.monotonic() + SECONDS
    while server.status() != psutil.STATUS_ZOMBIE:  # until the worker looks for it
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert probe.child().ppid() != server.pid
    assert SECRET not in probe.facts()["environment"]


def _other_signature(listener_fd: int, alive_r: int, authkey_r: int) -> None: ...


def _a_thread_runs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(threading, "active_count", lambda: 2)


#: Where a fork would not do, or would not be understood.
UNFIT: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "no state": lambda patch: patch.setattr(fork_server, "_STATE", None),
    "other state": lambda patch: patch.setattr(fork_server, "_STATE", threading.local()),
    "other arguments": lambda patch: patch.setattr(forkserver, "main", _other_signature),
    "one runs": lambda patch: patch.setattr(
        fork_server, "_STATE", _state(_forkserver_pid=1, _forkserver_address="x")
    ),
    "authentication": lambda patch: patch.setattr(
        fork_server, "_STATE", _state(_forkserver_authkey=None)
    ),
    "threads": _a_thread_runs,
}


def _state(**more: Any) -> forkserver.ForkServer:
    state = forkserver.ForkServer()
    vars(state).update(more)
    return state


@pytest.mark.parametrize("why", UNFIT)
def test_the_standard_library_starts_it_otherwise(
    monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """No fork, and ``begin`` means nothing."""

    def fork() -> int:
        raise BlockingIOError("it would fork")

    monkeypatch.setattr(os, "fork", fork)
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    monkeypatch.setattr(fork_server, "_STATE", _state())
    with pytest.raises(BlockingIOError):
        fork_server.start_early()
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    UNFIT[why](monkeypatch)
    server = fork_server.start_early()
    server.begin(forget=[SECRET])
    server.close()
