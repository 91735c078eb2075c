"""How much memory a worker says that it takes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from dagster_taskiq.worker import memory_gauge
from dagster_taskiq.worker.memory_gauge import MemoryGauge, tree_bytes

PATIENCE_SECONDS = 20.0


def test_children_count() -> None:
    """Their memory is part of it, also where the worker has started them indirectly."""
    code = (
        "import os, sys; held = bytearray(80 * 2**20); held[::4096] = b'x' * len(held[::4096]);"
        "os.fork() and print('up', flush=True); sys.stdin.read()"
    )
    before = tree_bytes()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        grown = tree_bytes() - before
        child.communicate(timeout=PATIENCE_SECONDS)
    # the copy that was forked shares what its parent holds, which counts once
    assert 75 * 2**20 < grown < 130 * 2**20


def test_a_process_that_has_ended_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = tree_bytes()
    monkeypatch.setattr(memory_gauge, "processes_below", lambda _: [2**22 + 1])
    assert 0.5 * alone < tree_bytes() < 2 * alone


def test_a_look_that_hangs_holds_up_nobody() -> None:
    """There is never more than one, and what was found before stays."""
    is_over, began = threading.Event(), []

    def hang() -> int:
        began.append(os.getpid())
        is_over.wait(PATIENCE_SECONDS)
        return 17

    gauge = MemoryGauge(hang)
    for _ in range(3):
        gauge.look()
    assert (gauge.found_bytes, len(began)) == (0, 1)
    thread = gauge._thread
    assert thread is not None
    assert thread.daemon
    is_over.set()
    thread.join(PATIENCE_SECONDS)
    assert gauge.found_bytes == 17
    gauge.look()
    assert gauge._thread is not thread
    gauge._thread.join(PATIENCE_SECONDS)


def test_without_threads_or_descriptors_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that can start no process lives on, and so does its listing."""

    def fail() -> int:
        raise OSError(24, "Too many open files")

    gauge = MemoryGauge(fail)
    gauge.look()
    assert gauge._thread is not None
    gauge._thread.join(PATIENCE_SECONDS)
    assert gauge.found_bytes == 0

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    MemoryGauge(fail).look()
