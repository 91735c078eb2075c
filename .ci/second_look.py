"""Runs the tests that failed in tox a second time, each alone: ``second_look.py RESULT_JSON``.

A test that fails only beside others shows a race, which must be found. But it must not hide the
state of all the rest, so CI passes with a list of such tests. There is no second chance for more
than a few of them, nor for anything else that fails: a crash, an import, lint, types.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

#: More failures than this are no coincidence.
MOST_TESTS = 3

#: The exit code of pytest where tests failed, and nothing else went wrong.
_TESTS_FAILED = 1


def failed_tests(result: Mapping[str, Any], work_directory: Path) -> list[tuple[str, str]] | None:
    """The environment and the id of each failed test; None where something else failed too.

    Args:
        result: what ``tox --result-json`` wrote.
        work_directory: tox's, with a ``failed_tests.json`` for each environment that ran pytest.
    """
    found = []
    for name, environment in result["testenvs"].items():
        # an environment that only builds the package has no result
        if environment.get("result", {}).get("success", True):
            continue
        file = work_directory / name / "failed_tests.json"
        failures = json.loads(file.read_text(encoding="utf8")) if file.is_file() else None
        if not failures or failures["others"] or failures["exit_code"] != _TESTS_FAILED:
            print(f"{name} failed, and not by tests alone: no second look.")
            return None
        found += [(name, test) for test in failures["tests"]]
    return found


def second_look(
    result: Mapping[str, Any], work_directory: Path, run_alone: Callable[[str, str], bool]
) -> bool:
    """Whether everything that failed passes when it is run again.

    Args:
        result, work_directory: see ``failed_tests``.
        run_alone: runs a test, by environment and id; whether it passed.
    """
    tests = failed_tests(result, work_directory)
    if not tests:
        return False
    if len(tests) > MOST_TESTS:
        print(f"{len(tests)} tests failed, more than {MOST_TESTS}: no second look.")
        return False
    failing = [item for item in tests if not run_alone(*item)]
    for name, test in failing:
        print(f"{name}: {test} failed again, alone.")
    if not failing:
        print("\n" + "!" * 80)
        print("FLAKY: failed beside other tests and passed alone. Each is a defect to find.")
        for name, test in tests:
            print(f"  {name}: {test}")
        print("!" * 80)
    return not failing


def run_with_tox(environment: str, test: str) -> bool:
    """Run one test in the environment that tox has made."""
    command = ["tox", "exec", "--skip-pkg-install", "-e", environment, "--", "pytest", test]
    return subprocess.run(command, check=False).returncode == 0


def main() -> int:
    """The exit code: 0 if all that failed was flaky."""
    path = Path(sys.argv[1])
    if not path.is_file():
        return 1
    result = json.loads(path.read_text(encoding="utf8"))
    return 0 if second_look(result, path.parent, run_with_tox) else 1


if __name__ == "__main__":
    sys.exit(main())
