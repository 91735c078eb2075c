"""Whether children may be forked from a process, each a fresh one that runs a few lines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dagster_taskiq.execution import fork_safety

SECONDS = 60.0

PRELUDE = """
import os, select, signal, socket, sqlite3, sys, threading, time
from dagster_taskiq.execution import fork_safety
from dagster_taskiq.execution.fork_safety import ForkTrial
"""

#: Starts a thread of the system, which Python knows nothing of.
NATIVE_THREAD = """
import ctypes
libc = ctypes.CDLL(None)
thread = ctypes.c_ulong()
assert libc.pthread_create(ctypes.byref(thread), None, libc.pause, None) == 0
libc.pthread_setname_np(thread, {name})
"""

NO_HAZARD = {
    "nothing": "",
    "dagster": "import dagster",
    "a thread that is ending": "threading.Thread(target=time.sleep, args=[0.2]).start()",
    "usual devices": "a = open(os.devnull, 'r+b'); b = open('/dev/urandom', 'rb')",
    "a log": "a = open('log', 'a+')",
    "a file to read": "a = open(os.__file__)",
    "a pipe": "a = os.pipe()",
    "a pipe with a name": "os.mkfifo('a'); b = os.open('a', os.O_RDWR)",
    "a pipe to another process": """
import subprocess
a = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
""",
    "closed again": "socket.socket().close(); select.epoll().close()",
    "datagrams": "a = socket.socket(type=socket.SOCK_DGRAM); a.connect(('127.0.0.1', 9))",
    "shared memory": """
from multiprocessing.shared_memory import SharedMemory
memory = SharedMemory(create=True, size=1)
memory.unlink()
""",
    # Python reports it and forgets it
    "a handler that fails": "os.register_at_fork(after_in_child=lambda: 1 / 0)",
    "children that are not waited for": "signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
    "jemalloc": NATIVE_THREAD.format(name=b"jemalloc_bg_thd"),
    # as OpenBLAS does
    "a thread that a handler stops": """
import _thread
end = threading.Event()
_thread.start_new_thread(end.wait, ())
os.register_at_fork(before=end.set)
""",
}

HAZARDS = {
    "a thread": (
        "threading.Thread(target=time.sleep, args=[60], name='poller', daemon=True).start()",
        "1 thread of Python left running: poller",
    ),
    "a pool": (
        """
from concurrent.futures import ThreadPoolExecutor
barrier = threading.Barrier(2)
pool = ThreadPoolExecutor(2, "pool")
list(pool.map(lambda _: barrier.wait(), range(2)))
""",
        "2 threads of Python left running: pool_0, pool_1",
    ),
    "a thread without a name": (
        "import _thread; _thread.start_new_thread(time.sleep, (60,))",
        "1 native thread left running",
    ),
    "native threads": (
        NATIVE_THREAD.format(name=b"tokio") * 2,
        "2 native threads left running: tokio (2)",
    ),
    "epoll": ("a = select.epoll()", "a descriptor of eventpoll is open"),
    "a pair of sockets": ("a = socket.socketpair()", "a socket is open"),
    "a connection": (
        """
a = socket.create_server(("127.0.0.1", 0))
b = socket.create_connection(a.getsockname())
c = a.accept()
a.close()
""",
        "a socket to 127.0.0.1:",
    ),
    "a port": ("a = socket.create_server(('127.0.0.1', 0))", "a socket at 127.0.0.1:"),
    "a port of IPv6": (
        "a = socket.socket(socket.AF_INET6); a.bind(('::', 0))",
        "a socket at [::]:",
    ),
    "a connection to a path": (
        """
a = socket.socket(socket.AF_UNIX)
a.bind("a.socket")
a.listen()
b = socket.socket(socket.AF_UNIX)
b.connect("a.socket")
a.close()
""",
        "a socket to a.socket is open",
    ),
    "a helper process": (
        """
import subprocess
a = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
""",
        "a pipe from another process is open",
    ),
    "a pipe with a name, from another process": (
        """
import subprocess
os.mkfifo("a")
a = subprocess.Popen(["sh", "-c", "exec cat > a"], stdin=subprocess.PIPE)
b = open("a")
""",
        "a pipe from another process is open",
    ),
    "a database": (
        "a = sqlite3.connect('a.db'); a.execute('create table a (b)')",
        "/a.db, for reading and writing, is open",
    ),
    "a crash": (
        "os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGSEGV))",
        "a child that was forked on trial crashed",
    ),
    "an exit": (
        "os.register_at_fork(after_in_child=lambda: os._exit(0))",
        "a child that was forked on trial crashed",
    ),
    "no process": (
        "def fail(): raise BlockingIOError(11, 'no process')\nos.fork = fail",
        "the system does not let a child be forked on trial: [Errno 11] no process",
    ),
    "another system": (
        "fork_safety._THREADS = fork_safety.Path('/no/proc')",
        "this system does not show which native threads a process has",
    ),
}


def hazard(directory: Path, code: str, before: str = "") -> str:
    """What is found in a process that has run some code, in a directory of its own."""
    script = f"{PRELUDE}{before}\ntrial = ForkTrial()\n{code}\nprint(trial.hazard())\n"
    script += "sys.stdout.flush()\nos._exit(0)\n"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        check=False,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd=directory,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return line


@pytest.mark.parametrize("code", NO_HAZARD.values(), ids=NO_HAZARD)
def test_what_is_no_hazard(tmp_path: Path, code: str) -> None:
    assert hazard(tmp_path, code) == ""


def test_what_is_open_before_is_no_hazard(tmp_path: Path) -> None:
    before = "a = socket.create_server(('127.0.0.1', 0)); b = select.epoll()"
    assert hazard(tmp_path, "", before) == ""


@pytest.mark.parametrize(("code", "words"), HAZARDS.values(), ids=HAZARDS)
def test_hazards(tmp_path: Path, code: str, words: str) -> None:
    assert words in hazard(tmp_path, code)


def test_nothing_is_left_of_a_trial_that_hangs(tmp_path: Path) -> None:
    code = """
before = os.listdir("/proc/self/fd")
fork_safety._TRIAL_SECONDS = 0.2
os.register_at_fork(after_in_child=lambda: time.sleep(60))
found = trial.hazard()
assert "hung" in found, found
assert os.listdir("/proc/self/fd") == before
try:
    os.waitpid(-1, os.WNOHANG)
except ChildProcessError:
    pass
else:
    raise AssertionError("a child is left")
"""
    assert hazard(tmp_path, code) == "a child that was forked on trial hung"


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("/dev/nvidia0", "/dev/nvidia0"),
        ("/dev/nvidiactl", "/dev/nvidiactl"),
        ("/dev/neuron0", "/dev/neuron0"),
        ("/dev/null", ""),
        ("/dev/pts/3", ""),
        ("anon_inode:[io_uring]", "a descriptor of io_uring"),
        ("anon_inode:inotify", "a descriptor of inotify"),
    ],
)
def test_devices(target: str, words: str) -> None:
    """Of a character device, whose name the kernel would give."""
    with Path("/dev/null").open() as device:
        assert fork_safety._shared(device.fileno(), target) == words
