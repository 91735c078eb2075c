"""The process that a worker's children are forked from: the standard library's fork server.

The standard library starts it as a new interpreter, which imports everything a second time.
``start_early`` makes it of a fork of the worker instead, taken while the worker has imported what
it needs and nothing else has happened: no thread, no event loop, no connection, no settings.
Whatever the standard library does afterwards is the same, so where it is not as expected, or a
fork server that has died must be replaced, its own start does as well.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import traceback
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any, NoReturn

from dagster_taskiq._dagster.storage import RUN_MODULES, STORAGE_MODULES
from dagster_taskiq.worker.lifeline import die_with

#: What every child finds already imported. User code is not among it: a fresh child must run what
#: stands on disk now, and a broken module must break one child only.
_PRELOAD = (
    "__main__",
    "dagster",
    "dagster_taskiq.worker.template_process",
    *STORAGE_MODULES,
    *RUN_MODULES,
)

#: The standard library's object that knows the fork server; None where there is no such thing.
_STATE: Any = getattr(forkserver, "_forkserver", None)

#: The one that knows the process which removes what other processes have left behind.
_TRACKER: Any = resource_tracker._resource_tracker  # noqa: SLF001

#: What ``_STATE`` knows of the fork server, all None before its start; see
#: ``ForkServer.ensure_running``.
_ADDRESS, _ALIVE, _PID = "_forkserver_address", "_forkserver_alive_fd", "_forkserver_pid"

#: How many descriptors a start takes for a moment, with some for what else the worker does then.
_DESCRIPTORS_OF_START = 12

#: Held during a start, whose descriptors no other start may take.
_STARTING = threading.Lock()

#: Standard input, output and error.
_STANDARD_DESCRIPTORS = range(3)


def fork_server() -> ForkServerContext:
    """The context that forks children from a process with everything preloaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOAD))
    return context


def start_deaf(process: ForkServerProcess, address: str = "") -> None:
    """Start a child, and with it the fork server if none runs, with SIGTERM blocked.

    A supervisor may send it to every process of a worker. The fork server must not die of it,
    since a draining worker learns of the ends of its children through it, nor a child before it
    can ignore it; ``child_main`` unblocks it.

    Args:
        process: to start.
        address: of a template that it is to be forked from; empty for the fork server.

    Raises:
        OSError: no process, or no descriptors for one, or no template at that address.
        EOFError: the fork server has ended meanwhile.
    """
    with _STARTING:
        _check_descriptors()
        with _asked_at(address):
            _start_deaf(process)


@contextmanager
def _asked_at(address: str) -> Iterator[None]:
    """Have the standard library ask a template for processes, in place of the fork server.

    A template answers as the fork server does: it runs the same function.
    """
    if not address:
        yield
        return
    forkserver.ensure_running()  # else it would be started now, and the template not asked
    known = vars(_STATE)
    before = known[_ADDRESS]
    known[_ADDRESS] = address
    try:
        yield
    finally:
        if known[_ADDRESS] == address:
            known[_ADDRESS] = before


def _check_descriptors() -> None:
    """Raise OSError where there are too few descriptors for a start.

    A fork server that somebody has called and not told everything ends, and with it the worker
    loses sight of all children.
    """
    with ExitStack() as found:
        for _ in range(_DESCRIPTORS_OF_START):
            found.callback(os.close, os.open(os.devnull, os.O_RDONLY))


def _start_deaf(process: ForkServerProcess) -> None:
    resource_tracker.ensure_running()  # first, as its start unblocks the signal
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def leave_fork_server() -> None:
    """Give a child a ``multiprocessing`` as in a fresh Python, for what its steps do with it.

    Its default would be the fork server, that of the worker, to which a step has no business: what
    it had preloaded would not be there, and one byte in its pipe would end it for all slots.
    """
    multiprocessing.set_start_method(None, force=True)
    for state, alive in ((_STATE, _ALIVE), (_TRACKER, "_fd")):
        if state is not None:
            if (descriptor := getattr(state, alive, None)) is not None:
                os.close(descriptor)
            state.__init__()


def die_with_worker() -> None:
    """See ``die_with``: in a child, which leads its process group."""
    worker = multiprocessing.parent_process()
    assert worker is not None
    die_with(worker.sentinel)


class EarlyForkServer:
    """A fork server that waits for ``begin``, and ends if that never comes.

    Args:
        words: descriptor through which it is told; negative if there is no such process.
    """

    def __init__(self, words: int = -1) -> None:
        self._words = words

    def begin(self, forget: Iterable[str] = ()) -> None:
        """Let it fork children, once.

        Args:
            forget: environment variables that children must not have.
        """
        if self._words < 0:
            return
        with suppress(BrokenPipeError):  # it has died; the standard library starts another
            os.write(self._words, json.dumps(list(forget)).encode())
        os.close(self._words)
        self._words = -1

    def close(self) -> None:
        """End it, unless it has begun: then it ends with the worker."""
        if self._words >= 0:
            os.close(self._words)
            self._words = -1
            _STATE._stop()  # noqa: SLF001 - so that another may be started


def new_address(kind: str) -> str:
    """Where a process may listen: a path in a directory of this process alone."""
    return f"{util.get_temp_dir()}/{kind}-{uuid.uuid4().hex[:8]}"


def has_templates() -> bool:
    """Whether this Python's fork server can be asked at another address: see ``start_deaf``."""
    return _has_known_parts(is_running=True)


def start_early() -> EarlyForkServer:
    """Fork the fork server from this process, unless one runs already.

    Call it before anything is read that children must not know: a fork has all memory.
    """
    if not _has_known_parts(is_running=False) or threading.active_count() > 1:
        return EarlyForkServer()
    with socket.socket(socket.AF_UNIX) as listener:
        address = new_address("fork-server")
        try:
            listener.bind(address)
        except OSError:  # the path is too long
            return EarlyForkServer()
        listener.listen()
        alive_reader, alive_writer = os.pipe()
        words_reader, words_writer = os.pipe()
        pid = _fork_deaf()
        if pid == 0:
            _serve(listener.detach(), alive_reader, words_reader)
        os.close(alive_reader)
        os.close(words_reader)
    vars(_STATE).update({_ADDRESS: address, _ALIVE: alive_writer, _PID: pid})
    return EarlyForkServer(words_writer)


def _has_known_parts(*, is_running: bool) -> bool:
    """Whether the standard library's fork server has the parts that are used here.

    Args:
        is_running: whether one may be running.
    """
    state = vars(_STATE) if _STATE is not None else {}
    parameters = list(inspect.signature(forkserver.main).parameters.values())
    return (
        all(
            name in state and (is_running or state[name] is None)
            for name in (_ADDRESS, _ALIVE, _PID)
        )
        and [it.name for it in parameters[:3]] == ["listener_fd", "alive_r", "preload"]
        and all(it.default is not it.empty for it in parameters[3:])
        # from Python 3.14 on, clients show a key that the fork server was given
        and not any("authkey" in name for name in (*state, *(it.name for it in parameters)))
    )


def _fork_deaf() -> int:
    """Fork, the new process with SIGTERM blocked: see ``start_deaf``."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # else both processes would write what waits
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    pid = -1
    try:
        pid = os.fork()
    finally:
        if pid != 0:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    return pid


def _serve(listener: int, alive: int, words: int) -> NoReturn:
    """The fork server's whole life."""
    exit_code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _close_all_but(*_STANDARD_DESCRIPTORS, listener, alive, words)
        with os.fdopen(words, "rb") as reader:
            said = reader.read()
        if said:  # else the worker is gone
            take_variables(json.loads(said))
            _preload(_PRELOAD)
            forkserver.main(listener, alive, [])
    except SystemExit:
        exit_code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # whoever called us goes on in the worker, not here
        os._exit(exit_code)


def _close_all_but(*keep: int) -> None:
    """Close what an interpreter of its own would not have: whoever waits for its end may wait."""
    for number in map(int, os.listdir("/dev/fd")):  # noqa: PTH208 - they are no files
        if number not in keep:
            with suppress(OSError):  # the one that was open to list them
                os.close(number)


def _preload(modules: Sequence[str]) -> None:
    for module in modules:
        with suppress(ImportError):
            import_module(module)
    # what is there to stay need not be looked at, and thus written to, in every child
    gc.freeze()


def take_variables(names: Iterable[str]) -> dict[str, str]:
    """Take variables out of the environment; those that there were.

    Also out of the memory that the process was started with: the kernel shows it to whoever may
    look at the process (``/proc/self/environ``), and forks have it too.
    """
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_void_p
    found = {}
    for name in names:
        where = libc.getenv(os.fsencode(name))
        if where:
            ctypes.memset(where, 0, len(ctypes.string_at(where)))
        value = os.environ.pop(name, None)
        if value is not None:
            found[name] = value
    return found
