"""Whether the kernel has killed for lack of memory: a SIGKILL alone does not say why it came.

The kernel counts such kills for each control group, of both versions, and, which says less where
many share a host, for the whole host. Children are in their worker's control group.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
_OF_HOST = Path("/proc/vmstat")
_COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


def count_oom_kills() -> int:
    """How many processes of this one's control group it were so far; 0 where nobody counts."""
    file = _counter()
    return (_read(file) or 0) if file else 0


@lru_cache(maxsize=1)
def _counter() -> Path | None:
    """The narrowest counter that can be read."""
    return next((file for file in _candidates() if _read(file) is not None), None)


def _candidates() -> Iterator[Path]:
    try:
        lines = _OWN_GROUPS.read_text(encoding="utf8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        inside = group.lstrip("/")
        if "memory" in controllers.split(","):
            yield _GROUPS / "memory" / inside / "memory.oom_control"
            # a container may see its own group as the root
            yield _GROUPS / "memory" / "memory.oom_control"
        elif not controllers:
            yield _GROUPS / inside / "memory.events"
            yield _GROUPS / "memory.events"
    yield _OF_HOST


def _read(file: Path) -> int | None:
    try:
        found = _COUNT.search(file.read_text(encoding="utf8"))
    except OSError:
        return None
    return int(found[1]) if found else None
