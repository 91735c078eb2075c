"""CI's second look at failed tests: what passes alone is said loudly, all else fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

CI = Path(__file__).parents[2] / ".ci"

#: A project with a test of each kind, of which the environment says what they do.
PROJECT = """
import os
import pytest

@pytest.fixture
def fixture():
    assert "fixture" not in os.environ["FAULTS"]

@pytest.mark.parametrize("number", range(5))
def test_number(number):
    assert f"number-{number}" not in os.environ["FAULTS"]

def test_fixture(fixture): pass

def test_crash():
    if "crash" in os.environ["FAULTS"]:
        os._exit(1)

if "import" in os.environ["FAULTS"]:
    import no_such_module
if "interrupt" in os.environ["FAULTS"]:
    def test_interrupt():
        raise KeyboardInterrupt
"""


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(CI))
    return import_module("second_look")


class Project:
    """A throw-away project with its tests, beside what tox would leave of a session."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.repeated: list[tuple[str, str]] = []
        (directory / "test_it.py").write_text(PROJECT)
        (directory / "full").mkdir()

    def pytest(self, *arguments: str, faults: str) -> int:
        environment = {**os.environ, "PYTHONPATH": str(CI), "FAULTS": faults}
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # they take seconds to load
        command = [sys.executable, "-m", "pytest", "-q", "-p", "failed_tests", *arguments]
        done = subprocess.run(
            command, env=environment, cwd=self.directory, check=False, timeout=120
        )
        return done.returncode

    def session(self, faults: str, *arguments: str) -> dict[str, object]:
        """Run all tests; what tox says of it, beside a lint that passed."""
        report = f"--failed-tests={self.directory}/full/failed_tests.json"
        code = self.pytest(report, *arguments, faults=faults)
        environments = {"full": code, "lint": 0}
        tests: dict[str, object] = {
            name: {"result": {"success": not code, "exit_code": code}}
            for name, code in environments.items()
        }
        return {"testenvs": {**tests, ".pkg": {"setup": {}}}}  # what builds the package

    def alone(self, faults: str) -> Callable[[str, str], bool]:
        """How a test is run again."""

        def run(environment: str, test: str) -> bool:
            self.repeated.append((environment, test))
            return self.pytest(test, faults=faults) == 0

        return run


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.mark.parametrize(
    "arguments", [[], ["-p", "xdist.plugin", "-n", "1"]], ids=["one process", "xdist"]
)
def test_flaky_tests_pass_with_a_loud_list(
    module: ModuleType,
    project: Project,
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A test and a fixture that fail once; each is run alone, and nothing else is."""
    result = project.session("number-3 fixture", *arguments)
    assert module.second_look(result, project.directory, project.alone(""))
    names = ["test_it.py::test_fixture", "test_it.py::test_number[3]"]
    assert project.repeated == [("full", name) for name in names]
    said = capsys.readouterr().out
    assert "FLAKY" in said
    assert all(f"full: {name}" in said for name in names)


def test_what_fails_again_fails(
    module: ModuleType, project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though another one passes."""
    result = project.session("number-1 number-2")
    assert not module.second_look(result, project.directory, project.alone("number-2"))
    said = capsys.readouterr().out
    assert "test_number[2] failed again" in said
    assert "FLAKY" not in said


@pytest.mark.parametrize(
    ("faults", "arguments"),
    [
        ("number-0 number-1 number-2 number-3", []),
        ("import", []),
        ("import", ["-p", "xdist.plugin", "-n", "1"]),
        ("crash number-1", ["-p", "xdist.plugin", "-n", "1"]),
        ("interrupt number-1", []),
    ],
    ids=["many", "import", "import in xdist", "crash", "interrupt"],
)
def test_what_has_no_second_chance(
    module: ModuleType, project: Project, faults: str, arguments: list[str]
) -> None:
    """Nothing is run again."""
    result = project.session(faults, *arguments)
    assert not module.second_look(result, project.directory, project.alone(""))
    assert project.repeated == []


def test_lint_has_no_second_chance(module: ModuleType, project: Project) -> None:
    """Nor has a test beside it, nor a session that left no report."""
    result = project.session("number-1")
    lint = {"lint": {"result": {"success": False, "exit_code": 1}}}
    result["testenvs"] = {**result["testenvs"], **lint}  # type: ignore[dict-item]
    assert not module.second_look(result, project.directory, project.alone(""))
    result = project.session("number-1")
    (project.directory / "full" / "failed_tests.json").unlink()
    assert not module.second_look(result, project.directory, project.alone(""))
    assert project.repeated == []


def test_nothing_that_failed_is_no_success(module: ModuleType, tmp_path: Path) -> None:
    """It is asked only if tox failed."""
    (tmp_path / "result.json").write_text(json.dumps({"testenvs": {}}))
    done = subprocess.run(
        [sys.executable, CI / "second_look.py", tmp_path / "result.json"], check=False
    )
    assert done.returncode == 1
    assert not module.second_look({"testenvs": {}}, tmp_path, lambda *_: True)
