"""What people mean by a name, and what they may have meant by one that is not there."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

from dagster_taskiq.errors import DagsterTaskiqError
from dagster_taskiq.messages.plain_text import plain_name
from dagster_taskiq.messages.worker_records import WorkerRecord

F = TypeVar("F", bound=Callable[..., Any])


def explain_names(command: F) -> F:
    """Add to a command's help how its NAME is read."""
    command.__doc__ = f"""{command.__doc__}

    NAME is a worker's name, NAME@HOST one of several workers of that name, @HOST means all workers
    of a host. Each may be a pattern, in quotes: 'short-*'."""
    return command


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence with the known name that another one is most like; empty where it is like none."""
    found = difflib.get_close_matches(name, sorted(set(known)), n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""


def no_worker(name: str, running: Collection[WorkerRecord]) -> str:
    """The sentence that no worker has a name."""
    if name.startswith("@"):
        hosts = (f"@{it.name.partition('@')[2]}" for it in running)
        return f"No worker is running on host {name[1:]!r}.{nearest(name, hosts)}"
    ends = (it.name if "@" in name else it.name.partition("@")[0] for it in running)
    return f"No worker named {name!r} is running.{nearest(name, ends)}"


def full_id(what: str, beginning: str, known: Iterable[str]) -> str:
    """The one id that begins so.

    Args:
        what: it is of, to begin a sentence with: "No task in flight".

    Raises:
        DagsterTaskiqError: there is none, or several; the message has the nearest or some of them.
    """
    ids = sorted(set(known))
    found = [it for it in ids if it.startswith(beginning)]
    if beginning in found or len(found) == 1:
        return beginning if beginning in found else found[0]
    if not found:
        raise DagsterTaskiqError(f"{what} has the id {beginning!r}.{nearest(beginning, ids)}")
    several = ", ".join(map(plain_name, found[:3])) + (", ..." if len(found) > 3 else "")
    raise DagsterTaskiqError(f"Several ids begin with {beginning!r}: {several}.")
