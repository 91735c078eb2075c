from __future__ import annotations
from collections.abc import Iterator
from contextlib import contextmanager
import os, sys


class LoadedFiles:
    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    @contextmanager
    def noting(self) -> Iterator[None]:
        yield
        for m in list(sys.modules.values()):
            f = getattr(m, "__file__", None)
            if f and "site-packages" not in f and "/usr/" not in f:
                self._known.setdefault(f, os.stat(f).st_mtime_ns)

    def changed(self) -> str:
        return next((f for f, t in self._known.items() if os.stat(f).st_mtime_ns != t), "")
