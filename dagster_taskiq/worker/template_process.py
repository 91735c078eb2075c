"""A template: a process that loads code once, and forks the children that execute it.

It runs the standard library's fork server. The one that loads what a worker includes is forked from
the worker's fork server, and those of code locations from that one, so each has loaded nothing but
what its children may have.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver

from dagster_taskiq.execution.code_locations import ARGS_KEY
from dagster_taskiq.execution.fork_safety import ForkTrial
from dagster_taskiq.execution.loaded_code import LOADED, title_of
from dagster_taskiq.execution.step_plans import make_plan
from dagster_taskiq.worker.channel import Channel
from dagster_taskiq.worker.child import set_up_process
from dagster_taskiq.worker.child_messages import NotReady, TemplateLoads, TemplateReady

#: Of the garbage collector while code is loaded: nearly all that is made then stays, and to look at
#: it again and again takes a quarter of the time that the definitions of 300 assets take.
_LOADING_THRESHOLDS = (50_000, 20, 100)


@dataclass(frozen=True)
class TemplateOptions:
    """What a template loads.

    Attributes:
        include: modules.
        log_level: of the root logger, a name.
        location: the code location; empty for none.
        payload: of a task of it; None for none.
    """

    include: tuple[str, ...]
    log_level: str
    location: str = ""
    payload: str | None = None


def template_main(
    connection: socket.socket, listener: socket.socket, options: TemplateOptions
) -> None:
    """The template's whole life, in its main thread.

    It says ``TemplateLoads``, and ``TemplateReady`` or ``NotReady``. Then it forks a child for each
    connection to the listener, until its worker hangs up.
    """
    set_up_process(options.log_level)
    channel = Channel(connection)
    try:
        channel.say(TemplateLoads(title_of(options.payload)))
        word = _load(options)
        channel.say(word)
    except ConnectionError:
        return  # the worker is gone
    if isinstance(word, TemplateReady):
        alive = os.dup(connection.fileno())
        channel.close()
        _serve(listener.detach(), alive)


def _load(options: TemplateOptions) -> TemplateReady | NotReady:
    trial = ForkTrial()
    LOADED.find_code()
    try:
        with _collecting_seldom():
            payload = json.loads(options.payload or "{}")
            run = LOADED.load(options.include, payload)
            if run is not None and ARGS_KEY in payload:
                make_plan(run, payload)
    except BaseException as error:
        first_line = next(iter(str(error).splitlines()), "")
        return NotReady(f"it cannot be loaded ({type(error).__name__}: {first_line})")
    if hazard := trial.hazard():
        return NotReady(hazard, is_final=True)
    if old := LOADED.why_old(None):
        return NotReady(f"{old.reason} while it was loaded")
    LOADED.hand_on()
    return TemplateReady()


@contextmanager
def _collecting_seldom() -> Iterator[None]:
    """Collect garbage seldom. Thresholds that the code sets meanwhile stay."""
    before = gc.get_threshold()
    gc.set_threshold(*_LOADING_THRESHOLDS)
    try:
        yield
    finally:
        if gc.get_threshold() == _LOADING_THRESHOLDS:
            gc.set_threshold(*before)


def _serve(listener: int, alive: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):  # whatever the code has put in place
        signal.signal(number, signal.SIG_IGN)
    # it would be raised here where warnings are errors; the trial has looked at the threads
    warnings.filterwarnings("ignore", r".*multi-threaded, use of fork", DeprecationWarning)
    # What is there to stay need not be looked at, and thus written to, in every child. A collection
    # of garbage before would find little, and take half a second for 300 MB of small objects.
    gc.freeze()
    forkserver.main(listener, alive, [])
