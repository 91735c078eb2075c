"""What a command starts on this machine ends with it, however stubborn it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from dagster_taskiq.stack.homes import dagster_home
from dagster_taskiq.stack.processes import Processes, exit_code_in_words
from dagster_taskiq.stack.signals import Interrupted, Interrupts

#: How long a thing may take on a busy machine.
SECONDS = 60.0

#: Starts a process in a session of its own, says its pid, and ends neither itself nor that one.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"],
                         start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def processes() -> Iterator[Processes]:
    """Forced, as if there had been a second Ctrl-C: nobody waits for the stubborn."""
    made = Processes(is_forced=lambda: True)
    made.start_guard()
    yield made
    made.close()


def start(processes: Processes, name: str, code: str) -> subprocess.Popen[bytes]:
    return processes.start(name, ["-c", code], Path.cwd(), subprocess.PIPE)


def test_nothing_is_left_of_a_stubborn_process_nor_of_its_children(processes: Processes) -> None:
    """Also where a child has a session of its own, which no signal to the group reaches."""
    process = start(processes, "one", STUBBORN)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    processes.stop({"one": signal.SIGTERM})
    processes.close()
    assert process.returncode == -signal.SIGKILL
    wait_until(lambda: not psutil.pid_exists(child))
    process.stdout.close()


def test_what_ends_by_itself_is_not_killed() -> None:
    """With patience, each gets the signal that is meant for it; others go on."""
    patient = Processes()
    patient.start_guard()
    code = "import signal, sys, time\nsignal.signal({0}, lambda *_: sys.exit(7))\nprint()\n"
    code += "sys.stdout.flush()\ntime.sleep(600)"
    one = start(patient, "one", code.format("signal.SIGINT"))
    two = start(patient, "two", code.format("signal.SIGTERM"))
    for it in (one, two):
        assert it.stdout is not None
        it.stdout.readline()
    assert patient.ended() == {}
    patient.stop({"one": signal.SIGINT})
    assert patient.ended() == {"one": 7}
    patient.stop({"two": signal.SIGTERM, "unknown": signal.SIGTERM})
    assert patient.ended() == {"one": 7, "two": 7}
    patient.close()
    for it in (one, two):
        assert it.stdout is not None
        it.stdout.close()


#: Ends at a SIGTERM, before its child, which then either removes a file and ends, or does not.
EARLY = """
import os, signal, subprocess, sys
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
subprocess.Popen([sys.executable, "-c", {child!r}, str(os.getpid())])
signal.pause()
"""
LATE_CHILD = """
import os, signal, sys, time
print(os.getpid(), flush=True)
while os.getppid() == int(sys.argv[1]):
    time.sleep(0.01)
time.sleep({seconds})
os.unlink("file")
"""


@pytest.mark.parametrize("is_forced", [False, True])
def test_the_children_of_what_has_ended_may_end_too(tmp_path: Path, is_forced: bool) -> None:
    """Dagster's servers remove their sockets then; without patience they are gone all the same."""
    (tmp_path / "file").touch()
    made = Processes(lambda: is_forced and process.returncode is not None)
    made.start_guard()
    code = EARLY.format(child=LATE_CHILD.format(seconds=600 if is_forced else 0.5))
    process = made.start("one", ["-c", code], tmp_path, subprocess.PIPE)
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    made.stop({"one": signal.SIGTERM})
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert (tmp_path / "file").exists() == is_forced
    assert process.returncode == 0
    made.close()
    process.stdout.close()


def test_exit_codes_in_words() -> None:
    """A signal by its name, which people know."""
    assert exit_code_in_words(3) == "exit code 3"
    assert exit_code_in_words(-9) == "exit code -9, by the signal SIGKILL"


@pytest.fixture
def _handlers() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, below which tests may run, ignores it
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers")
def test_the_first_signal_is_noted_and_the_second_forces() -> None:
    """It raises where the command looks, and at once only where it waits."""
    with Interrupts() as interrupts:
        interrupts.check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted) as caught:
            interrupts.check()
        assert caught.value.number == signal.SIGTERM
        assert not interrupts.is_forced()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.is_forced()
    with Interrupts() as interrupts, pytest.raises(Interrupted), interrupts.at_once():
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("_handlers")
def test_under_nohup_a_hangup_means_nothing() -> None:
    """Else the command would end with a terminal that it is meant to outlive."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGHUP)
        interrupts.check()


def test_a_home_is_that_of_the_command_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of what it starts; afterwards the variable is as it was."""
    look = [sys.executable, "-c", "import os; print(os.environ['DAGSTER_HOME'])"]
    for before in ("/elsewhere", None):
        if before:
            monkeypatch.setenv("DAGSTER_HOME", before)
        else:
            monkeypatch.delenv("DAGSTER_HOME")
        with dagster_home(tmp_path):
            assert subprocess.check_output(look, text=True).strip() == str(tmp_path)
        assert os.environ.get("DAGSTER_HOME") == before
