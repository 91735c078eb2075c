"""The guard kills a worker's process groups when the worker is gone or their deadline has passed.

With a real guard process and real victims: each is a process group of a child that holds the GIL
and a grandchild, which both ignore SIGTERM.
"""

from __future__ import annotations

import ast
import asyncio
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import psutil
import pytest

from dagster_taskiq.worker import guard as guard_module
from dagster_taskiq.worker import guard_client
from dagster_taskiq.worker.guard import clock
from dagster_taskiq.worker.guard_client import GuardClient

SECONDS = 20.0

#: Ignores what can be ignored, starts a grandchild that does too, and never lets go of the GIL:
#: it waits in C for a lock that it has itself, which takes no core from the tests.
VICTIM = """
import ctypes, signal, subprocess
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "1000"])
print(child.pid, flush=True)
libc, lock = ctypes.PyDLL(None), ctypes.create_string_buffer(256)
libc.pthread_mutex_init(lock, None)
for _ in range(2):
    libc.pthread_mutex_lock(lock)
"""


class Victim:
    """A process group as a slot's child and its step have it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", VICTIM], stdout=subprocess.PIPE, start_new_session=True
        )
        assert self._process.stdout
        self.group = self._process.pid
        self.grandchild = psutil.Process(int(self._process.stdout.readline()))

    def is_alive(self) -> bool:
        """Whether both processes run."""
        return self._process.poll() is None and _runs(self.grandchild)

    def is_dead(self) -> bool:
        """Whether neither does."""
        return self._process.poll() is not None and not _runs(self.grandchild)

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.group, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout
        self._process.stdout.close()


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


@pytest.fixture
def victims() -> Iterator[Callable[[], Victim]]:
    started: list[Victim] = []

    def start() -> Victim:
        started.append(Victim())
        return started[-1]

    yield start
    for victim in started:
        victim.end()


@pytest.fixture
def client() -> Iterator[GuardClient]:
    client = GuardClient()
    client.start()
    yield client
    client.close()


async def _until(condition: Callable[[], object]) -> None:
    """Wait in the loop, which the monitor needs."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.005)


@asynccontextmanager
async def monitored(client: GuardClient, *arguments: Callable[[int], None]) -> AsyncIterator[None]:
    """The client's monitor runs; it ends with the client."""
    monitor = asyncio.create_task(client.monitor(*arguments))
    yield
    client.close()
    await asyncio.wait_for(monitor, SECONDS)


async def answered(client: GuardClient) -> None:
    """Wait until the guard has started, and has answered what it was asked."""
    await _until(lambda: client._question is None)


def suspended(client: GuardClient) -> psutil.Process:
    """The client's guard, which is stopped."""
    guard = psutil.Process(client.pid)
    guard.suspend()
    return guard


def test_the_end_of_the_worker_kills_all_that_is_watched(
    client: GuardClient, victims: Callable[[], Victim]
) -> None:
    """Children that hold the GIL and their children too, with a deadline or without."""
    one, other = victims(), victims()
    client.watch(one.group)
    client.watch(other.group)
    client.set_deadline(other.group, clock() + 1000)
    assert one.is_alive()
    assert other.is_alive()
    client.close()
    wait_until(one.is_dead)
    wait_until(other.is_dead)


def test_a_killed_worker_is_noticed(victims: Callable[[], Victim]) -> None:
    """Only the worker holds the pipe: its SIGKILL ends it, whatever children it has."""
    victim = victims()
    script = (
        "import subprocess, sys, time\n"
        "from dagster_taskiq.worker.guard_client import GuardClient\n"
        "client = GuardClient(); client.start(); client.watch(int(sys.argv[1]))\n"
        "child = subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
        "print(client.pid, child.pid, flush=True); time.sleep(1000)\n"
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", script, str(victim.group)], stdout=subprocess.PIPE
    )
    assert worker.stdout
    guard_pid, child_pid = map(int, worker.stdout.readline().split())
    guard = psutil.Process(guard_pid)
    try:
        assert victim.is_alive()
        worker.kill()
        wait_until(victim.is_dead)
        wait_until(lambda: not _runs(guard))
    finally:
        os.kill(child_pid, signal.SIGKILL)
        worker.wait()
        worker.stdout.close()


def test_a_passed_deadline_kills_its_group_alone(
    client: GuardClient, victims: Callable[[], Victim]
) -> None:
    """Soon after, not before, and no other group."""
    late, other = victims(), victims()
    client.watch(late.group)
    client.watch(other.group)
    deadline = clock() + 0.3
    client.set_deadline(late.group, deadline)
    client.set_deadline(other.group, clock() + 1000)
    while clock() < deadline - 0.02:
        assert late.is_alive() or clock() >= deadline
        time.sleep(0.005)
    wait_until(late.is_dead)
    assert clock() < deadline + 5
    assert other.is_alive()


def test_a_deadline_in_the_past_kills_at_once(
    client: GuardClient, victims: Callable[[], Victim]
) -> None:
    """A worker that thaws late says so late."""
    victim = victims()
    client.set_deadline(victim.group, clock() - 1)
    wait_until(victim.is_dead)


def test_a_renewed_deadline_does_not_kill(
    client: GuardClient, victims: Callable[[], Victim]
) -> None:
    """As long as it is moved on; the last one counts."""
    victim, witness = victims(), victims()
    end = clock() + 1.0
    while clock() < end:
        client.set_deadline(victim.group, clock() + 0.5)
        time.sleep(0.01)
    client.set_deadline(victim.group, clock() + 1000)
    # what is killed by a later message shows that all before it has been obeyed
    client.set_deadline(witness.group, clock())
    wait_until(witness.is_dead)
    assert victim.is_alive()


def test_a_lifted_deadline_does_not_kill_and_the_end_does(
    client: GuardClient, victims: Callable[[], Victim]
) -> None:
    """An idle child lives as long as its worker."""
    victim, witness = victims(), victims()
    client.set_deadline(victim.group, clock() + 0.1)
    client.lift_deadline(victim.group)
    client.set_deadline(witness.group, clock() + 0.2)
    wait_until(witness.is_dead)
    assert victim.is_alive()
    client.close()
    wait_until(victim.is_dead)


def test_a_forgotten_group_is_left_alone(
    client: GuardClient, victims: Callable[[], Victim]
) -> None:
    """Its number may be another process' by now."""
    forgotten, watched = victims(), victims()
    for group in (forgotten.group, watched.group):
        client.watch(group)
    client.forget(forgotten.group)
    client.close()
    wait_until(watched.is_dead)
    assert forgotten.is_alive()


def test_many_groups_fit(client: GuardClient, victims: Callable[[], Victim]) -> None:
    """Groups that are gone do no harm to those that are not."""
    victim = victims()
    nobody = _unused_pid()
    client.watch(victim.group)
    for _ in range(20_000):
        client.set_deadline(nobody, clock() + 1000)
    client.set_deadline(nobody, clock() - 1)
    client.close()
    wait_until(victim.is_dead)


def _unused_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_meant_for_the_worker_do_not_end_the_guard(
    number: int, client: GuardClient, victims: Callable[[], Victim]
) -> None:
    """Ctrl-C in the terminal, or a service manager's TERM to the whole control group."""
    victim = victims()
    witness = victims()
    client.watch(victim.group)
    client.set_deadline(witness.group, clock())
    wait_until(witness.is_dead)  # it runs, so it has set its handlers
    os.kill(client.pid, number)
    client.close()
    wait_until(victim.is_dead)


def test_the_guard_is_in_a_session_of_its_own(client: GuardClient) -> None:
    """A signal to the worker's group, or the end of its terminal, does not reach it."""
    assert os.getsid(client.pid) == client.pid
    assert os.getpgid(client.pid) == client.pid


def test_a_killed_guard_is_replaced_by_one_that_knows_everything(
    client: GuardClient, victims: Callable[[], Victim], caplog: pytest.LogCaptureFixture
) -> None:
    """The groups, and their deadlines; nothing is killed meanwhile, and it is said."""
    watched, due, forgotten = victims(), victims(), victims()

    async def scenario() -> None:
        for victim in (watched, due, forgotten):
            client.watch(victim.group)
        client.forget(forgotten.group)
        first = client.pid
        # a deadline that only a guard that was told anew can keep
        client.set_deadline(due.group, clock() + 2.0)
        async with monitored(client):
            os.kill(first, signal.SIGKILL)
            await asyncio.to_thread(wait_until, lambda: client.pid != first)
            assert watched.is_alive()
            await asyncio.to_thread(wait_until, due.is_dead)
            assert watched.is_alive()

    asyncio.run(scenario())
    wait_until(watched.is_dead)
    assert forgotten.is_alive()
    assert "guard" in caplog.text
    assert "-9" in caplog.text


def test_what_is_said_while_no_guard_runs_is_not_lost(
    client: GuardClient, victims: Callable[[], Victim]
) -> None:
    """Between the death of one guard and the start of the next."""
    victim = victims()

    async def scenario() -> None:
        first = client.pid
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: not _runs(psutil.Process(first)) if psutil.pid_exists(first) else True)
        client.watch(victim.group)
        client.set_deadline(victim.group, clock() + 0.5)
        async with monitored(client):
            await asyncio.to_thread(wait_until, victim.is_dead)

    asyncio.run(scenario())


def test_a_stopped_guard_is_replaced_by_one_that_knows_everything(
    client: GuardClient, victims: Callable[[], Victim], caplog: pytest.LogCaptureFixture
) -> None:
    """The worker is not held up by its full pipe, and what is killed is what is due."""
    watched, due = victims(), victims()
    nobody = _unused_pid()

    async def scenario() -> None:
        async with monitored(client):
            await answered(client)  # it has started
            first = suspended(client)
            client.ask(0.1)
            client.watch(watched.group)
            client.watch(due.group)
            for _ in range(20_000):  # more than fits into the pipe
                client.set_deadline(nobody, clock() + 1000)
            client.set_deadline(due.group, clock() + 1000)
            await _until(lambda: not _runs(first))
            client.set_deadline(due.group, clock() + 0.1)
            await asyncio.to_thread(wait_until, due.is_dead)
            assert watched.is_alive()

    asyncio.run(scenario())
    wait_until(watched.is_dead)
    assert "does not answer" in caplog.text


def test_a_guard_whose_pipe_is_full_is_replaced_without_being_asked(
    client: GuardClient, victims: Callable[[], Victim]
) -> None:
    """That of a worker whose steps are shorter than its pauses between questions."""
    victim = victims()

    async def scenario() -> None:
        async with monitored(client):
            await answered(client)  # it has started
            client.ask(0.1)
            await answered(client)
            first = suspended(client)
            for _ in range(20_000):
                client.watch(victim.group)
            await _until(lambda: not _runs(first))

    asyncio.run(scenario())
    wait_until(victim.is_dead)


def test_what_no_guard_watches_is_killed_when_a_guard_would_have_killed_it(
    client: GuardClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A guard that is stopped, and no other can be started: steps end, idle children live on."""
    told: dict[int, float] = {}
    step, idle = _unused_pid(), _unused_pid()

    def no_process(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    async def scenario() -> None:
        async with monitored(client, lambda group: told.setdefault(group, clock()) and None):
            client.watch(idle)
            acknowledged = clock() + 2.0
            client.set_deadline(step, acknowledged)
            client.ask(SECONDS)
            await answered(client)
            suspended(client)
            monkeypatch.setattr(guard_client.subprocess, "Popen", no_process)
            client.set_deadline(step, clock() + 1000)
            client.ask(0.1)
            await _until(lambda: step in told)
            assert acknowledged <= told[step] < acknowledged + 1
            monkeypatch.undo()
            # a guard can be had again
            await _until(lambda: client.pid and client._question is None)

    asyncio.run(scenario())
    assert told.keys() == {step}
    assert caplog.text.count("cannot be started") == 1


def test_a_guard_that_answers_is_kept_and_so_is_what_it_guards(client: GuardClient) -> None:
    """Deadlines that it has acknowledged count in place of those before."""
    told: list[int] = []
    group = _unused_pid()

    async def scenario() -> None:
        async with monitored(client, told.append):
            first = client.pid
            soon, later = clock() + SECONDS, clock() + 2 * SECONDS
            client.set_deadline(group, soon)
            client.set_deadline(group, later)
            assert client._limits == {group: soon}  # nobody has said that it knows of the other one
            await answered(client)  # it has started
            client.ask(SECONDS)
            await answered(client)
            assert client._limits == {group: later}
            assert client.pid == first

    asyncio.run(scenario())
    assert not told


def test_the_monitor_rests_until_something_is_due(
    client: GuardClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a step runs, its deadline is looked at when it is over, not all the time."""
    looks: list[float] = []
    look = client._look
    monkeypatch.setattr(client, "_look", lambda on: looks.append(clock()) or look(on))
    told: list[int] = []
    group = 2**22 + 1  # no process has such a number

    async def main() -> None:
        async with monitored(client, told.append):
            client.set_deadline(group, clock() + 0.5)
            await _until(lambda: told)

    asyncio.run(main())
    assert told == [group]
    assert len(looks) < 20


def test_a_stopped_guard_does_not_keep_the_worker_from_ending(
    client: GuardClient, victims: Callable[[], Victim], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker kills what is left itself, then."""
    victim = victims()
    monkeypatch.setattr(guard_client, "_CLOSE_SECONDS", 0.1)
    client.watch(victim.group)
    suspended(client)
    client.close()
    wait_until(victim.is_dead)


def test_closing_before_the_start_and_twice_does_nothing() -> None:
    """A worker that fails early stops in the same order as any other."""
    client = GuardClient()
    assert client.pid == 0
    client.watch(1_000_000)
    client.forget(1_000_000)
    client.close()
    client.start()
    client.close()
    client.close()


def test_the_guard_needs_only_the_standard_library() -> None:
    """It starts by its path, in milliseconds, without the package and without site-packages."""
    path = Path(guard_module.__file__)
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert (node.module or "").split(".")[0] in sys.stdlib_module_names
        elif isinstance(node, ast.Import):
            assert all(name.name.split(".")[0] in sys.stdlib_module_names for name in node.names)
    script = (
        "import runpy, sys\n"
        f"runpy.run_path({str(path)!r}, run_name='guard')\n"
        "print([name for name in sys.modules if name.startswith(('dagster', 'asyncio'))])"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_clock_counts_suspended_time() -> None:
    """Where the system has such a clock."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        assert abs(clock() - time.clock_gettime(time.CLOCK_BOOTTIME)) < 1
    before = clock()
    assert clock() >= before
