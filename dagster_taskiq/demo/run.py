"""The order of events of ``dagster-taskiq demo``."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from dagster import DagsterInstance, DagsterRunStatus

from dagster_taskiq.config.settings import Settings
from dagster_taskiq.config.settings_file import load_yaml
from dagster_taskiq.connections import find_servers
from dagster_taskiq.demo import jobs
from dagster_taskiq.demo.display import Display
from dagster_taskiq.demo.processes import DemoProcesses
from dagster_taskiq.demo.progress import Progress, Step
from dagster_taskiq.errors import DemoError
from dagster_taskiq.stack.homes import dagster_home
from dagster_taskiq.stack.signals import Interrupted, Interrupts

#: By name: the queue and the slots of a worker. One slot shows that the higher priority goes
#: first, two that long steps run side by side.
WORKERS = {"short": (jobs.SHORT_QUEUE, 1), "long": (jobs.LONG_QUEUE, 2)}

#: How often the event log is read.
LOOK_SECONDS = 0.15

#: A run that takes longer will not end; a slow machine takes twenty.
RUN_SECONDS = 180.0

_SETTINGS = "settings.yaml"

_DAGSTER_YAML = """\
telemetry:
  enabled: false
"""

#: For the run and for the workers. The prefix keeps the demo's queues apart from others of the
#: same name, where a broker of the user's own is configured.
_SETTINGS_YAML = """\
execution:
  config:
    cancel_grace_seconds: 5
    server_patience_seconds: 0
    config_source:
      key_prefix: dagster-taskiq-demo
"""


def run_demo() -> int:
    """Run the demo in a temporary DAGSTER_HOME and stop everything it has started.

    Returns:
        the exit code: 0, or 128 and the number of the signal that has ended it.

    Raises:
        EmbeddedServerError: there is no server to start, or it does not start.
        DemoError: a worker or the run has failed.
    """
    display = Display()
    with Interrupts() as interrupts:
        try:
            steps = _run(display, interrupts)
        except Interrupted as interruption:
            with suppress(OSError):  # of a terminal that is closed
                display.say("Interrupted. All that was started has been stopped.")
            return 128 + interruption.number
        display.finish(steps)
    return 0


def _run(display: Display, interrupts: Interrupts) -> list[Step]:
    # what a line starts, the stack stops, in the opposite order
    with ExitStack() as stack:
        home = stack.enter_context(_temporary_home())
        stack.enter_context(display)
        processes = DemoProcesses(home)
        stack.callback(_stop, display, processes)
        with interrupts.at_once():
            display.phase("Starting the server")
            settings = Settings.from_config(load_yaml(home / _SETTINGS))
            broker = find_servers(settings).broker
        display.phase(f"Starting {len(WORKERS)} workers")
        processes.start_guard()
        for name, (queue, slots) in WORKERS.items():
            processes.start_worker(name, _worker_arguments(queue, slots))
        # makes the tables that the run and the workers would else make at the same time
        instance = stack.enter_context(DagsterInstance.get())
        interrupts.check()
        processes.start_run(["-m", jobs.__name__, "-j", jobs.shop_day.name, "-c", _SETTINGS])
        place = broker.address if settings.broker_url else "the embedded server"
        display.phase(f"Running the job {jobs.shop_day.name} over {place}")
        progress = Progress(instance)
        _watch(interrupts, display, processes, progress)
        return list(progress.steps.values())


def _worker_arguments(queue: str, slots: int) -> list[str]:
    # no step runs any more when a worker is told to stop, but for one that ignores its cancel
    options = {"-q": queue, "-c": str(slots), "-y": _SETTINGS, "--drain-timeout": "1"}
    return [part for option in options.items() for part in option]


def _watch(
    interrupts: Interrupts, display: Display, processes: DemoProcesses, progress: Progress
) -> None:
    """Show the run until it has succeeded.

    Raises:
        Interrupted: by a signal.
        DemoError: a worker has ended, or the run has failed or does not end.
    """
    deadline = time.monotonic() + RUN_SECONDS
    is_running = True
    while is_running:
        interrupts.check()
        processes.check_workers()
        is_running = processes.is_running()  # first, so that the last events are read after it
        changed = progress.update()
        display.show(list(progress.steps.values()), changed)
        if time.monotonic() > deadline:
            raise DemoError(f"The run takes longer than {RUN_SECONDS:g} s.\n{processes.logs()}")
        time.sleep(LOOK_SECONDS)
    status = progress.status()
    if status is not DagsterRunStatus.SUCCESS:
        text = f"The run's status is {status.value}." if status else "The run did not start."
        raise DemoError(f"{text}\n{processes.logs()}")


def _stop(display: Display, processes: DemoProcesses) -> None:
    try:
        display.phase("Stopping the workers")
    finally:
        processes.stop()


@contextmanager
def _temporary_home() -> Iterator[Path]:
    """A new DAGSTER_HOME, of this process and those it starts; nothing runs in it afterwards."""
    # a short name, as the server's socket in it may have a path of a hundred bytes
    with tempfile.TemporaryDirectory(prefix="taskiq-demo-") as directory:
        home = Path(directory).resolve()
        (home / "dagster.yaml").write_text(_DAGSTER_YAML, encoding="utf8")
        (home / _SETTINGS).write_text(_SETTINGS_YAML, encoding="utf8")
        with dagster_home(home):
            yield home
