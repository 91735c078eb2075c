"""The global random generators of a forked process: as if it had loaded its code itself.

What is forked has the state of its parent's generators, and so would every child. A generator that
code has seeded when it was loaded keeps that state, as it would in a process that loads the code;
the others are seeded anew.
"""

from __future__ import annotations

import os
import random
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: A seed of torch that somebody has given is below this number; its own are from 64 random bits.
_GIVEN_SEEDS = 2**32

#: States of ``random`` that are remembered while code is loaded, of 24 KiB each.
_KEPT_STATES = 16

#: The state of ``random`` after the code was loaded that has seeded it; empty where none has.
_seeded: list[Any] = []


class _Watch:
    """Stands in for the functions of ``random`` that have to do with its state.

    Attributes:
        is_seeded: whether code has given the state that the generator has.
    """

    def __init__(self) -> None:
        self.is_seeded = bool(_seeded)
        self._originals = random.seed, random.getstate, random.setstate
        #: What code may put back that it has found, and has not given.
        self._found: deque[Any] = deque(maxlen=_KEPT_STATES)

    def put(self, *functions: Any) -> None:
        """Put these, or what was there before, into the module."""
        module: Any = random
        module.seed, module.getstate, module.setstate = functions or self._originals

    def seed(self, a: Any = None, version: int = 2) -> None:
        """See ``random.seed``."""
        self.is_seeded = a is not None
        self._originals[0](a, version)

    def getstate(self) -> Any:
        """See ``random.getstate``."""
        state = self._originals[1]()
        if not self.is_seeded:
            self._found.append(state)
        return state

    def setstate(self, state: Any) -> None:
        """See ``random.setstate``."""
        self._originals[2](state)
        self.is_seeded = not any(it is state for it in self._found)


@contextmanager
def noting_seeds() -> Iterator[None]:
    """Note whether code that is loaded meanwhile gives ``random`` a seed or a state."""
    watch = _Watch()
    watch.put(watch.seed, watch.getstate, watch.setstate)
    try:
        yield
    finally:
        watch.put()
        _seeded[:] = [random.getstate()] if watch.is_seeded else []


def reseed() -> None:
    """Set the generators of this process, which was forked from one that has loaded code.

    Python's ``random``, which seeds itself with each fork, and those of numpy and torch, where they
    are imported. A generator that a module has made for itself is the same in every child.
    """
    if _seeded:
        random.setstate(_seeded[0])
    numpy_random: Any = sys.modules.get("numpy.random")
    if numpy_random is not None and not _is_seeded(numpy_random):
        # not `seed`, after which it would look as if somebody had given one
        numpy_random.set_state(numpy_random.RandomState().get_state())
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.initial_seed() >= _GIVEN_SEEDS:
        torch.manual_seed(int.from_bytes(os.urandom(8), sys.byteorder))


def _is_seeded(numpy_random: Any) -> bool:
    """Whether somebody has given numpy's global generator a seed: it has no sequence of its own."""
    try:
        return numpy_random.mtrand._rand._bit_generator.seed_seq is None  # noqa: SLF001
    except AttributeError:
        return False
