"""Fixtures of every test: servers by parameter, and a look for what the tests left running."""

from __future__ import annotations

import compileall
import gc
import os
import re
import sys
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import hypothesis
import psutil
import pytest

import dagster_taskiq
import dagster_taskiq_tests
from dagster_taskiq.aio import private_files
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq_tests import quick_storage
from dagster_taskiq_tests.server_sources import stop_session_servers
from dagster_taskiq_tests.servers import (
    amqp_options,
    postgres_options,
    redis_options,
    valkey_options,
)

#: Marks the processes of this session, also those that have left its process tree.
SESSION_VARIABLE = "DAGSTER_TASKIQ_TEST_SESSION"

#: How long a process may take to see that its session is over: an embedded server, a guard.
LEFTOVER_SECONDS = 15.0

_OPTIONS = {
    "redis": redis_options,
    "valkey": valkey_options,
    "rabbitmq": amqp_options,
    "postgres": postgres_options,
}


#: Files of the directory that tox names last, each of which takes a minute on a busy machine.
_LONG_LAST = ("test_backend.py", "test_brokers.py")

# how long an example takes says nothing on a machine with other things to do
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

quick_storage.make_quick()


def pytest_configure(config: pytest.Config) -> None:
    """Compile our modules once, which else each of some hundred processes would do for itself.

    Here, since a shell may keep Python from doing it, and modules that tests write must stay
    uncompiled: one that is changed within a second may be taken for the compiled one.
    """
    if not hasattr(config, "workerinput"):  # the controller of pytest-xdist
        for package in (dagster_taskiq, dagster_taskiq_tests):
            compileall.compile_dir(Path(str(package.__file__)).parent, quiet=2)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Let pytest keep the test modules that it has compiled in its own way, for the same reason.

    What is imported meanwhile stays, so that no collection of garbage need look at it, then or
    later.
    """
    is_kept_from_it, sys.dont_write_bytecode = sys.dont_write_bytecode, False
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
        sys.dont_write_bytecode = is_kept_from_it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the long files of the last directory begin first, or one would run alone at the end."""
    items.sort(key=lambda item: item.path.name not in _LONG_LAST)


@pytest.fixture(params=_OPTIONS)
def broker_options(request: pytest.FixtureRequest) -> Iterator[ServerOptions]:
    """A namespace of the test's own on each broker in turn."""
    with _OPTIONS[request.param]() as options:
        yield options


@pytest.fixture(params=["redis", "valkey"])
def backend_options(request: pytest.FixtureRequest) -> Iterator[ServerOptions]:
    """A namespace of the test's own on each backend in turn."""
    with _OPTIONS[request.param]() as options:
        yield options


@pytest.fixture
def give_away(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Make a path somebody else's, user 4711's, as far as ``private_files`` can see."""
    given: set[Path] = set()
    monkeypatch.setattr(
        private_files, "_owner", lambda path: 4711 if path in given else path.lstat().st_uid
    )
    return given.add


@pytest.fixture(scope="session", autouse=True)
def nothing_left_running() -> Iterator[None]:
    """Fail the session, which means its last test, if it leaves a process; and end that."""
    session = uuid.uuid4().hex
    os.environ[SESSION_VARIABLE] = session
    yield
    stop_session_servers()
    _, left = psutil.wait_procs(processes_of(session), LEFTOVER_SECONDS)
    reports = [_kill(process) for process in left]
    assert not reports, "The tests left processes running:\n" + "\n".join(reports)


def processes_of(session: str) -> list[psutil.Process]:
    """The descendants of this process, and whoever has inherited the session's variable."""
    own = psutil.Process()
    found = dict.fromkeys(own.children(recursive=True))
    found.update(dict.fromkeys(p for p in psutil.process_iter() if _is_of(p, session)))
    found.pop(own, None)
    return [process for process in found if not _ends_with_us(process)]


def _is_of(process: psutil.Process, session: str) -> bool:
    try:
        return process.environ().get(SESSION_VARIABLE) == session
    except (psutil.Error, OSError):
        return False  # gone, or not ours


def _ends_with_us(process: psutil.Process) -> bool:
    """Whether it is dead already, or a helper that multiprocessing keeps until we exit."""
    try:
        command = " ".join(process.cmdline())
        is_helper = re.search(r"multiprocessing\.(resource_tracker|forkserver)", command)
        dead = process.status() == psutil.STATUS_ZOMBIE
        return dead or (is_helper is not None and process.ppid() == os.getpid())
    except psutil.Error:
        return True


def _kill(process: psutil.Process) -> str:
    """Kill it and say which it was."""
    try:
        parent, command = process.ppid(), " ".join(process.cmdline())
        process.kill()
    except psutil.Error as error:
        return f"{process.pid}: {error}"
    return f"{process.pid} (parent {parent}): {command}"
