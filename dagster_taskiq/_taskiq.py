"""The names of Taskiq that we use, imported without what takes longest of it.

Taskiq imports aiohttp, for a middleware that reports to its admin page and is not used here. That
is three quarters of the time that Taskiq's import takes, in each process that launches or executes.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


class _ImportedLater(ModuleType):
    """Stands for a module in those that import it meanwhile, until they use something of it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._importing_thread: int | None = threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        if threading.get_ident() == self._importing_thread:
            return Any  # an annotation
        self.leave()
        return getattr(importlib.import_module(self.__name__), name)

    def leave(self) -> None:
        """Let the module itself be imported from now on."""
        self._importing_thread = None
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]


@contextmanager
def _imported_later(name: str) -> Iterator[None]:
    """Leave out a module that this thread's imports import."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = stand_in = _ImportedLater(name)
    try:
        yield
    finally:
        stand_in.leave()


with _imported_later("aiohttp"):
    from taskiq import AckableMessage, AsyncBroker, BrokerMessage
    from taskiq.abc.formatter import TaskiqFormatter
    from taskiq.acks import AcknowledgeType
    from taskiq.message import TaskiqMessage
    from taskiq.receiver import Receiver

__all__ = [
    "AckableMessage",
    "AcknowledgeType",
    "AsyncBroker",
    "BrokerMessage",
    "Receiver",
    "TaskiqFormatter",
    "TaskiqMessage",
]
