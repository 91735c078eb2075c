"""A pytest plugin that writes to a file what failed, for ``second_look``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Name the file."""
    parser.addoption("--failed-tests", type=Path, help="JSON file for the ids of failed tests")


def pytest_configure(config: pytest.Config) -> None:
    """Watch the session, but for one of xdist's workers, whose reports its controller gets."""
    path = config.getoption("--failed-tests")
    if path is not None and not hasattr(config, "workerinput"):
        path.unlink(missing_ok=True)
        config.pluginmanager.register(_Failures(path))


class _Failures:
    """Collects the failures of a session.

    Args:
        path: of a file, written at the session's end: ``tests`` are the ids of those that failed;
            ``others`` what failed beside them; ``exit_code`` is pytest's own.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tests: set[str] = set()
        self._others: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            # xdist reports a test whose worker crashed in no phase
            is_test = report.when in ("setup", "call", "teardown")
            (self._tests if is_test else self._others).add(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._others.add(report.nodeid)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        found = {
            "tests": sorted(self._tests),
            "others": sorted(self._others),
            "exit_code": int(exitstatus),
        }
        self._path.write_text(json.dumps(found), encoding="utf8")
