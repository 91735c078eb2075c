"""New code reaches warm children: by command, by signal, by a change of a file."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dagster_taskiq_tests.acceptance.harness import Run, Stack, WorkerProcess, until

#: A job on disk. Its versions differ in length too, since a cached file is known by its time in
#: whole seconds and its length.
CODE = """
from dagster import OpExecutionContext, job, op
from dagster_taskiq import taskiq_executor
from dagster_taskiq_tests.acceptance.ops import await_gate, note

VERSION = {version!r}

@op
def says(context: OpExecutionContext) -> None:
    note(context, "said", version=VERSION)

@op
def waits(context: OpExecutionContext) -> None:
    note(context, "waits", version=VERSION)
    await_gate(context)
    note(context, "waited", version=VERSION)

@job(executor_def=taskiq_executor)
def speak() -> None:
    says()

@job(executor_def=taskiq_executor)
def wait() -> None:
    waits()
"""


def write(stack: Stack, version: str) -> None:
    """Put a version of the code where worker and runs find it."""
    (stack.directory / "changing.py").write_text(CODE.format(version=version))


def start(stack: Stack, job: str) -> Run:
    return stack.start(f"changing:{job}", module_path=stack.directory)


def said(stack: Stack) -> str:
    """The version of the code that the worker runs."""
    run = start(stack, "speak").wait()
    assert run.is_success
    (note,) = run.notes("said")
    return str(note.more["version"])


def reload_by_command(stack: Stack, worker: WorkerProcess) -> None:
    settings = str(stack.settings_file())
    assert f"Told {worker.full_name} to reload" in stack.cli(
        "worker", "reload", worker.name, "-y", settings
    )


def reload_by_signal(_: Stack, worker: WorkerProcess) -> None:
    worker.process.send_signal(signal.SIGHUP)


@pytest.mark.parametrize("options", [[], ["--no-warm-code"]], ids=["warm", "cold"])
def test_a_new_run_has_the_code_that_is_on_disk(stack: Stack, options: list[str]) -> None:
    """Its steps too, in slots that have executed older code; nobody need ask for it."""
    write(stack, "one")
    stack.worker(*options, slots=1).await_ready()
    assert said(stack) == "one"
    write(stack, "number two")
    assert said(stack) == "number two"
    assert said(stack) == "number two"


@pytest.mark.parametrize("ask", [reload_by_command, reload_by_signal])
def test_reload(stack: Stack, ask: object) -> None:
    """Idle slots have new children at once; a step that runs ends with the code that it has."""
    assert callable(ask)
    write(stack, "one")
    worker = stack.worker(slots=2).await_ready()
    busy = start(stack, "wait")
    busy.await_notes("waits")
    assert said(stack) == "one"
    write(stack, "number two")
    ask(stack, worker)
    worker.await_log("Reloaded")
    assert said(stack) == "number two"
    busy.open_gate()
    assert busy.wait().is_success
    (waited,) = busy.notes("waited")
    assert waited.more["version"] == "one"
    # the slot that was busy too
    both = [start(stack, "wait") for _ in range(2)]
    for run in both:
        (note,) = run.await_notes("waits")
        assert note.more["version"] == "number two"
        run.open_gate()
        assert run.wait().is_success


def test_reload_of_included_modules_for_runs_and_steps(stack: Stack) -> None:
    """``--reload`` notices a changed file; modules that children import first are fresh too."""
    write(stack, "one")
    worker = stack.worker("--reload", "-i", "changing", slots=1, is_fresh=True).await_ready()
    assert said(stack) == "one"
    write(stack, "number two")
    worker.await_log("Reloaded")
    assert said(stack) == "number two"


def test_a_broken_file_breaks_only_until_it_is_mended(stack: Stack) -> None:
    """The steps fail with the reason while it is; the worker lives on."""
    write(stack, "one")
    worker = stack.worker("--reload", "-i", "changing", slots=1, is_fresh=True).await_ready()
    (stack.directory / "changing.py").write_text("syntax error here")
    worker.await_log("No child")
    failed = stack.run("simple")
    assert not failed.is_success
    write(stack, "number two")
    until(lambda: worker.log.count("Reloaded") >= 2, "it has reloaded again")
    assert said(stack) == "number two"


def test_a_terminal_that_is_closed_ends_the_worker(stack: Stack, tmp_path: Path) -> None:
    """The same signal means the end when the worker's terminal is gone."""
    log = tmp_path / "log"
    ours, theirs = pty.openpty()
    arguments = ["-y", str(stack.settings_file()), "-c", "1", "-n", "in-a-terminal"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", _IN_TERMINAL, "worker", "start", *arguments],
            stdin=theirs,
            stdout=output,
            stderr=output,
            env=stack.environment,
            start_new_session=True,
        )
    worker = WorkerProcess("in-a-terminal", process, log)
    stack.exit_stack.callback(worker.close)
    os.close(theirs)
    worker.await_ready()
    os.close(ours)
    assert worker.wait() == 0
    assert "Stopping" in worker.log


#: Makes standard input the controlling terminal, as a login does, then is the command. The signal
#: that says that it is closed is let through, also where `nohup` has started the tests.
_IN_TERMINAL = """
import fcntl, signal, sys, termios
signal.signal(signal.SIGHUP, signal.SIG_DFL)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from dagster_taskiq.__main__ import main
main()
"""
