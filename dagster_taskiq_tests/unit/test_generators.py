"""The global random generators of forked processes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import types
from pathlib import Path

import pytest

from dagster_taskiq.execution import generators

#: Loads code in a template and another one that is forked from it, and has two children draw.
DRAW = """
import os, random, sys
from dagster_taskiq.execution.generators import noting_seeds, reseed

with noting_seeds():
    {code}
if os.fork():  # as the template of a code location
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
reseed()
with noting_seeds():
    {more}
for _ in range(2):
    if os.fork() == 0:
        reseed()
        os.write(1, f"{{random.random()}}\\n".encode())
        os._exit(0)
    os.wait()
"""


def drawn(code: str, more: str = "pass") -> list[str]:
    """What the children draw."""
    done = subprocess.run(
        [sys.executable, "-c", DRAW.format(code=code, more=more)],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(generators.__file__).parents[2],
    )
    return done.stdout.split()


def test_each_child_has_numbers_of_its_own() -> None:
    first, second = drawn("pass")
    assert first != second


def test_a_seed_that_code_gives_holds_in_each_child() -> None:
    """With what was drawn since then, as where the child had loaded the code itself."""
    expected = random.Random(42)
    expected.random()
    wanted = [str(expected.random())] * 2
    assert drawn("random.seed(42); random.random()") == wanted
    assert drawn("pass", "random.seed(42); random.random()") == wanted


def test_a_state_that_code_gives_holds_in_each_child() -> None:
    code = "random.setstate(random.Random(42).getstate())"
    wanted = [str(random.Random(42).random())] * 2
    assert drawn(code) == wanted
    assert drawn("pass", code) == wanted


def test_a_seed_that_is_in_the_state_that_code_puts_back() -> None:
    wanted = [str(random.Random(42).random())] * 2
    code = "random.seed(42); state = random.getstate(); random.seed(); random.setstate(state)"
    assert drawn(code) == wanted


@pytest.mark.parametrize(
    ("code", "more"),
    [
        ("random.seed(42)", "random.seed()"),
        # as a library does that needs the same numbers for a moment
        (
            "state = random.getstate(); random.seed(42); random.random(); random.setstate(state)",
            "pass",
        ),
        ("state = random.getstate(); random.random(); random.setstate(state)", "pass"),
    ],
)
def test_a_seed_may_be_taken_back(code: str, more: str) -> None:
    first, second = drawn(code, more)
    assert first != second


def test_noting_leaves_nothing_behind() -> None:
    before = random.seed, random.getstate, random.setstate
    with generators.noting_seeds():
        pass
    assert (random.seed, random.getstate, random.setstate) == before
    assert not generators._seeded


class _Numpy(types.ModuleType):
    def __init__(self, sequence: object) -> None:
        super().__init__("numpy.random")
        bits = types.SimpleNamespace(seed_seq=sequence)
        generator = types.SimpleNamespace(_bit_generator=bits)
        self.mtrand = types.SimpleNamespace(_rand=generator)
        self.state: object = "inherited"

    @staticmethod
    def RandomState() -> object:  # noqa: N802 - numpy's name
        return types.SimpleNamespace(get_state=lambda: os.urandom(8))

    def set_state(self, state: object) -> None:
        self.state = state


class _Torch(types.ModuleType):
    def __init__(self, seed: int) -> None:
        super().__init__("torch")
        self.seed = seed

    def initial_seed(self) -> int:
        return self.seed

    def manual_seed(self, seed: int) -> None:
        self.seed = seed


@pytest.mark.parametrize("is_given", [True, False])
def test_libraries_that_are_imported(is_given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins; the tests with real libraries have numpy."""
    numpy, torch = _Numpy(None if is_given else "sequence"), _Torch(42 if is_given else 2**60)
    monkeypatch.setitem(sys.modules, "numpy.random", numpy)
    monkeypatch.setitem(sys.modules, "torch", torch)
    generators.reseed()
    assert (numpy.state == "inherited") == is_given
    assert (torch.seed in (42, 2**60)) == is_given
