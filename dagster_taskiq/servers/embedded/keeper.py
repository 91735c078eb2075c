"""The keeper: the process that starts the embedded server, and stops it after its last user.

A script, started by ``server.py`` as ``python -I -S keeper.py LOCK SERVER [OPTION...]``
in the server's directory. It imports nothing but the standard library, so that it starts in some
20 ms and stays small. LOCK is the number of an inherited file descriptor that has ``keeper.lock``.

Three locks (flock), which the kernel releases when their holder ends, however it ends:

* ``users.lock``, shared, by each user. The keeper waits for it exclusively: it gets it when the
  last user is gone, without asking now and then, and no new one comes until the server is stopped.
* ``keeper.lock`` by the keeper. It was taken by the user who started it, so that of many who find
  no keeper one starts one.
* ``server.lock`` by the server alone, so that no second one writes the same files while the first
  is still dying.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import sys
import threading
import time

SOCKET = "server.sock"

#: Where whoever starts a keeper moves the socket that an earlier one's server has left.
EARLIER_SOCKET = "earlier.sock"

LOCK_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW

#: How long a server may take to write its data and stop before it is killed.
STOP_SECONDS = 10.0

#: A server that is killed more often than this in this time is not started again.
MAX_DEATHS = 5
DEATHS_SECONDS = 60.0


class Keeper:
    """One server, as long as anybody uses it.

    Args:
        command: the server's path and its options.
    """

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._pid: int | None = None
        self._stopping = False
        self._changing = threading.Lock()  # _pid and _stopping
        self._ended = threading.Event()
        self._deaths: list[float] = []

    def run(self) -> int:
        """Start the server, start it again when it was killed, and return when it is over.

        Returns:
            The exit code: 0 after ``stop``, 1 if the server cannot be kept running.
        """
        try:
            # from the main thread alone: the parent-death signal follows the thread that forked
            while self._start():
                if not self._may_restart(self._wait()):
                    return 1
            return 0
        finally:
            self._ended.set()

    def stop(self) -> None:
        """Stop the server, by force if it takes too long; ``run`` then returns."""
        with self._changing:
            self._stopping = True
            if self._pid is not None:
                os.kill(self._pid, signal.SIGTERM)
        if not self._ended.wait(STOP_SECONDS):
            with self._changing:
                if self._pid is not None:
                    os.kill(self._pid, signal.SIGKILL)

    def _start(self) -> bool:
        """Start the server, unless it is to be stopped."""
        with self._changing:
            if not self._stopping:
                self._pid = start_server(self._command)
            return not self._stopping

    def _wait(self) -> int:
        """Wait until the server has ended; returns its wait status."""
        _, status = os.waitpid(self._pid or 0, 0)
        with self._changing:
            self._pid = None
        say(f"the server has ended, {describe(status)}")
        return status

    def _may_restart(self, status: int) -> bool:
        """Whether another start makes sense; after ``stop`` it is up to ``_start`` to refuse."""
        if self._stopping:
            return True
        if os.WIFEXITED(status) and os.WEXITSTATUS(status):
            return False  # it has said why in its log, and would say it again
        now = time.monotonic()
        self._deaths = [then for then in self._deaths if then > now - DEATHS_SECONDS] + [now]
        if len(self._deaths) > MAX_DEATHS:
            say(f"it ended {len(self._deaths)} times within {DEATHS_SECONDS:.0f} s: giving up")
            return False
        return True


def start_server(command: list[str]) -> int:
    """Start the server with ``server.lock`` in its hands; returns its process id.

    Raises:
        TimeoutError: an earlier server does not end.
    """
    lock = lock_of_server()
    parent = os.getpid()
    # until the child has no handler of ours left, which would swallow an early order to stop
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            die_with(parent)
            os.set_inheritable(lock, True)
            os.execv(command[0], command)  # noqa: S606
        except OSError as error:
            say(f"cannot start {command[0]}: {error}")
        finally:
            os._exit(127)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.close(lock)
    return pid


def lock_of_server() -> int:
    """A file descriptor with ``server.lock``, once the server of an earlier keeper is gone."""
    lock = os.open("server.lock", LOCK_FLAGS, 0o600)
    deadline = time.monotonic() + STOP_SECONDS
    while not take(lock):
        if time.monotonic() > deadline:
            raise TimeoutError("an earlier server does not end")
        ask_to_stop()
        time.sleep(0.02)
    return lock


def take(lock: int) -> bool:
    """Take the lock, unless another has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def ask_to_stop() -> None:
    """Tell the server of an earlier keeper to write its data and end, if there is one."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(1)
        connection.connect(EARLIER_SOCKET)
        connection.sendall(b"SHUTDOWN\r\n")
        connection.recv(100)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when the keeper ends, even when that is killed.

    Only Linux can. Elsewhere the server outlives a killed keeper, until the next use of the same
    home, whose keeper stops it (``lock_of_server``) and starts one of its own.
    """
    if sys.platform == "linux":
        import ctypes  # noqa: PLC0415 - a third of the keeper's start, and only needed here

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before we asked
            os._exit(1)


def stop_when_unused(keeper: Keeper) -> None:
    """Wait until the last user is gone, and stop the server."""
    users = os.open("users.lock", LOCK_FLAGS, 0o600)
    try:
        fcntl.flock(users, fcntl.LOCK_EX)
        say("the last user is gone")
    finally:
        keeper.stop()  # also where the file system refuses, rather than run for ever


def describe(status: int) -> str:
    """The wait status in words."""
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"with exit code {os.WEXITSTATUS(status)}"


def say(text: str) -> None:
    """A line of the server's log, which is where our standard error goes."""
    # without Python's buffer, whose lock another thread may have held when this process was forked
    write(2, f"keeper {os.getpid()}: {text}\n")


def write(descriptor: int, text: str) -> None:
    """Write what is good to know, but nothing that a full disk may stop the keeper for."""
    with contextlib.suppress(OSError):
        os.write(descriptor, text.encode())


def detach() -> None:
    """Be nobody's child and deaf to what is meant for the user that started us."""
    if os.fork():
        os._exit(0)  # so that nobody has to wait for the keeper
    os.umask(0o077)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # a user may have blocked or ignored some
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def main(lock: int, command: list[str]) -> int:
    """Run the server until it is not needed; returns the exit code."""
    os.set_inheritable(lock, False)  # of us, not of the server
    detach()
    os.ftruncate(lock, 0)
    write(lock, f"process {os.getpid()} on {os.uname().nodename}\n")
    keeper = Keeper(command)
    # in a thread, as a signal handler could interrupt one that holds the keeper's lock
    signal.signal(
        signal.SIGTERM, lambda *_: threading.Thread(target=keeper.stop, daemon=True).start()
    )
    threading.Thread(target=stop_when_unused, args=(keeper,), daemon=True).start()
    try:
        return keeper.run()
    except OSError as error:
        say(f"{type(error).__name__}: {error}")
        return 1
    finally:
        for name in (SOCKET, EARLIER_SOCKET):  # of killed servers
            if os.path.lexists(name):
                os.unlink(name)  # noqa: PTH108 - pathlib costs 5 ms


if __name__ == "__main__":
    # _exit, as a thread still waits for a lock
    os._exit(main(int(sys.argv[1]), sys.argv[2:]))
