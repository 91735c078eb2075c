"""Taskiq is imported without aiohttp, which is there for whoever asks for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.once

#: Where a process begins that launches, executes or steers; of those that begin with our brokers
#: each is alone, since these know other packages that import Taskiq.
ENTRIES = [
    "dagster_taskiq.launcher, dagster_taskiq.executor, dagster_taskiq.worker.worker",
    "dagster_taskiq.brokers.redis",
    "dagster_taskiq.brokers.amqp",
]

_THEN_USED = """
assert "aiohttp" not in sys.modules
import taskiq
from taskiq.middlewares import taskiq_admin_middleware as user
assert user.aiohttp.ClientSession.__module__ == "aiohttp.client"
import aiohttp.web
assert aiohttp.ClientSession is user.aiohttp.ClientSession
assert user.aiohttp.web is aiohttp.web
"""

#: A thread that imports aiohttp while Taskiq is being imported.
_MEANWHILE = """
import threading
from typing import Any
from dagster_taskiq import _taskiq

found = []

def use():
    import aiohttp
    found.append(aiohttp.ClientSession)
    from aiohttp import web
    found.append(web.Application)

with _taskiq._imported_later("aiohttp"):
    import aiohttp as standing_in
    assert standing_in.ClientSession is Any
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
import aiohttp.web
assert found == [aiohttp.ClientSession, aiohttp.web.Application]
assert standing_in is not aiohttp
assert standing_in.ClientSession is aiohttp.ClientSession
"""


def execute(code: str) -> None:
    process = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("entries", ENTRIES)
def test_no_process_waits_for_aiohttp(entries: str) -> None:
    execute(f"import {entries}\nassert 'aiohttp' not in sys.modules")


def test_it_is_imported_when_it_is_used() -> None:
    execute(f"import dagster_taskiq._taskiq\n{_THEN_USED}")


def test_a_thread_that_imports_it_meanwhile_has_it() -> None:
    execute(_MEANWHILE)


def test_where_it_is_imported_already_it_stays() -> None:
    execute(
        "import aiohttp; first = aiohttp\nimport dagster_taskiq._taskiq\n"
        "import aiohttp\nassert aiohttp is first"
    )
